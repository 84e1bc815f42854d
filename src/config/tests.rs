use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::keys::{self, Available, Unwritten, keys, reference};
use crate::config::load::{Surroundings, load, parse_bytes, parse_in};
use crate::config::oauth::Variables;
use crate::config::{
    App, Bind, Config, Credential, Format, InDoubt, LargeMessages, LogFormat, LogLevel,
    Microsoft365, OnMail, Problem, Problems, Proof, Provider, Rate, Secrets, SenderPolicy, value,
};
use crate::smtp::data::BareNewline;

/// Hardly anything.
const LEAST: &str = "[sender]\npolicy = \"preserve\"\n";

const UPSTREAM: &str = "[sender]\npolicy = \"preserve\"\n[provider]\nkind = \"smtp\"\n\
                        server = \"127.0.0.1\"\nsecurity = \"none\"\nauth = \"none\"\n";

fn surroundings() -> Surroundings {
    Surroundings {
        hostname: "box.example.net".to_owned(),
        mode: None,
        secrets: Secrets::Read,
        variables: Variables::default(),
    }
}

#[track_caller]
fn taken(text: &str) -> Config {
    match parse_in(text, "config.toml", &surroundings()) {
        Ok(loaded) => loaded.config,
        Err(problems) => panic!("{text}\n{problems}"),
    }
}

fn refused(text: &str) -> Vec<Problem> {
    match parse_in(text, "config.toml", &surroundings()) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.problems,
    }
}

#[track_caller]
fn one_problem(text: &str) -> String {
    match &refused(text)[..] {
        [problem] => format!("config.toml:{problem}"),
        others => panic!("{text}\n{others:#?}"),
    }
}

fn networks(listener_keys: &str) -> Vec<String> {
    let config = taken(&format!("[[listener]]\n{listener_keys}\n{LEAST}"));
    config.listeners[0].allow.iter().map(ToString::to_string).collect()
}

fn upstream(config: &Config) -> &crate::config::SmtpProvider {
    match &config.provider {
        Provider::Smtp(smtp) => smtp,
        other => panic!("another provider: {other:?}"),
    }
}

#[test]
fn every_bad_config_says_what_is_wrong_and_what_to_write() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad_configs");
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 40);
    let mut different = String::new();
    for case in cases {
        let bytes = std::fs::read(case.join("config.toml")).unwrap();
        let problems = parse_bytes(&bytes, "config.toml", &surroundings())
            .expect_err(&format!("{} was taken", case.display()));
        let said = format!("{problems}\n");
        assert!(!said.contains("hunter2"), "a secret is shown:\n{said}");
        for line in said.lines() {
            assert!(!line.contains(char::is_control), "{line:?}");
            let place: Vec<&str> = line.splitn(4, ':').collect();
            assert!(place[1].parse::<u32>().unwrap() > 0, "{line}");
            assert!(place[2].parse::<u32>().unwrap() > 0, "{line}");
        }
        let expected = case.join("expected.txt");
        if update {
            std::fs::write(&expected, said).unwrap();
        } else if std::fs::read_to_string(&expected).unwrap_or_default() != said {
            different.push_str(&format!("{}:\n{said}\n", case.display()));
        }
    }
    assert!(different.is_empty(), "UPDATE_EXPECT=1 writes these:\n{different}");
}

