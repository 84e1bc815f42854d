//! README, sample, metrics, import table: they say what is true.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use mailsluice::sandbox::graph::faults::{FAULTS, MAILBOXES};

use crate::support::gateway::Setup;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What a row of the import table allows.
struct Row {
    pure: bool,
    everything: bool,
    allowed: Vec<String>,
}

fn import_table() -> BTreeMap<String, Row> {
    let docs = read("src/lib.rs");
    let rows = docs.lines().filter_map(|line| line.strip_prefix("//! | `")).map(|line| {
        let (module, rest) = line.split_once("` |").unwrap();
        let words: Vec<String> =
            rest.split([',', '|']).map(|word| word.trim().trim_matches('`').to_owned()).collect();
        let allowed = words.iter().filter(|word| !word.is_empty()).cloned().collect();
        let has = |word: &str| words.iter().any(|it| it == word);
        (module.to_owned(), Row { pure: has("pure"), everything: has("everything"), allowed })
    });
    rows.collect()
}

/// Every source file with its module path, without tests.
fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs")
                && !path.ends_with("tests.rs")
            {
                found.push(path);
            }
        }
    }
    let source = Path::new(ROOT).join("src");
    let mut files = Vec::new();
    walk(&source, &mut files);
    let module = |path: &Path| {
        let relative = path.strip_prefix(&source).unwrap().with_extension("");
        let words: Vec<_> = relative
            .iter()
            .map(|word| word.to_str().unwrap())
            .filter(|word| *word != "mod")
            .collect();
        words.join("::")
    };
    let text = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()
    };
    files.iter().map(|path| (module(path), text(path))).collect()
}

/// The `crate::` paths that a file names in code, each to its last lower-case word.
fn paths(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = code.collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let (list, _) = list.split_once('}').unwrap();
            found.extend(
                list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()),
            );
            continue;
        }
        let path =
            rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).next().unwrap();
        let modules =
            path.split("::").take_while(|word| word.starts_with(|c: char| c.is_lowercase()));
        found.push(modules.collect::<Vec<_>>().join("::"));
    }
    found
}

fn within(path: &str, module: &str) -> bool {
    path == module || path.strip_prefix(module).is_some_and(|rest| rest.starts_with("::"))
}

