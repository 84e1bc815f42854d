//! How an application of Microsoft Entra logs in: what is written, what the surroundings say, and that it is one way and
//! a whole one.

use std::path::{Path, PathBuf};

use crate::config::certificates;
use crate::config::keys;
use crate::config::load::{Secrets, Section, Surroundings, Tables, Written};
use crate::config::problem::{Findings, shown};
use crate::config::value::{self, Value};
use crate::config::{App, Cloud, Credential, Format, LargeMessages, Microsoft365, Secret};

/// Where a machine of Azure asks for a token of its own.
const IMDS: &str = "http://169.254.169.254";

/// Not the name of one tenant.
const NO_TENANTS: [&str; 3] = ["common", "organizations", "consumers"];

/// What the environment says; a cluster with workload identity sets the first four.
#[derive(Clone, Debug, Default)]
pub(super) struct Variables {
    /// `AZURE_AUTHORITY_HOST`
    pub(super) authority_host: Option<String>,
    /// `AZURE_TENANT_ID`
    pub(super) tenant_id: Option<String>,
    /// `AZURE_CLIENT_ID`
    pub(super) client_id: Option<String>,
    /// `AZURE_FEDERATED_TOKEN_FILE`
    pub(super) federated_token_file: Option<String>,
    /// `MAILSLUICE_GRAPH_ENDPOINT`
    pub(super) graph_endpoint: Option<String>,
}

impl Variables {
    pub(super) fn of_this_process() -> Self {
        let variable = |name: &str| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty());
            value.map(|value| value.to_string_lossy().into_owned())
        };
        Self {
            authority_host: variable("AZURE_AUTHORITY_HOST"),
            tenant_id: variable("AZURE_TENANT_ID"),
            client_id: variable("AZURE_CLIENT_ID"),
            federated_token_file: variable("AZURE_FEDERATED_TOKEN_FILE"),
            graph_endpoint: variable("MAILSLUICE_GRAPH_ENDPOINT"),
        }
    }
}

/// What a token is for.
#[derive(Clone, Copy)]
pub(super) enum Of {
    Graph,
    /// SMTP AUTH of Exchange Online.
    Smtp,
}

impl Cloud {
    /// Where tokens are fetched.
    pub fn login(self) -> &'static str {
        match self {
            Self::Global => "https://login.microsoftonline.com",
            Self::UsGov | Self::UsGovDod => "https://login.microsoftonline.us",
            Self::China => "https://login.chinacloudapi.cn",
        }
    }

    pub fn graph(self) -> &'static str {
        match self {
            Self::Global => "https://graph.microsoft.com",
            Self::UsGov => "https://graph.microsoft.us",
            Self::UsGovDod => "https://dod-graph.microsoft.us",
            Self::China => "https://microsoftgraph.chinacloudapi.cn",
        }
    }

    /// What Exchange Online is called where a token for it is asked for.
    pub fn outlook(self) -> &'static str {
        match self {
            Self::Global => "https://outlook.office365.com",
            Self::UsGov => "https://outlook.office365.us",
            Self::UsGovDod => "https://outlook-dod.office365.us",
            Self::China => "https://partner.outlook.cn",
        }
    }
}

impl Tables {
    pub(super) fn microsoft365(&self, surroundings: &Surroundings) -> Microsoft365 {
        let provider = &self.provider;
        let text = |name: &str| match provider.value(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        };
        Microsoft365 {
            app: self.app(Of::Graph, surroundings),
            graph: self.graph(surroundings),
            sender: provider.mailbox("sender").expect("the checks want a sender"),
            sender_name: text("sender_name"),
            save_to_sent_items: provider.flag("save_to_sent_items"),
            format: match provider.text("format").as_str() {
                "json" => Format::Json,
                "mime" => Format::Mime,
                _ => Format::Auto,
            },
            large_messages: match provider.text("large_messages").as_str() {
                "on" => LargeMessages::On,
                "off" => LargeMessages::Off,
                _ => LargeMessages::Auto,
            },
            max_recipients: provider.count_or("max_recipients", keys::GRAPH_RECIPIENTS),
            ca_file: match provider.value("ca_file") {
                Some(Value::Path(path)) => Some(path),
                _ => None,
            },
            connect_timeout: provider.duration("connect_timeout"),
            command_timeout: provider.duration("command_timeout"),
            data_timeout: provider.duration("data_timeout"),
            final_timeout: provider.duration("final_timeout"),
        }
    }

    pub(super) fn app(&self, of: Of, surroundings: &Surroundings) -> App {
        let provider = &self.provider;
        let variables = &surroundings.variables;
        let credential = self.credential(variables);
        let id = |name: &str, variable: &Option<String>| match (provider.value(name), &credential) {
            (Some(Value::Text(id)), _) => id,
            (_, Credential::WorkloadIdentity { .. }) => variable.clone().unwrap_or_default(),
            _ => String::new(),
        };
        let root = match of {
            Of::Graph => self.graph(surroundings),
            Of::Smtp => self.cloud().outlook().to_owned(),
        };
        App {
            tenant_id: id("tenant_id", &variables.tenant_id),
            client_id: id("client_id", &variables.client_id),
            login: self.login_endpoint(surroundings),
            scope: format!("{root}/.default"),
            cloud: self.cloud(),
            credential,
        }
    }

