//! Certificates in files.

use std::fmt::Display;
use std::path::Path;

use ring::signature::{KeyPair as _, RsaKeyPair};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use zeroize::Zeroize as _;

use crate::config::secret;

/// The root certificates in a PEM file: at least one. `Err` says what is wrong with it.
pub fn roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let failed = |error: &dyn Display| format!("cannot be read: {error}");
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| failed(&error))?;
    let certificates: Vec<_> =
        certificates.collect::<Result<_, _>>().map_err(|error| failed(&error))?;
    let mut store = RootCertStore::empty();
    for certificate in &certificates {
        let added = store.add(certificate.clone());
        added.map_err(|error| format!("has what is no certificate: {error}"))?;
    }
    match certificates.is_empty() {
        true => Err("has no certificate in PEM".to_owned()),
        false => Ok(certificates),
    }
}

/// A certificate and its key.
pub struct Pair {
    pub certificate: CertificateDer<'static>,
    pub key: RsaKeyPair,
}

/// Reads a certificate and its RSA key, both in PEM; they may stand in one file. `Err` names the one that is wrong
/// (`certificate` or `private_key`) and says how.
pub fn pair(certificate: &Path, private_key: &Path) -> Result<Pair, (&'static str, String)> {
    let der = leaf(certificate).map_err(|why| ("certificate", why))?;
    let key = rsa_key(private_key).map_err(|why| ("private_key", why))?;
    let parsed = ParsedCertificate::try_from(&der);
    let parsed =
        parsed.map_err(|error| ("certificate", format!("has what is no certificate: {error}")))?;
    // The public key of the one holds that of the other.
    let (info, own) = (parsed.subject_public_key_info(), key.public_key().as_ref());
    match info.windows(own.len()).any(|part| part == own) {
        true => Ok(Pair { certificate: der, key }),
        false => Err(("private_key", "is not the key of the certificate".to_owned())),
    }
}

/// The first certificate of a file.
fn leaf(path: &Path) -> Result<CertificateDer<'static>, String> {
    let failed = |error: &dyn Display| format!("cannot be read: {error}");
    let mut certificates = CertificateDer::pem_file_iter(path).map_err(|error| failed(&error))?;
    match certificates.next() {
        Some(first) => first.map_err(|error| failed(&error)),
        None => Err("has no certificate in PEM".to_owned()),
    }
}

fn rsa_key(path: &Path) -> Result<RsaKeyPair, String> {
    let text = secret::private_text(path)?;
    if text.contains("ENCRYPTED") {
        return Err("is encrypted: write the key without a passphrase (openssl rsa)".to_owned());
    }
    let mut key = PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|_no_pem| "has no private key in PEM".to_owned())?;
    let pair = match &key {
        PrivateKeyDer::Pkcs1(der) => RsaKeyPair::from_der(der.secret_pkcs1_der()).ok(),
        PrivateKeyDer::Pkcs8(der) => RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).ok(),
        _ => None,
    };
    key.zeroize();
    pair.ok_or_else(|| "is no RSA key of 2048 to 4096 bits".to_owned())
}