#[test]
fn defaults_hold_where_the_file_says_nothing() {
    let config = taken("");
    assert_eq!((config.sender.policy, config.sender.allowed), (SenderPolicy::Rewrite, Vec::new()));
    let config = taken(LEAST);
    assert_eq!(config.sender.policy, SenderPolicy::Preserve);
    assert_eq!(config.hostname.as_str(), "box.example.net");
    assert_eq!(config.listeners.len(), 1);
    assert_eq!(config.listeners[0].bind, Bind::Tcp("127.0.0.1:25".parse().unwrap()));
    assert_eq!(config.listeners[0].allow.len(), 2);
    let limits = &config.limits;
    assert_eq!(limits.message_size, 35_000_000);
    assert_eq!((limits.recipients, limits.connections), (1000, 4000));
    assert_eq!((limits.connections_per_client, limits.received_headers), (200, 50));
    assert_eq!(limits.errors_per_session, 10);
    assert_eq!(limits.command_timeout, Duration::from_secs(300));
    assert_eq!(limits.data_timeout, Duration::from_secs(600));
    assert_eq!(limits.min_data_rate, Some(Rate { amount: 500, per: Duration::from_secs(1) }));
    assert_eq!(limits.bare_newline, BareNewline::Normalize);
    assert_eq!(limits.shutdown_grace, Duration::from_secs(60));
    assert_eq!(config.provider, Provider::None { on_mail: OnMail::Reject });
    assert_eq!((config.throttle.concurrency, config.throttle.provider_concurrency), (20, 20));
    assert!(config.throttle.mailbox_concurrency.is_empty());
    let retry = &config.retry;
    assert_eq!((retry.factor, retry.jitter), (2.0, 0.2));
    assert_eq!((retry.in_doubt, retry.in_doubt_after), (InDoubt::Retry, Duration::from_secs(600)));
    assert_eq!((retry.first, retry.max), (Duration::from_secs(60), Duration::from_secs(3600)));
    assert_eq!(retry.give_up_after, Duration::from_secs(5 * 24 * 3600));
    assert_eq!(config.spool.path, Path::new("/var/lib/mailsluice/spool"));
    assert_eq!(config.spool.min_free, 500_000_000);
    assert_eq!(config.admin.bind, "127.0.0.1:9925".parse().unwrap());
    assert_eq!((config.log.level, config.log.format), (LogLevel::Info, LogFormat::Auto));
}

#[test]
fn smtp_provider_has_its_defaults() {
    let config = taken(UPSTREAM);
    let smtp = upstream(&config);
    assert_eq!((smtp.server.as_str(), smtp.port, smtp.max_recipients), ("127.0.0.1", 587, 100));
    assert_eq!(smtp.sender, None);
    assert_eq!(smtp.connect_timeout, Duration::from_secs(30));
    assert_eq!(smtp.command_timeout, Duration::from_secs(300));
    assert_eq!(smtp.data_timeout, Duration::from_secs(180));
    assert_eq!(smtp.final_timeout, Duration::from_secs(600));
}

#[test]
fn concurrency_goes_by_the_server_unless_written() {
    for (server, lane, over_all) in keys::CONCURRENCY {
        let server = if server.is_empty() { "smtp.example.com" } else { server };
        let throttle = taken(&UPSTREAM.replace("127.0.0.1", &server.to_uppercase())).throttle;
        assert_eq!((throttle.concurrency, throttle.provider_concurrency), (lane, over_all));
        let says = keys::of_table("throttle").find(|key| key.name() == "concurrency").unwrap();
        assert!(says.default.to_string().contains(&lane.to_string()), "{server}");
    }
    let written = "[throttle]\nconcurrency = 7\n[throttle.provider]\nconcurrency = 9\n\
                   [throttle.mailbox.\"a@b\"]\nconcurrency = 2\n[throttle.mailbox.c]\n";
    let throttle = taken(&format!("{UPSTREAM}{written}")).throttle;
    assert_eq!((throttle.concurrency, throttle.provider_concurrency), (7, 9));
    assert_eq!(
        throttle.mailbox_concurrency.into_iter().collect::<Vec<_>>(),
        [("a@b".to_owned(), 2)]
    );
}

#[test]
fn a_name_that_is_no_lane_is_a_warning() {
    let keys = |login: &str| -> Vec<String> {
        let provider = UPSTREAM.replace("auth = \"none\"\n", login);
        let lanes = "[throttle.mailbox.\"app\"]\n[throttle.mailbox.\"Reports@example.com\"]\n";
        let loaded = parse_in(&format!("{provider}{lanes}"), "x", &surroundings()).unwrap();
        let keys = loaded.warnings.into_iter().map(|warning| warning.key);
        keys.filter(|key| key.contains("throttle")).collect()
    };
    let sender = "sender = \"reports@example.com\"\n";
    let login = "username = \"app\"\npassword = \"secret\"\n";
    assert_eq!(keys(&format!("{sender}auth = \"none\"\n")), ["[throttle.mailbox.\"app\"]"]);
    assert_eq!(keys(&format!("{sender}{login}")), ["[throttle.mailbox.\"Reports@example.com\"]"]);
}

#[test]
fn system_name_that_is_no_domain_gives_localhost() {
    for hostname in ["", "-x", "my box", "(none)", "a\u{fffd}"] {
        let surroundings = Surroundings { hostname: hostname.to_owned(), ..surroundings() };
        let loaded = parse_in(LEAST, "config.toml", &surroundings).unwrap();
        assert_eq!(loaded.config.hostname.as_str(), "localhost", "{hostname:?}");
    }
    let written = format!("hostname = \"relay.example.net\"\n{LEAST}");
    assert_eq!(taken(&written).hostname.as_str(), "relay.example.net");
}