    fn credential(&self, variables: &Variables) -> Credential {
        let provider = &self.provider;
        if provider.flag("managed_identity") {
            return Credential::ManagedIdentity;
        }
        if provider.flag("workload_identity") {
            let file = variables.federated_token_file.as_ref();
            return Credential::WorkloadIdentity {
                token_file: file.map(PathBuf::from).unwrap_or_default(),
            };
        }
        if provider.find("certificate").is_some() {
            return Credential::Certificate {
                certificate: provider.path("certificate"),
                private_key: provider.path("private_key"),
            };
        }
        // Whoever only looks may not have read it.
        let secret = provider.secret("client_secret").unwrap_or_else(Secret::unread);
        Credential::Secret { secret, next: provider.secret("next_client_secret") }
    }

    fn cloud(&self) -> Cloud {
        match self.provider.text("cloud").as_str() {
            "us-gov" => Cloud::UsGov,
            "us-gov-dod" => Cloud::UsGovDod,
            "china" => Cloud::China,
            _ => Cloud::Global,
        }
    }

    fn login_endpoint(&self, surroundings: &Surroundings) -> String {
        if !self.endpoints_has("login") && self.provider.flag("managed_identity") {
            return IMDS.to_owned();
        }
        let variable = surroundings.variables.authority_host.as_deref();
        self.endpoint("login", variable, self.cloud().login())
    }

    fn graph(&self, surroundings: &Surroundings) -> String {
        let variable = surroundings.variables.graph_endpoint.as_deref();
        self.endpoint("graph", variable, self.cloud().graph())
    }

    fn endpoints_has(&self, name: &str) -> bool {
        self.endpoints.find(name).is_some()
    }

    /// The key, then the cloud where it is written, then the variable, then the cloud that holds without.
    fn endpoint(&self, name: &str, variable: Option<&str>, of_cloud: &str) -> String {
        let chosen = match (self.endpoints.value(name), variable) {
            (Some(Value::Text(url)), _) => url,
            (_, Some(variable)) if self.provider.find("cloud").is_none() => variable.to_owned(),
            _ => of_cloud.to_owned(),
        };
        chosen.trim_end_matches('/').to_owned()
    }
}

/// What is missing, too much or wrong, where the provider logs in by a token.
pub(super) fn check(file: &Tables, surroundings: &Surroundings, findings: &mut Findings) {
    let provider = &file.provider;
    let is = |name: &str, wanted: &str| {
        provider.value(name).is_some_and(|value| value.plain() == Some(wanted))
    };
    match () {
        () if is("kind", keys::MICROSOFT365) => {}
        () if is("kind", keys::SMTP) && is("auth", "xoauth2") => {}
        () => return,
    }
    let at = provider.at.unwrap_or_default();
    check_whole_pairs(provider, findings);
    let ways = ways(provider);
    for other in ways.iter().skip(1) {
        let first = ways.first().map_or("", |first| first.name.as_str());
        let text = format!("is a second way to log in beside `{first}`; keep one of them");
        findings.wrong(other.at, &provider.named(&other.name), text);
    }
    let way = ways.first().map_or("", |way| way.key.name());
    if way.is_empty() {
        let text = "is missing; write client_secret_file = \"/etc/mailsluice/client-secret\" (mode 0600), or \
                    certificate and private_key, or workload_identity = true, or managed_identity = true";
        findings.missing(at, &provider.named("client_secret"), text.to_owned());
    }
    check_ids(provider, way, surroundings, findings);
    check_secrets(provider, findings);
    if way == "workload_identity" {
        check_token_file(provider, surroundings, findings);
    }
    if surroundings.secrets != Secrets::Leave {
        check_certificate(provider, findings);
    }
    if provider.find("cloud").is_none() {
        let Variables { authority_host, graph_endpoint, .. } = &surroundings.variables;
        for (key, name, variable) in [
            ("login", "AZURE_AUTHORITY_HOST", authority_host),
            ("graph", "MAILSLUICE_GRAPH_ENDPOINT", graph_endpoint),
        ] {
            let Some(url) = variable else { continue };
            if !file.endpoints_has(key) && !value::is_root_url(url) {
                let text = format!("is left to the variable {name}, which {}", value::NO_ROOT_URL);
                findings.wrong(at, &file.endpoints.named(key), text);
            }
        }
    }
}

/// The ways to log in that are written, in the order of the file.
fn ways(provider: &Section) -> Vec<&Written> {
    let is_way = |written: &&Written| match written.key.name() {
        "client_secret" | "certificate" => true,
        "workload_identity" | "managed_identity" => written.value != Some(Value::Flag(false)),
        _ => false,
    };
    let mut ways: Vec<&Written> = provider.written.iter().filter(is_way).collect();
    ways.sort_by_key(|written| written.at);
    ways.dedup_by_key(|written| written.key.path);
    ways
}