#[test]
fn modules_use_only_what_the_import_table_of_lib_rs_allows() {
    let table = import_table();
    assert!(table.len() > 15, "the table was not found");
    let mut wrong = Vec::new();
    let mut used = 0;
    for (module, text) in sources() {
        if matches!(module.as_str(), "lib" | "main") {
            continue;
        }
        let rows = table.iter().filter(|(name, _)| within(&module, name));
        // A folder's own file, such as `delivery`, needs no row where its parts have them.
        let Some((name, row)) = rows.max_by_key(|(name, _)| name.len()) else {
            let parts = table.keys().any(|name| within(name, &module));
            assert!(
                parts && paths(&text).is_empty(),
                "{module} has no row in the import table of src/lib.rs"
            );
            continue;
        };
        for path in paths(&text) {
            used += 1;
            let own = within(&path, name);
            let open_to_impure = ["clock", "metrics", "shutdown"];
            let open = within(&path, "ordered")
                || (!row.pure && open_to_impure.iter().any(|open| within(&path, open)));
            // `smtp::address` allows `smtp::address::Mailbox`; `delivery` allows what is in it.
            let allowed = row.allowed.iter().any(|allowed| within(&path, allowed));
            if !(row.everything || own || open || allowed) {
                wrong.push(format!("{module} uses {path}"));
            }
        }
    }
    assert!(used > 100, "the paths were not found");
    assert!(
        wrong.is_empty(),
        "edges that the table of src/lib.rs does not have:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn only_the_clock_reads_time() {
    for (module, text) in sources() {
        for call in ["Instant::now()", "SystemTime::now()"] {
            assert!(module == "clock" || !text.contains(call), "{module} calls {call}");
        }
    }
}

#[test]
fn the_pure_rooms_know_no_socket_no_task_and_no_log() {
    let table = import_table();
    for (module, text) in sources() {
        let rows = table.iter().filter(|(name, _)| within(&module, name));
        let Some((_, row)) = rows.max_by_key(|(name, _)| name.len()) else { continue };
        // The body of a message is read from disk; `envelope` is where all rooms find how.
        if row.pure && module != "envelope" {
            for word in ["tokio", "tracing", "std::net::Tcp", "std::fs", "async fn"] {
                assert!(!text.contains(word), "{module} is pure and has {word}");
            }
        }
    }
}

/// Holds the part of the README between `<!-- name -->` and `<!-- end of name -->` to what the code says.
/// `UPDATE_EXPECT=1` writes it.
fn check_readme_part(name: &str, expected: &str) {
    static ONE_WRITER: Mutex<()> = Mutex::new(());
    let _one = ONE_WRITER.lock().unwrap();
    let readme = read("README.md");
    let (start, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
    let (before, rest) =
        readme.split_once(&start).unwrap_or_else(|| panic!("README.md has no {start}"));
    let (found, after) = rest.split_once(&end).unwrap_or_else(|| panic!("README.md has no {end}"));
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(
            Path::new(ROOT).join("README.md"),
            format!("{before}{start}{expected}{end}{after}"),
        )
        .unwrap();
        return;
    }
    assert_eq!(found, expected, "README.md is old: UPDATE_EXPECT=1 cargo test --test it tidy");
}

#[test]
fn the_readme_has_every_key_of_the_configuration() {
    check_readme_part(
        "config reference",
        &format!("\n{}\n", mailsluice::config::reference().trim()),
    );
}

#[test]
fn the_readme_has_every_metric() {
    let metrics = mailsluice::metrics::Metrics::new();
    let mut table = "\n| metric | what it says |\n|---|---|\n".to_owned();
    for (name, help) in metrics.describe() {
        table.push_str(&format!("| `{name}` | {help} |\n"));
    }
    table.push('\n');
    check_readme_part("metrics", &table);
}

#[test]
fn a_running_gateway_shows_every_metric_that_has_no_label() {
    let gateway = Setup::none("hold").start();
    let (_, text) = gateway.get("/metrics");
    for (name, help) in mailsluice::metrics::Metrics::new().describe() {
        // A vector of which no series exists yet is not shown.
        if name != "mailsluice_deliveries_total" {
            assert!(
                text.contains(&format!("# HELP {name} {help}")),
                "{name} is missing in\n{text}"
            );
        }
    }
}

#[test]
fn the_readme_names_every_command_and_every_fault_address() {
    let readme = read("README.md");
    for command in
        ["run", "check", "health", "sandbox", "queue", "status", "log", "spool", "version"]
    {
        assert!(readme.contains(&format!("mailsluice {command}")), "{command}");
    }
    for (address, _) in mailsluice::sandbox::upstream::FAULTS {
        assert!(readme.contains(&format!("`{address}")), "{address}");
    }
    let graph = [FAULTS.as_slice(), &MAILBOXES].concat();
    for (address, what) in graph {
        let row = format!("| `{address}` | {what} |").replace("takes a while", "takes 3 s");
        assert!(readme.contains(&row), "{row}");
    }
}

/// Every event that the code tells is in README's list of them.
#[test]
fn readme_names_every_event() {
    let readme = read("README.md");
    let at = readme.find("Every event has a name").unwrap();
    let (list, _) = readme[at..].split_once("\n\nAt `debug`").unwrap();
    let mut told = 0;
    for (module, text) in sources() {
        for (_, rest) in
            text.match_indices("event = \"").map(|(at, found)| text.split_at(at + found.len()))
        {
            let name = rest.split('"').next().unwrap();
            assert!(list.contains(&format!("`{name}`")), "{module} tells {name}");
            told += 1;
        }
    }
    assert!(told > 30, "{told}");
}
