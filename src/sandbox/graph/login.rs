//! The token endpoint of the login, and the metadata service of an Azure machine.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::clock;

use super::answer::{Answer, guid};
use super::assertion;
use super::settings::{App, Settings};

/// Tokens and assertions that are remembered.
const MAX_KEPT: usize = 10_000;

/// Resources for which tokens are given, besides the simulator's own root.
const RESOURCES: [&str; 5] = [
    "https://graph.microsoft.com",
    "https://graph.microsoft.us",
    "https://dod-graph.microsoft.us",
    "https://microsoftgraph.chinacloudapi.cn",
    "https://outlook.office365.com",
];

/// A token that was given.
#[derive(Clone, Debug)]
pub(super) struct Given {
    pub(super) number: u64,
    pub(super) tenant: String,
    pub(super) client_id: String,
    /// For which resource.
    pub(super) audience: String,
    pub(super) expires: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Tokens {
    next: u64,
    given: HashMap<String, Given>,
    order: VecDeque<String>,
    /// The `jti` of the assertions that were taken.
    assertions: VecDeque<String>,
}

impl Tokens {
    pub(super) fn find(&self, token: &str) -> Option<&Given> {
        self.given.get(token)
    }

    /// All that were given are worth nothing from now on.
    pub(super) fn revoke(&mut self) {
        self.given.clear();
        self.order.clear();
    }

    fn give(&mut self, app: &App, audience: &str, lifetime: u64) -> String {
        self.next += 1;
        let seconds = clock::wall().0 / 1000;
        let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
        let header = json!({ "typ": "JWT", "alg": "RS256", "kid": "sandbox" });
        let mut payload = json!({
            "aud": audience,
            "iss": format!("https://sts.windows.net/{}/", app.tenant),
            "iat": seconds,
            "nbf": seconds,
            "exp": seconds + lifetime,
            "app_displayname": "sandbox",
            "appid": app.client_id,
            "idtyp": "app",
            "tid": app.tenant,
            "uti": guid(),
            "ver": "1.0",
        });
        // An app without rights is given a token that shows none.
        if let Some(map) = payload.as_object_mut().filter(|_| !app.roles.is_empty()) {
            map.insert("roles".to_owned(), app.roles.clone().into());
        }
        // Nobody but the simulator reads it, and it knows what it gave.
        let signature = URL_SAFE_NO_PAD.encode(guid());
        let token = format!("{}.{}.{signature}", part(&header), part(&payload));
        let given = Given {
            number: self.next,
            tenant: app.tenant.clone(),
            client_id: app.client_id.clone(),
            audience: audience.to_owned(),
            expires: clock::now() + Duration::from_secs(lifetime),
        };
        self.given.insert(token.clone(), given);
        self.order.push_back(token.clone());
        if self.order.len() > MAX_KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.given.remove(&oldest);
        }
        token
    }

    /// Whether an assertion comes for the first time.
    fn is_new(&mut self, jti: &str) -> bool {
        if self.assertions.iter().any(|it| it == jti) {
            return false;
        }
        self.assertions.push_back(jti.to_owned());
        if self.assertions.len() > MAX_KEPT {
            self.assertions.pop_front();
        }
        true
    }
}

/// An error of the login, by its AADSTS number.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Denied {
    status: u16,
    error: &'static str,
    number: u32,
    words: String,
}

impl Denied {
    pub(super) fn new(
        status: u16,
        error: &'static str,
        number: u32,
        words: impl Into<String>,
    ) -> Self {
        Self { status, error, number, words: words.into() }
    }

    fn client(number: u32, words: impl Into<String>) -> Self {
        Self::new(401, "invalid_client", number, words)
    }

    fn answer(&self) -> Answer {
        let (trace, correlation) = (guid(), guid());
        let time = clock::Time(clock::wall()).to_string().replace('T', " ");
        let description = format!(
            "AADSTS{}: {} Trace ID: {trace} Correlation ID: {correlation} Timestamp: {time}",
            self.number, self.words
        );
        let body = json!({
            "error": self.error,
            "error_description": description,
            "error_codes": [self.number],
            "timestamp": time,
            "trace_id": trace,
            "correlation_id": correlation,
            "error_uri": format!("https://login.microsoftonline.com/error?code={}", self.number),
        });
        Answer::json(self.status, &body).with("cache-control", "no-store, no-cache")
    }
}

/// A request for a token.
pub(super) struct Asking<'a> {
    /// As the URL names it.
    pub(super) tenant: &'a str,
    pub(super) content_type: &'a str,
    /// Of the header `Authorization`.
    pub(super) authorization: Option<&'a str>,
    pub(super) body: &'a [u8],
    /// The root of the simulator, for login and Graph alike.
    pub(super) root: &'a str,
}

