//! What a certificate signs in place of a secret (RFC 7523, as Microsoft Entra wants it).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::RSA_PSS_SHA256;
use serde_json::json;

use crate::config::Pair;
use crate::envelope::UnixMillis;

/// How long it may be used, in seconds.
const LIFE: u64 = 600;

/// The signed JWT that shows `client_id` to the server at `audience`, the URL of its tokens. Fails where there is no
/// randomness.
pub(super) fn assertion(
    pair: &Pair,
    client_id: &str,
    audience: &str,
    now: UnixMillis,
) -> Result<String, &'static str> {
    let random = SystemRandom::new();
    let no_randomness = |_none| "the system gave no random numbers";
    let mut id = [0; 16];
    random.fill(&mut id).map_err(no_randomness)?;
    let seconds = now.0 / 1000;
    let header = json!({
        "alg": "PS256",
        "typ": "JWT",
        "x5t#S256": URL_SAFE_NO_PAD.encode(digest(&SHA256, &pair.certificate)),
    });
    let claims = json!({
        "aud": audience,
        "iss": client_id,
        "sub": client_id,
        "jti": uuid::Builder::from_random_bytes(id).into_uuid().to_string(),
        "nbf": seconds,
        "iat": seconds,
        "exp": seconds.saturating_add(LIFE),
    });
    let encode = |json: serde_json::Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let signed = format!("{}.{}", encode(header), encode(claims));
    let mut signature = vec![0; pair.key.public().modulus_len()];
    let made = pair.key.sign(&RSA_PSS_SHA256, &random, signed.as_bytes(), &mut signature);
    made.map_err(no_randomness)?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}