#[test]
fn sizes_durations_and_rates_are_read() {
    let limit = |line: &str| taken(&format!("{LEAST}[limits]\n{line}\n")).limits;
    for (size, octets) in [
        ("1", 1),
        ("\"1\"", 1),
        ("\"7B\"", 7),
        ("\"2kB\"", 2000),
        ("\"2KiB\"", 2048),
        ("\"3MiB\"", 3 << 20),
        ("\"150MB\"", 150_000_000),
        ("1_000", 1000),
        ("0x10", 16),
    ] {
        assert_eq!(limit(&format!("message_size = {size}")).message_size, octets, "{size}");
    }
    for (duration, millis) in
        [("50ms", 50), ("30s", 30_000), ("1h30m", 5_400_000), ("1d", 86_400_000), ("1s5ms", 1005)]
    {
        let read = limit(&format!("command_timeout = \"{duration}\"")).command_timeout;
        assert_eq!(read, Duration::from_millis(millis), "{duration}");
    }
    assert_eq!(limit("shutdown_grace = \"0s\"").shutdown_grace, Duration::ZERO);
    assert_eq!(limit("min_data_rate = \"none\"").min_data_rate, None);
    let rate = limit("min_data_rate = \"150MB/5m\"").min_data_rate.unwrap();
    assert_eq!(rate, Rate { amount: 150_000_000, per: Duration::from_secs(300) });
    for wrong in
        ["MB", "-1MB", "+1MB", "1.5MB", "1Mb", "1MBB", "99999999999999999999GB", "１MB", "1 MB"]
    {
        one_problem(&format!("{LEAST}[limits]\nmessage_size = \"{wrong}\"\n"));
    }
    for wrong in ["5", "m", "5m ", "5m5", "-5m", "5M", "1e3s", "0ms", "99999999999999999999s"] {
        one_problem(&format!("{LEAST}[limits]\ncommand_timeout = \"{wrong}\"\n"));
    }
}

#[test]
fn networks_are_normalised() {
    assert_eq!(networks("allow = [\"10.0.0.0/8\", \"192.0.2.1\"]"), ["10.0.0.0/8", "192.0.2.1/32"]);
    assert_eq!(networks("allow = [\"2001:db8::1\"]"), ["2001:db8::1/128"]);
    assert_eq!(
        networks("allow = [\"::ffff:10.0.0.0/104\", \"::ffff:192.0.2.1\", \"::ffff:0:0/96\"]"),
        ["10.0.0.0/8", "192.0.2.1/32", "0.0.0.0/0"]
    );
}

#[test]
fn listeners_bind_to_addresses_and_sockets() {
    let bind = |bind: &str, rest: &str| {
        taken(&format!("[[listener]]\nbind = \"{bind}\"\n{rest}\n{LEAST}")).listeners[0]
            .bind
            .clone()
    };
    assert_eq!(bind("[::1]:0", ""), Bind::Tcp("[::1]:0".parse().unwrap()));
    assert_eq!(
        bind("[::ffff:127.0.0.1]:25", ""),
        Bind::Tcp("[::ffff:127.0.0.1]:25".parse().unwrap())
    );
    assert_eq!(bind("unix:/run/smtp.sock", ""), Bind::Unix("/run/smtp.sock".into()));
    assert_eq!(
        bind("0.0.0.0:25", "allow = [\"10.0.0.0/8\"]"),
        Bind::Tcp("0.0.0.0:25".parse().unwrap())
    );
    let twice = "[[listener]]\nbind = \"127.0.0.1:0\"\n";
    let admin = "[admin]\nbind = \"127.0.0.1:0\"\n";
    assert_eq!(taken(&format!("{twice}{twice}{admin}{LEAST}")).listeners.len(), 2);
    let long = format!("[[listener]]\nbind = \"unix:/{}\"\n{LEAST}", "x".repeat(107));
    assert!(one_problem(&long).contains("107 octets"));
}

#[test]
fn value_that_works_may_be_written_though_others_do_not() {
    taken(&format!(
        "user = []\nlistener = []\n{UPSTREAM}[throttle]\nmessages = \"none\"\n\
         [recipients]\nallowed = []\nredirect_all_to = \"\"\n[log]\naddresses = true\n\
         format = \"json\"\n[bounce]\n"
    ));
}