/// What is of no use without another.
fn check_whole_pairs(provider: &Section, findings: &mut Findings) {
    let has = |name: &str| provider.written.iter().any(|written| written.key.name() == name);
    for (one, other) in [
        ("certificate", "private_key"),
        ("private_key", "certificate"),
        ("next_client_secret", "client_secret"),
    ] {
        let written = provider.written.iter().find(|written| written.key.name() == one);
        if let Some(written) = written
            && !has(other)
        {
            let text = format!("needs `{other}` beside it");
            findings.missing(written.at, &provider.named(&written.name), text);
        }
    }
}

fn check_ids(provider: &Section, way: &str, surroundings: &Surroundings, findings: &mut Findings) {
    let variables = &surroundings.variables;
    for (name, variable, of, example) in [
        (
            "tenant_id",
            "AZURE_TENANT_ID",
            &variables.tenant_id,
            "\"contoso.onmicrosoft.com\", the tenant's domain or id",
        ),
        (
            "client_id",
            "AZURE_CLIENT_ID",
            &variables.client_id,
            "\"11111111-2222-3333-4444-555555555555\", the application's id",
        ),
    ] {
        let key = provider.named(name);
        let at = provider.at.unwrap_or_default();
        match (provider.find(name), way) {
            (Some(written), _) => {
                let Some(Value::Text(id)) = &written.value else { continue };
                if let Some(why) = no_id(id) {
                    let text = format!("is \"{}\", which {why}; write {example}", shown(id));
                    findings.wrong(written.value_at, &key, text);
                } else if (name, way) == ("tenant_id", "managed_identity") {
                    let text = "has no effect with managed_identity, whose tenant is the machine's; leave it out";
                    findings.wrong(written.at, &key, text.to_owned());
                }
            }
            (None, "managed_identity") => {}
            (None, "workload_identity") => match of.as_deref().map(no_id) {
                Some(None) => {}
                Some(Some(why)) => {
                    let text = format!("is left to the variable {variable}, which {why}");
                    findings.wrong(at, &key, text);
                }
                None => unset(at, &key, variable, surroundings, findings),
            },
            (None, _) => {
                findings.missing(at, &key, format!("is missing; write {name} = {example}"));
            }
        }
    }
}

/// What is wrong with the id of a tenant or an application; it stands in URLs.
fn no_id(id: &str) -> Option<&'static str> {
    let is_safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    match id {
        id if NO_TENANTS.iter().any(|none| id.eq_ignore_ascii_case(none)) => {
            Some("is no single tenant, and an application logs in to one")
        }
        id if !id.bytes().all(is_safe) || id.starts_with('.') || id.len() > 255 => Some("is no id"),
        _ => None,
    }
}

/// Entra shows the id of a secret beside its value, and only the id for ever: it is what gets copied.
fn check_secrets(provider: &Section, findings: &mut Findings) {
    let secrets = ["client_secret", "next_client_secret"];
    for written in provider.written.iter().filter(|it| secrets.contains(&it.key.name())) {
        if let Some(Value::Secret(secret)) = &written.value
            && uuid::Uuid::try_parse(secret.as_str()).is_ok()
        {
            let text =
                "looks like the id of a secret, not its value, which Entra shows once".to_owned();
            findings.warning(written.value_at, &provider.named(&written.name), text);
        }
    }
}

fn check_token_file(provider: &Section, surroundings: &Surroundings, findings: &mut Findings) {
    let written = provider.find("workload_identity");
    let at = written.map_or(0, |written| written.at);
    let key = provider.named("workload_identity");
    match &surroundings.variables.federated_token_file {
        Some(file) if Path::new(file).is_absolute() => {}
        Some(file) => {
            let text = format!(
                "reads the file that the variable AZURE_FEDERATED_TOKEN_FILE names, and \"{}\" is no absolute path",
                shown(file)
            );
            findings.wrong(at, &key, text);
        }
        None => unset(at, &key, "AZURE_FEDERATED_TOKEN_FILE", surroundings, findings),
    }
}

/// A variable that the gateway needs. Who only looks may run elsewhere.
fn unset(
    at: usize,
    key: &str,
    variable: &str,
    surroundings: &Surroundings,
    findings: &mut Findings,
) {
    let text = format!(
        "needs the variable {variable}, which has no value here: a cluster with workload identity sets it in pods \
         that have the label azure.workload.identity/use"
    );
    match surroundings.secrets {
        Secrets::Read => findings.missing(at, key, text),
        Secrets::Look => findings.warning(at, key, text),
        Secrets::Leave => {}
    }
}

fn check_certificate(provider: &Section, findings: &mut Findings) {
    let (Some(Value::Path(certificate)), Some(Value::Path(private_key))) =
        (provider.value("certificate"), provider.value("private_key"))
    else {
        return;
    };
    let Err((name, why)) = certificates::pair(&certificate, &private_key) else { return };
    let path = match name {
        "certificate" => certificate,
        _ => private_key,
    };
    let at = provider.find(name).map_or(0, |written| written.value_at);
    let text = format!("is \"{}\", which {why}", path.display());
    findings.wrong(at, &provider.named(name), text);
}