/// `POST /{tenant}/oauth2/v2.0/token`, the grant of client credentials (RFC 6749 4.4).
pub(super) fn token(settings: &Settings, tokens: &mut Tokens, asking: &Asking<'_>) -> Answer {
    match grant(settings, tokens, asking) {
        Ok(body) => Answer::json(200, &body).with("cache-control", "no-store, no-cache"),
        Err(denied) => denied.answer(),
    }
}

fn grant(settings: &Settings, tokens: &mut Tokens, asking: &Asking<'_>) -> Result<Value, Denied> {
    let request = |number, words: &str| Denied::new(400, "invalid_request", number, words);
    let form = form(asking)?;
    let field = |name: &str| form.get(name).map(String::as_str);
    match field("grant_type") {
        None => {
            let words = "The request body must contain the following parameter: 'grant_type'.";
            return Err(request(900_144, words));
        }
        Some("client_credentials") => {}
        Some(other) => {
            let words = format!("The app requested an unsupported grant type '{other}'.");
            return Err(Denied::new(400, "unsupported_grant_type", 70_003, words));
        }
    }
    let tenant = asking.tenant;
    if ["common", "organizations", "consumers"].contains(&tenant.to_ascii_lowercase().as_str()) {
        return Err(request(
            9_001_023,
            "The grant type is not supported over the /common or /consumers endpoints. Please use the /organizations or tenant-specific endpoint.",
        ));
    }
    if !settings.apps.iter().any(|app| app.is_in(tenant)) {
        let words = format!(
            "Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud."
        );
        return Err(request(90_002, &words));
    }
    let (basic_id, basic_secret) = basic(asking.authorization).unzip();
    let client_id = field("client_id").or(basic_id.as_deref()).ok_or_else(|| {
        request(900_144, "The request body must contain the following parameter: 'client_id'.")
    })?;
    let named = |app: &&App| app.is_in(tenant) && app.client_id.eq_ignore_ascii_case(client_id);
    let app = settings.apps.iter().find(named).ok_or_else(|| {
        let words = format!(
            "Application with identifier '{client_id}' was not found in the directory '{tenant}'."
        );
        Denied::new(400, "unauthorized_client", 700_016, words)
    })?;
    if !app.enabled {
        let words = format!("Application '{client_id}' is disabled.");
        return Err(Denied::new(400, "unauthorized_client", 7_000_112, words));
    }
    let audience = audience(field("scope"), asking.root)?;
    match (field("client_secret").or(basic_secret.as_deref()), field("client_assertion")) {
        (Some(secret), None) => check_secret(app, secret)?,
        (None, Some(jwt)) => {
            let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
            if field("client_assertion_type") != Some(kind) {
                return Err(request(
                    900_144,
                    "The request body must contain the following parameter: 'client_assertion_type'.",
                ));
            }
            check_assertion(app, jwt, asking, tokens)?;
        }
        (Some(_), Some(_)) => {
            return Err(request(90_023, "Only one client credential may be presented."));
        }
        (None, None) => {
            return Err(Denied::client(
                7_000_218,
                "The request body must contain the following parameter: 'client_assertion' or 'client_secret'.",
            ));
        }
    }
    let lifetime = settings.token_lifetime;
    let mut answer = json!({
        "token_type": "Bearer",
        "expires_in": lifetime,
        "ext_expires_in": lifetime,
        "access_token": tokens.give(app, &audience, lifetime),
    });
    if let (Some(seconds), Some(map)) = (settings.refresh_in, answer.as_object_mut()) {
        map.insert("refresh_in".to_owned(), seconds.into());
    }
    Ok(answer)
}

fn form(asking: &Asking<'_>) -> Result<BTreeMap<String, String>, Denied> {
    let form = "application/x-www-form-urlencoded";
    let kind = asking.content_type.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case(form) {
        let words = "The request body must contain the following parameter: 'grant_type'.";
        return Err(Denied::new(400, "invalid_request", 900_144, words));
    }
    let mut fields = BTreeMap::new();
    for (name, value) in oauth2::url::form_urlencoded::parse(asking.body) {
        if fields.insert(name.clone().into_owned(), value.into_owned()).is_some() {
            let words = format!("The parameter '{name}' is duplicated.");
            return Err(Denied::new(400, "invalid_request", 9_000_411, words));
        }
    }
    Ok(fields)
}

/// Client and secret from `Basic`, each form-encoded before (RFC 6749 2.3.1).
fn basic(authorization: Option<&str>) -> Option<(String, String)> {
    let (scheme, value) = authorization?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(value).ok()?).ok()?;
    let (id, secret) = text.split_once(':')?;
    Some((decoded(id), decoded(secret)))
}

fn decoded(text: &str) -> String {
    let name = oauth2::url::form_urlencoded::parse(text.as_bytes()).next();
    name.map(|(name, _)| name.into_owned()).unwrap_or_default()
}

