//! TLS towards the provider: the system's roots and those of `ca_file`, one set of rules for all.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, InvalidMessage};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Makes connections secure. Verification cannot be turned off.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    server: ServerName<'static>,
}

impl Tls {
    /// For connections to `server`, a name or an address. Fails where there are no roots, or `ca_file` has none.
    pub fn new(server: &str, ca_file: Option<&Path>) -> io::Result<Self> {
        let extra = ca_file.map(roots).transpose()?.unwrap_or_default();
        let crypto = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier::new_with_extra_roots(extra, Arc::clone(&crypto));
        let verifier = verifier.map_err(|error| {
            let text = format!("no root certificates: {error}; install ca-certificates, or name some by provider.ca_file");
            io::Error::other(text)
        })?;
        let config =
            ClientConfig::builder_with_provider(crypto).with_safe_default_protocol_versions();
        let config = config
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        let server = ServerName::try_from(bare(server).to_owned()).map_err(io::Error::other)?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), server })
    }

    /// Makes the handshake. The error says what to do where that is known.
    pub async fn connect(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
        let made = self.connector.connect(self.server.clone(), stream).await;
        made.map_err(|error| match cure(&error) {
            Some(cure) => format!("{error}; {cure}"),
            None => error.to_string(),
        })
    }
}

/// An IPv6 address may be written as in a URL.
pub(super) fn bare(server: &str) -> &str {
    server.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(server)
}

/// The certificates in a PEM file; at least one.
fn roots(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let failed = |error: &dyn std::fmt::Display| {
        io::Error::other(format!("provider.ca_file {}: {error}", path.display()))
    };
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| failed(&error))?;
    let certificates: Vec<_> =
        certificates.collect::<Result<_, _>>().map_err(|error| failed(&error))?;
    match certificates.is_empty() {
        true => Err(failed(&"it has no certificate in PEM")),
        false => Ok(certificates),
    }
}

/// What to do about a handshake that failed.
fn cure(error: &io::Error) -> Option<&'static str> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    match error {
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::UnknownIssuer => Some(
                "its issuer is not known to this system: name the issuer's certificate by provider.ca_file",
            ),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Some("write in provider.server a name that the certificate has")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                Some("who runs the server has to renew it, or this system's clock is wrong")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Some("this system's clock may be wrong")
            }
            _ => None,
        },
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            Some("the server does not speak TLS here: is provider.security right for this port?")
        }
        _ => None,
    }
}
