//! A login by certificate: the JWT that an app signs (RFC 7523), checked as strictly as the login does.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;
use ring::signature::{RSA_PSS_2048_8192_SHA256, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

use super::settings::App;

/// Clocks may differ by so many seconds.
const SKEW: u64 = 300;
const LONGEST: u64 = 24 * 3_600;

/// Whether the app signed it for this login: its `jti`, else the AADSTS number and the words.
pub(super) fn check(
    jwt: &str,
    app: &App,
    audience: &str,
    now: u64,
) -> Result<String, (u32, String)> {
    let invalid = |words: &str| (50_013, format!("Assertion failed: {words}."));
    let parts: Vec<&str> = jwt.split('.').collect();
    let [header, payload, signature] = parts.as_slice() else {
        return Err((50_027, "JWT token is invalid or malformed.".to_owned()));
    };
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).ok();
    let json = |part: &str| {
        let json: Option<Value> = serde_json::from_slice(&decode(part)?).ok();
        json
    };
    let malformed = || (50_027, "JWT token is invalid or malformed.".to_owned());
    let head = json(header).ok_or_else(malformed)?;
    let claims = json(payload).ok_or_else(malformed)?;
    let signature = decode(signature).ok_or_else(malformed)?;
    let text = |json: &Value, key: &str| {
        json.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };

    if text(&head, "alg") != "PS256" || text(&head, "typ") != "JWT" {
        return Err(invalid("it is to be a JWT of alg PS256"));
    }
    let print = text(&head, "x5t#S256");
    let certificate = app
        .certificates
        .iter()
        .filter_map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).ok())
        .find(|der| URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, der)) == print)
        .ok_or_else(|| {
            let words = format!("Client assertion contains an invalid signature. [Reason - The key was not found., Thumbprint of key used by client: '{print}'].");
            (700_027, words)
        })?;
    let signed = jwt.rsplit_once('.').map_or("", |(signed, _)| signed);
    let key = public_key(&certificate).ok_or_else(|| invalid("its certificate is unreadable"))?;
    UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA256, key)
        .verify(signed.as_bytes(), &signature)
        .map_err(|_unspecified| {
            let words = "Client assertion contains an invalid signature. [Reason - The key was found, but the signature does not fit.].";
            (700_027, words.to_owned())
        })?;

    if text(&claims, "aud") != audience {
        return Err(invalid(&format!("its audience is not {audience}")));
    }
    if text(&claims, "iss") != app.client_id || text(&claims, "sub") != app.client_id {
        return Err(invalid("its issuer and subject are to be the client"));
    }
    let number = |key: &str| claims.get(key).and_then(Value::as_u64);
    let (Some(begin), Some(end)) = (number("nbf"), number("exp")) else {
        return Err(invalid("it has no nbf or exp"));
    };
    if now + SKEW < begin || now >= end + SKEW || end > begin + LONGEST {
        let words = format!(
            "Client assertion is not within its valid time range. Current time: {now}, assertion valid from {begin}, expiry time of assertion {end}."
        );
        return Err((700_024, words));
    }
    let jti = text(&claims, "jti");
    if jti.is_empty() { Err(invalid("it has no jti")) } else { Ok(jti) }
}

/// The RSA key of a certificate (RFC 5280 4.1), as ring takes it.
fn public_key(certificate: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    let (SEQUENCE, certificate, _) = element(certificate)? else { return None };
    let (SEQUENCE, mut rest, _) = element(certificate)? else { return None };
    // The version, where it is written, then number, algorithm, issuer, validity, subject.
    let version = rest.first() == Some(&0xA0);
    for _ in 0..(if version { 6 } else { 5 }) {
        (_, _, rest) = element(rest)?;
    }
    let (SEQUENCE, info, _) = element(rest)? else { return None };
    let (_, _, rest) = element(info)?;
    let (0x03, bits, _) = element(rest)? else { return None };
    // The number of unused bits stands before.
    bits.strip_prefix(&[0])
}

/// Tag, content and what follows of a DER element.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = if *length < 0x80 {
        (usize::from(*length), rest)
    } else {
        let (octets, rest) = rest.split_at_checked(usize::from(*length & 0x7F))?;
        if octets.len() > 4 {
            return None;
        }
        let length = octets.iter().fold(0, |length, octet| length << 8 | usize::from(*octet));
        (length, rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((*tag, content, rest))
}
