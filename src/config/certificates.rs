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

/// When a certificate ends, in milliseconds since 1970; none where it cannot be read.
pub fn not_after(certificate: &[u8]) -> Option<u64> {
    let (_, certificate, _) = element(certificate)?;
    let (_, mut rest, _) = element(certificate)?;
    // Version (where it is there), serial number, algorithm, issuer; then the validity (RFC 5280 4.1).
    loop {
        let (tag, content, after) = element(rest)?;
        rest = after;
        let is_validity = tag == SEQUENCE
            && element(content).is_some_and(|(tag, ..)| matches!(tag, UTC_TIME | GENERALIZED_TIME));
        if is_validity {
            let (_, _, not_after) = element(content)?;
            let (tag, time, _) = element(not_after)?;
            return time_of(tag, time);
        }
    }
}

const SEQUENCE: u8 = 0x30;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// One element of DER: its tag, its content, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        long => {
            let octets = usize::from(long & 0x7f);
            let (octets, rest) = rest.split_at_checked(octets).filter(|_| octets <= 3)?;
            (octets.iter().fold(0, |length, octet| length << 8 | usize::from(*octet)), rest)
        }
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((*tag, content, after))
}

/// `261124064211Z`, with two or four digits of the year.
fn time_of(tag: u8, time: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(time).ok()?.strip_suffix('Z')?;
    let (year, rest) = text.split_at_checked(if tag == UTC_TIME { 2 } else { 4 })?;
    let year: u64 = year.parse().ok()?;
    let year = match tag {
        UTC_TIME if year < 50 => 2000 + year,
        UTC_TIME => 1900 + year,
        _ => year,
    };
    let two = |at: usize| rest.get(at..at + 2)?.parse::<u64>().ok();
    let (month, day) = (two(0)?, two(2)?);
    let seconds = two(4)? * 3600 + two(6)? * 60 + two(8)?;
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Counted in years from March, so that the day of a leap year is the last of its year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days.checked_sub(719_468)? * 86_400 + seconds) * 1000)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_read() {
        for (year, month, day, expected) in [
            (1999, 12, 31, 946_598_400_000),
            (2026, 11, 24, 1_795_478_400_000),
            (2000, 2, 29, 951_782_400_000),
            (2049, 12, 31, 2_524_521_600_000),
            (2100, 3, 1, 4_107_542_400_000),
        ] {
            let mut params = rcgen::CertificateParams::new(vec!["x.example".to_owned()]).unwrap();
            params.not_before = rcgen::date_time_ymd(1980, 1, 1);
            params.not_after = rcgen::date_time_ymd(year, month, day);
            let key = rcgen::KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap();
            assert_eq!(not_after(certificate.der()), Some(expected), "{year}");
            for cut in 0..certificate.der().len() {
                let end = not_after(&certificate.der()[..cut]);
                assert!(end.is_none(), "{cut}");
            }
        }
        for hostile in
            [&b""[..], b"\x30", b"\x30\x84\xff\xff\xff\xff", b"\x30\x80\0\0", &[0xff; 99]]
        {
            assert_eq!(not_after(hostile), None);
        }
    }
}