/// The one resource that a scope names.
fn audience(scope: Option<&str>, root: &str) -> Result<String, Denied> {
    let invalid = |number, words: String| Denied::new(400, "invalid_scope", number, words);
    let text = scope.unwrap_or_default();
    let scopes: Vec<&str> = text.split_ascii_whitespace().collect();
    let [scope] = scopes.as_slice() else {
        if scopes.is_empty() {
            let words = "The request body must contain the following parameter: 'scope'.";
            return Err(Denied::new(400, "invalid_request", 900_144, words));
        }
        let words = format!(
            "The provided value for the input parameter 'scope' is not valid because it contains more than one resource. Scope {text} is not valid."
        );
        return Err(invalid(70_011, words));
    };
    let resource = scope.strip_suffix("/.default").ok_or_else(|| {
        let words = format!("The provided value for scope {scope} is not valid. Client credential flows must have a scope value with /.default suffixed to the resource identifier (application ID URI).");
        invalid(1_002_012, words)
    })?;
    known(resource, root).ok_or_else(|| {
        let words = format!("The resource principal named {resource} was not found in the tenant.");
        Denied::new(400, "invalid_resource", 500_011, words)
    })
}

fn known(resource: &str, root: &str) -> Option<String> {
    let resource = resource.trim_end_matches('/');
    (resource == root || RESOURCES.contains(&resource)).then(|| resource.to_owned())
}

fn check_secret(app: &App, secret: &str) -> Result<(), Denied> {
    if app.secrets.iter().any(|it| it == secret) {
        return Ok(());
    }
    let client = &app.client_id;
    if app.expired_secrets.iter().any(|it| it == secret) {
        let words = format!(
            "The provided client secret keys for app '{client}' are expired. Visit the Azure portal to create new keys for your app."
        );
        return Err(Denied::client(7_000_222, words));
    }
    let words = format!(
        "Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID, for a secret added to app '{client}'."
    );
    Err(Denied::client(7_000_215, words))
}

fn check_assertion(
    app: &App,
    jwt: &str,
    asking: &Asking<'_>,
    tokens: &mut Tokens,
) -> Result<(), Denied> {
    // Of another issuer, and taken as it is.
    if app.federated.iter().any(|it| it.trim() == jwt) {
        return Ok(());
    }
    let url = format!("{}/{}/oauth2/v2.0/token", asking.root, asking.tenant);
    let seconds = clock::wall().0 / 1000;
    let jti = assertion::check(jwt, app, &url, seconds)
        .map_err(|(number, words)| Denied::client(number, words))?;
    if tokens.is_new(&jti) {
        return Ok(());
    }
    Err(Denied::client(50_013, "Assertion failed: its jti was presented before."))
}

/// `GET /metadata/identity/oauth2/token`, as the metadata service of a machine with an identity answers.
pub(super) fn machine(
    settings: &Settings,
    tokens: &mut Tokens,
    query: &str,
    headers: &BTreeMap<String, String>,
    root: &str,
) -> Answer {
    let refuse = |error: &str, words: &str| {
        Answer::json(400, &json!({ "error": error, "error_description": words }))
    };
    if headers.get("metadata").map(String::as_str) != Some("true") {
        return refuse("invalid_request", "Required metadata header not specified");
    }
    if headers.contains_key("x-forwarded-for") {
        return refuse("invalid_request", "The request came through a proxy");
    }
    let query: BTreeMap<String, String> =
        oauth2::url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    if query.get("api-version").map(String::as_str) != Some("2018-02-01") {
        return refuse(
            "invalid_request",
            "Required query variable 'api-version' is missing or unknown",
        );
    }
    let resource = query.get("resource").map(String::as_str).unwrap_or_default();
    let Some(audience) = known(resource, root) else {
        let words = format!(
            "AADSTS500011: The resource principal named {resource} was not found in the tenant."
        );
        return refuse("invalid_resource", &words);
    };
    let wanted = query.get("client_id");
    let mut identities = settings.apps.iter().filter(|app| app.managed_identity);
    let found = identities
        .find(|app| wanted.is_none_or(|client| app.client_id.eq_ignore_ascii_case(client)));
    let Some(app) = found else { return refuse("invalid_request", "Identity not found") };
    let lifetime = settings.token_lifetime;
    let seconds = clock::wall().0 / 1000;
    // Numbers come as texts here.
    let body = json!({
        "access_token": tokens.give(app, &audience, lifetime),
        "client_id": app.client_id,
        "expires_in": lifetime.to_string(),
        "expires_on": (seconds + lifetime).to_string(),
        "ext_expires_in": lifetime.to_string(),
        "not_before": seconds.to_string(),
        "resource": resource,
        "token_type": "Bearer",
    });
    Answer::json(200, &body)
}
