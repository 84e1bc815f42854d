//! What a token shows of itself. It is not verified: it is for the remote, and only tells us what to expect.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

/// The most that is looked at, in octets of the token.
const MAX: usize = 64 * 1024;
/// The most roles that are kept, and octets of each.
const MAX_ROLES: usize = 100;
const MAX_ROLE: usize = 200;

/// What the application may do by consent in Entra. What it may by RBAC of Exchange shows in no token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roles(Vec<String>);

impl Roles {
    /// Such as `Mail.Send`.
    pub fn has(&self, role: &str) -> bool {
        self.0.iter().any(|own| own == role)
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// The claim `roles` of a JWT (RFC 7519), where this is one.
pub(super) fn roles(token: &str) -> Option<Roles> {
    let payload = token.get(..MAX.min(token.len()))?.split('.').nth(1)?;
    let json = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    let claims: Value = serde_json::from_slice(&json).ok()?;
    let roles = claims.get("roles")?.as_array()?.iter().filter_map(Value::as_str);
    let fit = roles.filter(|role| role.len() <= MAX_ROLE && !role.contains(char::is_control));
    Some(Roles(fit.take(MAX_ROLES).map(str::to_owned).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_from_what_is_a_jwt() {
        let token = |payload: &str| format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(payload));
        let check = |token: &str, expected: Option<&[&str]>| {
            let found = roles(token);
            let found = found.as_ref().map(|roles| roles.iter().collect::<Vec<_>>());
            assert_eq!(found.as_deref(), expected, "{token}");
        };
        check(
            &token(r#"{"roles":["Mail.Send","Mail.ReadWrite"]}"#),
            Some(&["Mail.Send", "Mail.ReadWrite"]),
        );
        check(&token(r#"{"roles":[]}"#), Some(&[]));
        check(&token(r#"{"roles":[7,null,"a\nb","Mail.Send"]}"#), Some(&["Mail.Send"]));
        check(&token(r#"{"roles":"Mail.Send"}"#), None);
        check(&token(r#"{"scp":"Mail.Send"}"#), None);
        check(&token("[]"), None);
        check(&token(&"[".repeat(10_000)), None);
        check("opaque", None);
        check("..", None);
        check("", None);
        check(&"é".repeat(40_000), None);
        assert!(roles(&token(r#"{"roles":["Mail.Send"]}"#)).unwrap().has("Mail.Send"));
    }
}
