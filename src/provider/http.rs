//! HTTP towards the provider: one client, with the TLS of [`super::tls`], for tokens and mail.

use std::error::Error;
use std::io;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use reqwest::{Client, ClientBuilder, NoProxy, Proxy, Response, redirect, retry};

use crate::envelope::UnixMillis;

use super::tls;

/// Where the system's way out stands, the first that is set.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(60);

/// The one client. It follows no redirect, keeps no cookie, repeats nothing by itself, and goes by HTTPS_PROXY and
/// NO_PROXY. What goes by plain http (to loopback only) goes by no proxy: it would show secrets to it. Each request
/// brings its own deadline.
pub fn client(ca_file: Option<&Path>, connect_timeout: Duration) -> io::Result<Client> {
    let mut config = tls::client_config(ca_file)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let mut builder = plain(connect_timeout).tls_backend_preconfigured(config);
    if let Some((name, url)) = proxy_url() {
        // Its own words may have the proxy's password in them.
        let proxy = Proxy::https(&url).map_err(|_unfit| {
            io::Error::other(format!("the variable {name} is not the URL of a proxy"))
        })?;
        builder = builder.proxy(proxy.no_proxy(NoProxy::from_env()));
    }
    builder.build().map_err(|error| io::Error::other(words(error)))
}

/// For what is on this machine or next to it, by plain http and past every proxy.
pub(super) fn near(connect_timeout: Duration) -> io::Result<Client> {
    let crypto = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(crypto)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let builder = plain(connect_timeout).tls_backend_preconfigured(config);
    builder.build().map_err(|error| io::Error::other(words(error)))
}

fn plain(connect_timeout: Duration) -> ClientBuilder {
    Client::builder()
        .user_agent(concat!("mailsluice/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(connect_timeout)
        .pool_idle_timeout(IDLE)
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .no_proxy()
}

fn proxy_url() -> Option<(&'static str, String)> {
    let set = |name: &&str| std::env::var(name).ok().filter(|value| !value.is_empty());
    PROXY_VARIABLES.iter().find_map(|name| Some((*name, set(name)?)))
}

/// What went wrong, to its root, with the cure where it is one of TLS; without the URL, which may be a secret.
pub fn words(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut words = error.to_string();
    let mut cause = error.source();
    let mut cure = None;
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.ends_with(&text) {
            words = format!("{words}: {text}");
        }
        cure = cure.or(of_tls(error).and_then(tls::cure_of));
        cause = error.source();
    }
    match cure {
        Some(cure) => format!("{words}; {cure}"),
        None => words,
    }
}

/// The error of TLS in this one. Those of input and output hold theirs where `source` passes over it.
fn of_tls<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e rustls::Error> {
    match error.downcast_ref::<io::Error>() {
        Some(outer) => of_tls(outer.get_ref()?),
        None => error.downcast_ref(),
    }
}

/// The body of an answer, at most `max` octets of it; whether there was more is not told.
pub async fn body(mut response: Response, max: usize) -> Result<Vec<u8>, reqwest::Error> {
    let mut body = Vec::new();
    while body.len() < max
        && let Some(chunk) = response.chunk().await?
    {
        let room = max - body.len();
        body.extend_from_slice(chunk.get(..room).unwrap_or(&chunk));
    }
    Ok(body)
}

/// What a Retry-After asks for: seconds, with a fraction or without, or a date (RFC 9110 10.2.3). A date in the past is
/// no wait.
pub fn retry_after(value: &str, now: UnixMillis) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    date(value).map(|at| at.since(now))
}

/// A date as HTTP writes it.
pub fn date(value: &str) -> Option<UnixMillis> {
    let since_epoch = httpdate::parse_http_date(value).ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since_epoch.as_millis()).ok().map(UnixMillis)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Arc;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::pki_types::PrivateKeyDer;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;
    use tokio_util::task::{AbortOnDropHandle, TaskTracker};

    use super::*;

    /// No wait of a test is longer.
    const LONG: Duration = Duration::from_secs(20);

    /// Answers everything over TLS with these lines: its URL, and the file with its root.
    async fn secured(
        folder: &Path,
        answer: &'static str,
    ) -> (String, std::path::PathBuf, AbortOnDropHandle<()>) {
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        let root = ca.self_signed(&ca_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(["localhost".to_owned()]).unwrap();
        let own = own.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
        let root_file = folder.join("root.pem");
        std::fs::write(&root_file, root.pem()).unwrap();
        let crypto = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(crypto)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![own.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let runs = TaskTracker::new().spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut asked = [0; 1024];
                drop(stream.read(&mut asked).await);
                drop(stream.write_all(answer.as_bytes()).await);
                drop(stream.shutdown().await);
            }
        });
        (url, root_file, AbortOnDropHandle::new(runs))
    }

    #[tokio::test]
    async fn a_private_root_is_trusted_where_it_is_named_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello";
        let (url, root, _runs) = secured(folder.path(), answer).await;
        let get = async |client: Client| {
            let response = client.get(&url).timeout(LONG).send().await.map_err(words)?;
            body(response, 4).await.map_err(words)
        };
        assert_eq!(get(client(Some(&root), LONG).unwrap()).await.unwrap(), b"hell");
        let said = get(client(None, LONG).unwrap()).await.unwrap_err();
        assert!(said.contains("UnknownIssuer"), "{said}");
        assert!(said.contains("; its issuer is not known to this system"), "{said}");
        assert!(!said.contains(&url), "a URL may be a secret: {said}");
        assert!(client(Some(Path::new("/nowhere.pem")), LONG).is_err());
    }

    #[tokio::test]
    async fn a_redirect_is_an_answer_like_another() {
        let folder = tempfile::tempdir().unwrap();
        let answer = "HTTP/1.1 307 x\r\nlocation: https://localhost:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let (url, root, _runs) = secured(folder.path(), answer).await;
        let client = client(Some(&root), LONG).unwrap();
        let response = client.post(&url).timeout(LONG).body("secret").send().await.unwrap();
        assert_eq!(response.status(), 307);
    }

    #[test]
    fn a_wait_is_read_in_each_of_its_forms() {
        let now = UnixMillis(784_111_777_000);
        let check = |value: &str, expected: Option<u64>| {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(retry_after(value, now), expected, "{value}");
        };
        check("120", Some(120_000));
        check(" 2.128 ", Some(2_128));
        check("0", Some(0));
        check("Sun, 06 Nov 1994 08:50:07 GMT", Some(30_000));
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(0));
        check("Tue, 06 Nov 1984 08:49:37 GMT", Some(0));
        check("-1", None);
        check("NaN", None);
        check("inf", None);
        check("1e300", None);
        check("soon", None);
        check("", None);
    }
}
