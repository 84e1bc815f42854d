//! Certificates in files.

use std::fmt::Display;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

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