#[test]
fn address_of_a_server_is_kept_without_brackets() {
    for (written, kept) in [("[::1]", "::1"), ("::1", "::1"), ("Mail.Example", "Mail.Example")] {
        let config = taken(&UPSTREAM.replace("127.0.0.1", written));
        assert_eq!(upstream(&config).server, kept);
    }
}

#[test]
fn a_gateway_that_would_refuse_all_mail_is_told() {
    for (text, is_told) in [
        ("", true),
        ("[provider]\nkind = \"none\"\n", true),
        ("[provider]\nkind = \"none\"\non_mail = \"hold\"\n", false),
        (UPSTREAM, false),
    ] {
        let warnings = parse_in(text, "config.toml", &surroundings()).unwrap().warnings;
        let said = warnings.iter().any(|it| it.to_string().contains("all mail is refused"));
        assert_eq!(said, is_told, "{text}");
    }
}

#[test]
fn what_works_but_is_worth_a_look_is_a_warning() {
    let text = format!(
        "[[listener]]\nbind = \"0.0.0.0:25\"\nallow = [\"0.0.0.0/0\"]\n[[listener]]\n\
         bind = \"unix:/run/smtp.sock\"\nallow = [\"10.0.0.0/8\"]\n{}",
        UPSTREAM.replace("127.0.0.1", "smtp.example.com")
    );
    let said = |text: &str| -> Vec<String> {
        let warnings = parse_in(text, "config.toml", &surroundings()).unwrap().warnings;
        warnings.iter().map(ToString::to_string).collect()
    };
    let nobody = "1:1: [bounce] postmaster: is not set, so nobody is told of outages, nor of mail \
                  that failed and whose sender cannot be told; write the address of who runs this \
                  gateway";
    assert_eq!(
        said(&text),
        [
            nobody,
            "3:9: [[listener]] allow: 0.0.0.0/0 lets everybody send mail through this gateway",
            "6:1: [[listener]] allow: has no effect on a Unix socket, whose clients have no address",
            "12:12: [provider] security: all mail goes to smtp.example.com in clear; write \"starttls\" or \"tls\" where it can",
        ]
    );
    assert_eq!(said(UPSTREAM), [nobody]);
    assert!(said(&format!("{UPSTREAM}[bounce]\npostmaster = \"o@example.com\"\n")).is_empty());
}

#[test]
fn file_that_cannot_be_read_is_one_problem() {
    let folder = tempfile::tempdir().unwrap();
    let missing = load(&folder.path().join("a\nb.toml"), Secrets::Read).unwrap_err().to_string();
    assert!(missing.contains("b.toml: the file cannot be read: No such file"), "{missing}");
    assert!(!missing.contains('\n'));
    assert!(load(folder.path(), Secrets::Read).is_err());
    let large = folder.path().join("large.toml");
    std::fs::write(&large, "#".repeat((1 << 20) + 1)).unwrap();
    assert!(load(&large, Secrets::Read).unwrap_err().to_string().contains("larger than 1MiB"));
    let good = folder.path().join("good.toml");
    std::fs::write(&good, format!("\u{feff}{}", LEAST.replace('\n', "\r\n"))).unwrap();
    assert!(load(&good, Secrets::Read).is_ok());
}

#[test]
fn problems_are_in_the_order_of_the_file() {
    let problems = refused("[log]\nlevel = 1\nformat = 2\nx = 3\n[admin]\nbind = 4\n[sender]\n");
    let places: Vec<(u32, u32)> = problems.iter().map(|p| (p.line, p.column)).collect();
    assert!(places.is_sorted(), "{places:?}");
    assert_eq!(places.len(), 4);
    let problems = Problems { file: "x.toml".to_owned(), problems };
    assert_eq!(problems.to_string().lines().count(), 4);
}

#[test]
fn table_of_keys_is_sound() {
    let mut seen = BTreeSet::new();
    for key in keys() {
        assert!(seen.insert(key.path), "{} is there twice", key.path);
        assert!(key.doc.ends_with('.') && !key.doc.contains('|'), "{}", key.path);
        let default = value::default(key);
        assert_eq!(default.is_some(), matches!(key.default, Unwritten::Is(_)), "{}", key.path);
    }
}

