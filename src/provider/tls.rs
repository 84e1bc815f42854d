//! TLS towards the provider: the system's roots and those of `ca_file`, one set of rules for all.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, InvalidMessage};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config;

/// Makes connections secure. Verification cannot be turned off.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    server: ServerName<'static>,
}

impl Tls {
    /// For connections to `server`, a name or an address. Fails where there are no roots, or `ca_file` has none.
    pub fn new(server: &str, ca_file: Option<&Path>) -> io::Result<Self> {
        let config = client_config(ca_file)?;
        let server = ServerName::try_from(bare(server).to_owned()).map_err(io::Error::other)?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), server })
    }

    /// Makes the handshake. The error says what to do where that is known.
    pub async fn connect(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
        let made = self.connector.connect(self.server.clone(), stream).await;
        made.map_err(|error| match cure(&error) {
            Some(cure) => format!("{error}; {cure}"),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                "the server closed the connection during the handshake".to_owned()
            }
            None => error.to_string(),
        })
    }
}

/// The one set of rules for TLS towards the provider, by SMTP and HTTP. Fails where there are no roots, or `ca_file` has
/// none.
pub(super) fn client_config(ca_file: Option<&Path>) -> io::Result<ClientConfig> {
    let extra = match ca_file {
        None => Vec::new(),
        Some(path) => config::roots(path).map_err(|why| {
            io::Error::other(format!("provider.ca_file {}, which {why}", path.display()))
        })?,
    };
    let crypto = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new_with_extra_roots(extra, Arc::clone(&crypto));
    let verifier = verifier.map_err(|error| {
        let text = format!("no root certificates: {error}; install ca-certificates, or name some by provider.ca_file");
        io::Error::other(text)
    })?;
    let config = ClientConfig::builder_with_provider(crypto).with_safe_default_protocol_versions();
    Ok(config
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

/// An IPv6 address may be written as in a URL.
pub(super) fn bare(server: &str) -> &str {
    server.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(server)
}

/// What to do about a handshake that failed.
fn cure(error: &io::Error) -> Option<&'static str> {
    let error = error.get_ref()?.downcast_ref()?;
    cure_of(error).or(match error {
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => Some("write in provider.server a name that the certificate has"),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            Some("the server does not speak TLS here: is provider.security right for this port?")
        }
        _ => None,
    })
}

/// The same, as far as it does not depend on the protocol within.
pub(super) fn cure_of(error: &rustls::Error) -> Option<&'static str> {
    match error {
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::UnknownIssuer => Some(
                "its issuer is not known to this system: name the issuer's certificate by provider.ca_file",
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                Some("who runs the server has to renew it, or this system's clock is wrong")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Some("this system's clock may be wrong")
            }
            CertificateError::BadSignature => Some(
                "another authority of the same name has issued it: is provider.ca_file the right one?",
            ),
            CertificateError::Other(_) => Some(
                "a certificate that is its own issuer has to be one for servers (CA:FALSE, with subjectAltName), or be issued by the one in provider.ca_file",
            ),
            _ => None,
        },
        rustls::Error::PeerIncompatible(_) | rustls::Error::AlertReceived(_) => {
            Some("the server has to offer TLS 1.2 or 1.3")
        }
        _ => None,
    }
}