#[test]
fn reference_names_every_key() {
    let reference = reference();
    assert_eq!(reference.lines().count(), keys().len() + 2);
    for key in keys() {
        assert!(key.names().all(|name| reference.contains(&name)), "{}", key.path);
    }
    for line in reference.lines() {
        assert_eq!(line.matches('|').count(), 5, "{line}");
    }
    assert!(reference.contains("`provider.` `password`, `password_file`, `password_env`"));
}

const SAMPLE: &str = include_str!("../../config/mailsluice.toml");

/// A line of the sample that has a key, in use or not: the table, the key, the value.
fn sample_lines() -> Vec<(String, String, String, bool)> {
    let mut table = String::new();
    let mut lines = Vec::new();
    for line in SAMPLE.lines() {
        let (text, in_use) = match line.strip_prefix("# ") {
            Some(text) => (text, false),
            None => (line, true),
        };
        if text.starts_with('[') && text.ends_with(']') {
            text.trim_matches(['[', ']']).clone_into(&mut table);
            if table.starts_with("throttle.mailbox.") {
                "throttle.mailbox.*".clone_into(&mut table);
            }
        } else if let Some((name, value)) = text.split_once(" = ")
            && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
        {
            lines.push((table.clone(), name.to_owned(), value.to_owned(), in_use));
        }
    }
    lines
}

#[test]
fn sample_works_as_it_is() {
    let loaded = parse_in(SAMPLE, "mailsluice.toml", &surroundings());
    let loaded = loaded.unwrap_or_else(|problems| panic!("{problems}"));
    // The one that it asks for in words.
    let keys: Vec<&str> = loaded.warnings.iter().map(|warning| warning.key.as_str()).collect();
    assert_eq!(keys, ["[bounce] postmaster"]);
    assert_eq!(upstream(&loaded.config).port, 2525);
}

#[test]
fn sample_shows_every_key_that_works_with_its_default() {
    let lines = sample_lines();
    for (table, name, shown, in_use) in &lines {
        let key = keys::of_table(table)
            .find(|key| key.name() == name)
            .unwrap_or_else(|| panic!("{table}.{name} is no key"));
        match key.default {
            Unwritten::Is(default) if !in_use => assert_eq!(shown, default, "{table}.{name}"),
            Unwritten::Is(_) | Unwritten::Says(_) | Unwritten::Nothing => {
                let parsed = toml::de::DeValue::parse(shown).unwrap();
                assert!(value::read(key, parsed.get_ref()).is_ok(), "{table}.{name}");
            }
        }
    }
    for key in keys() {
        let shown =
            lines.iter().any(|(table, name, ..)| table == key.table() && name == key.name());
        assert_eq!(shown, !matches!(key.available, Available::Later), "{}", key.path);
    }
}

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n.max(1) as u64).unwrap()
    }
}

#[test]
fn no_file_makes_the_reader_panic() {
    let rounds = std::env::var("FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let uncommented = SAMPLE.replace("\n# ", "\n");
    let pieces: [&[u8]; 22] = [
        b"[",
        b"]",
        b"[[provider]]",
        b"[provider.smtp]",
        b"\"",
        b"'''",
        b"\"\"\"",
        b"=",
        b".",
        b",",
        b"{",
        b"}",
        b"\n",
        b"\r",
        b"#",
        b"\0",
        b"\xff",
        b"\xc3\xa9",
        b"99999999999999999999",
        b"-0",
        b"1979-05-27",
        b"inf",
    ];
    for seed in 1..=rounds {
        let mut random = Random(seed);
        random.below(1);
        let mut bytes = match random.below(2) {
            0 => SAMPLE.as_bytes().to_vec(),
            _ => uncommented.as_bytes().to_vec(),
        };
        for _ in 0..=random.below(8) {
            let (from, to) = (random.below(bytes.len() + 1), random.below(bytes.len() + 1));
            match random.below(5) {
                0 => drop(bytes.drain(from..bytes.len().min(from + to % 40))),
                1 => {
                    let piece = pieces[random.below(pieces.len())];
                    drop(bytes.splice(from..from, piece.iter().copied()));
                }
                2 => {
                    let copy = bytes[from..bytes.len().min(from + 60)].to_vec();
                    drop(bytes.splice(to..to, copy));
                }
                3 if from < bytes.len() => bytes[from] = u8::try_from(random.below(256)).unwrap(),
                _ => bytes.truncate(from.max(20)),
            }
        }
        let text = bytes.clone();
        let read = std::panic::catch_unwind(move || {
            parse_bytes(&text, "config.toml", &surroundings()).map_err(|p| p.to_string())
        });
        let shown = String::from_utf8_lossy(&bytes);
        match read {
            Ok(Ok(_)) => {}
            Ok(Err(said)) => assert!(!said.is_empty(), "seed {seed}:\n{shown}"),
            Err(_) => panic!("seed {seed}:\n{shown}"),
        }
    }
}

#[test]
fn secrets_are_read_by_who_needs_them_and_never_from_what_anybody_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let (config, secret) = (folder.path().join("c.toml"), folder.path().join("secret"));
    let write = |path: &Path, text: &[u8], mode: u32| {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let upstream = UPSTREAM.replace("auth = \"none\"", "username = \"me\"");
    let by_file = format!("{upstream}password_file = \"{}\"\n", secret.display());
    write(&config, by_file.as_bytes(), 0o644);
    let password = || {
        let loaded = load(&config, Secrets::Read)?;
        let Provider::Smtp(smtp) = &loaded.config.provider else { panic!("no provider") };
        match &smtp.login.as_ref().unwrap().proof {
            Proof::Password(password) => Ok::<_, Problems>(password.as_str().to_owned()),
            Proof::Token(_) => panic!("no password"),
        }
    };
    let refused = || password().unwrap_err().to_string();
    for text in ["p w", "p w\n", "p w\r\n", "\u{feff}p w\n"] {
        write(&secret, text.as_bytes(), 0o640);
        assert_eq!(password().unwrap(), "p w", "{text:?}");
    }
    write(&secret, b"p w", 0o644);
    assert!(refused().contains("(mode 0644): run chmod 600 on it"), "{}", refused());
    write(&secret, b"hunter2\nhunter2\n", 0o600);
    assert!(refused().ends_with("which has more than one line"), "{}", refused());
    write(&secret, b"hunter2\xff", 0o600);
    assert!(refused().contains("UTF-8") && !refused().contains("hunter2"), "{}", refused());
    std::fs::remove_file(&secret).unwrap();
    assert!(refused().contains("cannot be read"));
    assert!(load(&config, Secrets::Leave).is_ok(), "who needs no secret misses none");

    let inline = format!("{upstream}password = \"hunter2\"\n");
    write(&config, inline.as_bytes(), 0o600);
    assert_eq!(password().unwrap(), "hunter2");
    write(&config, inline.as_bytes(), 0o604);
    assert!(refused().contains("(mode 0604): run chmod 600 on this file"), "{}", refused());
    assert!(!refused().contains("hunter2"));

    let by_systemd = format!("{upstream}password_credential = \"smtp\"\n");
    write(&config, by_systemd.as_bytes(), 0o644);
    assert!(load(&config, Secrets::Read).is_err());
    let looked = load(&config, Secrets::Look).unwrap();
    assert!(looked.warnings[1].to_string().contains("LoadCredential="), "{:?}", looked.warnings);
}

#[test]
fn a_port_that_usually_wants_another_security_is_warned_of() {
    let warned = |security: &str, port: u16| {
        let text =
            UPSTREAM.replace("\"none\"\nauth", &format!("\"{security}\"\nport = {port}\nauth"));
        let loaded = parse_in(&text, "config.toml", &surroundings()).unwrap();
        loaded.warnings.iter().any(|it| it.to_string().contains("usually want security"))
    };
    assert!(warned("starttls", 465) && warned("tls", 587) && warned("tls", 25));
    assert!(!warned("tls", 465) && !warned("starttls", 587) && !warned("none", 25));
}

const GRAPH: &str = "[provider]\nkind = \"microsoft365\"\nsender = \"reports@contoso.com\"\n\
                     tenant_id = \"contoso.com\"\nclient_id = \"11111111-2222\"\n\
                     client_secret = \"hunter2\"\n";

const XOAUTH2: &str = "[provider]\nkind = \"smtp\"\nserver = \"smtp.office365.com\"\n\
                       sender = \"reports@contoso.com\"\nauth = \"xoauth2\"\n\
                       tenant_id = \"contoso.com\"\nclient_id = \"11111111-2222\"\n\
                       client_secret = \"hunter2\"\n";

fn graph(config: Config) -> Microsoft365 {
    match config.provider {
        Provider::Microsoft365(graph) => *graph,
        other => panic!("another provider: {other:?}"),
    }
}

fn app(config: &Config) -> &App {
    match &upstream(config).login.as_ref().unwrap().proof {
        Proof::Token(app) => app,
        Proof::Password(_) => panic!("a password"),
    }
}

fn with_variables(text: &str, variables: Variables) -> Config {
    let surroundings = Surroundings { variables, ..surroundings() };
    parse_in(text, "config.toml", &surroundings).unwrap().config
}

#[test]
fn microsoft365_has_its_defaults() {
    let config = taken(GRAPH);
    let throttle = &config.throttle;
    assert_eq!((throttle.concurrency, throttle.provider_concurrency), (4, 4));
    let graph = graph(config);
    assert_eq!(graph.graph, "https://graph.microsoft.com");
    assert_eq!((graph.format, graph.large_messages), (Format::Auto, LargeMessages::Auto));
    assert_eq!((graph.max_recipients, graph.save_to_sent_items), (500, false));
    assert_eq!((graph.sender.as_str(), graph.sender_name), ("reports@contoso.com", None));
    assert_eq!(graph.final_timeout, Duration::from_secs(600));
    let app = graph.app;
    assert_eq!(app.login, "https://login.microsoftonline.com");
    assert_eq!(app.scope, "https://graph.microsoft.com/.default");
    assert_eq!((app.tenant_id.as_str(), app.client_id.as_str()), ("contoso.com", "11111111-2222"));
    let Credential::Secret { secret, next: None } = &app.credential else { panic!("{app:?}") };
    assert_eq!(secret.as_str(), "hunter2");
    assert!(!format!("{app:?}").contains("hunter2"));
}

#[test]
fn the_id_of_a_secret_in_its_place_is_a_warning() {
    let warned = |secret: &str| {
        let loaded = parse_in(&GRAPH.replace("hunter2", secret), "config.toml", &surroundings());
        loaded.unwrap().warnings.iter().any(|it| it.text.contains("id of a secret"))
    };
    assert!(warned("11111111-2222-3333-4444-555555555555"));
    assert!(!warned("abc8Q~hunter2"));
}

#[test]
fn each_cloud_has_its_endpoints_and_its_scopes() {
    for (cloud, login, root, outlook) in [
        ("global", "login.microsoftonline.com", "graph.microsoft.com", "outlook.office365.com"),
        ("us-gov", "login.microsoftonline.us", "graph.microsoft.us", "outlook.office365.us"),
        (
            "us-gov-dod",
            "login.microsoftonline.us",
            "dod-graph.microsoft.us",
            "outlook-dod.office365.us",
        ),
        (
            "china",
            "login.chinacloudapi.cn",
            "microsoftgraph.chinacloudapi.cn",
            "partner.outlook.cn",
        ),
    ] {
        let graph = graph(taken(&format!("{GRAPH}cloud = \"{cloud}\"\n")));
        assert_eq!(graph.graph, format!("https://{root}"));
        assert_eq!(graph.app.login, format!("https://{login}"));
        assert_eq!(graph.app.scope, format!("https://{root}/.default"));
        let config = taken(&format!("{XOAUTH2}cloud = \"{cloud}\"\n"));
        assert_eq!(app(&config).login, format!("https://{login}"));
        assert_eq!(app(&config).scope, format!("https://{outlook}/.default"));
        assert_eq!(upstream(&config).login.as_ref().unwrap().username, "reports@contoso.com");
    }
}

#[test]
fn endpoints_are_by_key_then_cloud_then_variable() {
    let variables = || Variables {
        authority_host: Some("https://login.example.com/".to_owned()),
        graph_endpoint: Some("http://127.0.0.1:8025".to_owned()),
        ..Variables::default()
    };
    let ends = |text: &str| {
        let graph = graph(with_variables(text, variables()));
        (graph.app.login, graph.graph, graph.app.scope)
    };
    let owned = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
    assert_eq!(
        ends(GRAPH),
        owned(
            "https://login.example.com",
            "http://127.0.0.1:8025",
            "http://127.0.0.1:8025/.default"
        )
    );
    assert_eq!(
        ends(&format!("{GRAPH}cloud = \"global\"\n")),
        owned(
            "https://login.microsoftonline.com",
            "https://graph.microsoft.com",
            "https://graph.microsoft.com/.default"
        )
    );
    let both = "endpoints = { login = \"http://[::1]:1//\", graph = \"https://g.example/x/\" }\n";
    assert_eq!(
        ends(&format!("{GRAPH}cloud = \"china\"\n{both}")),
        owned("http://[::1]:1", "https://g.example/x", "https://g.example/x/.default")
    );
    let unsafe_one = Variables {
        authority_host: Some("http://login.example.com".to_owned()),
        ..Variables::default()
    };
    let surroundings = Surroundings { variables: unsafe_one, ..surroundings() };
    let problems = parse_in(GRAPH, "config.toml", &surroundings).unwrap_err().to_string();
    assert!(problems.contains("the variable AZURE_AUTHORITY_HOST, which is no https URL"));
    // The cloud is written, so the variable does not count.
    assert!(parse_in(&format!("{GRAPH}cloud = \"global\"\n"), "c.toml", &surroundings).is_ok());
}

#[test]
fn an_identity_that_is_given_needs_little() {
    let identity = "[provider]\nkind = \"microsoft365\"\nsender = \"reports@contoso.com\"\n";
    let machine = graph(taken(&format!("{identity}managed_identity = true\n"))).app;
    assert_eq!(machine.credential, Credential::ManagedIdentity);
    assert_eq!(machine.login, "http://169.254.169.254");
    assert_eq!((machine.tenant_id.as_str(), machine.client_id.as_str()), ("", ""));
    assert_eq!(machine.scope, "https://graph.microsoft.com/.default");

    let variables = Variables {
        tenant_id: Some("t-1".to_owned()),
        client_id: Some("c-1".to_owned()),
        federated_token_file: Some("/var/run/secrets/token".to_owned()),
        ..Variables::default()
    };
    let text = format!("{identity}workload_identity = true\nclient_id = \"c-2\"\n");
    let workload = graph(with_variables(&text, variables.clone())).app;
    assert_eq!((workload.tenant_id.as_str(), workload.client_id.as_str()), ("t-1", "c-2"));
    let token_file = PathBuf::from("/var/run/secrets/token");
    assert_eq!(workload.credential, Credential::WorkloadIdentity { token_file });

    let bare = refused(&format!("{identity}workload_identity = true\n"));
    let missing: Vec<&str> = bare.iter().map(|problem| problem.key.as_str()).collect();
    assert_eq!(
        missing,
        ["[provider] client_id", "[provider] tenant_id", "[provider] workload_identity"]
    );
    assert!(bare.iter().all(|problem| problem.text.contains("has no value here")));
    // Only the gateway itself runs where the variables are.
    let look = Surroundings { secrets: Secrets::Look, ..surroundings() };
    let warnings = parse_in(&text, "config.toml", &look).unwrap().warnings;
    assert!(warnings.iter().any(|it| it.text.contains("AZURE_FEDERATED_TOKEN_FILE")));
    let relative = Variables { federated_token_file: Some("token".to_owned()), ..variables };
    let relative = Surroundings { variables: relative, ..surroundings() };
    let problems = parse_in(&text, "config.toml", &relative).unwrap_err().to_string();
    assert!(problems.contains("\"token\" is no absolute path"), "{problems}");
}

#[test]
fn who_does_without_secrets_reads_no_certificate_either() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.toml");
    let certificate = GRAPH.replace(
        "client_secret = \"hunter2\"",
        "certificate = \"/nowhere.pem\"\nprivate_key = \"/nowhere.key\"",
    );
    let by_file = GRAPH.replace("client_secret =", "client_secret_file = \"/nowhere\" #");
    for text in [certificate, by_file] {
        std::fs::write(&config, text).unwrap();
        assert!(load(&config, Secrets::Leave).is_ok());
        assert!(load(&config, Secrets::Read).is_err());
    }
}

#[test]
fn only_roots_of_servers_are_taken_for_urls() {
    for good in [
        "https://login.example.com",
        "https://login.example.com:8443/",
        "https://proxy.example.com/microsoft",
        "http://127.0.0.1:8025",
        "http://LOCALHOST:1",
        "http://[::1]:8025/",
    ] {
        assert!(value::is_root_url(good), "{good}");
    }
    for bad in [
        "",
        "https://",
        "login.example.com",
        "http://login.example.com",
        "http://127.0.0.1.example.com",
        "http://localhost@login.example.com",
        "http://localhost:x@login.example.com",
        "http://localhost\\@login.example.com",
        "https://me@login.example.com",
        "https://login.example.com?x",
        "https://login.example.com#x",
        "https://login.example.com/ x",
        "https://login.\nexample.com",
        "file:///etc/passwd",
        "ftp://login.example.com",
    ] {
        assert!(!value::is_root_url(bad), "{bad}");
    }
}
