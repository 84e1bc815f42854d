//! The dialog files, against the binary.

use std::collections::BTreeMap;
use std::path::Path;

use crate::support::client::{Client, id};
use crate::support::dialog::{Action, Dialog, Stored};
use crate::support::gateway::{Gateway, Setup};
use crate::support::sink::Sink;

#[test]
fn dialogs_go_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dialogs");
    let mut by_settings = BTreeMap::<_, Vec<Dialog>>::new();
    for dialog in Dialog::load_all(&folder).unwrap() {
        by_settings.entry(dialog.settings.clone()).or_default().push(dialog);
    }
    let dialogs: usize = by_settings.values().map(Vec::len).sum();
    assert!(dialogs >= 40, "{dialogs} dialogs");
    std::thread::scope(|scope| {
        for (settings, dialogs) in &by_settings {
            scope.spawn(|| play_all(settings, dialogs));
        }
    });
}

/// Plays dialogs at the same time against one gateway.
fn play_all(settings: &[(String, String)], dialogs: &[Dialog]) {
    let sink = Sink::new();
    let gateway = setup(&sink, settings).start();
    let stored: usize = std::thread::scope(|scope| {
        let plays: Vec<_> =
            dialogs.iter().map(|dialog| scope.spawn(|| play(dialog, &gateway, &sink))).collect();
        plays.into_iter().map(|play| play.join().unwrap()).sum()
    });
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_messages_accepted_total"), stored as f64);
    assert_eq!(sink.taken().len(), stored, "messages that no dialog names");
}

fn setup(sink: &Sink, settings: &[(String, String)]) -> Setup {
    settings.iter().fold(Setup::to(sink.address), |setup, (key, value)| {
        let line = match key.as_str() {
            "max_size" => format!("message_size = \"{value}B\""),
            "max_recipients" => format!("recipients = {value}"),
            "errors" => format!("errors_per_session = {value}"),
            "bare_newline" => format!("bare_newline = \"{value}\""),
            _ => panic!("no such setting: {key} {value}"),
        };
        setup.set("limits", &line)
    })
}

/// Plays one dialog, and returns how many messages it stored.
fn play(dialog: &Dialog, gateway: &Gateway, sink: &Sink) -> usize {
    let mut client = Client::silent(gateway.smtp());
    let (mut unsent, mut ids, mut seen) = (Vec::new(), Vec::new(), 0);
    for step in &dialog.steps {
        let at = format!("{}:{}", dialog.name, step.line);
        if let Action::Send(bytes) = &step.action {
            unsent.extend_from_slice(bytes);
            continue;
        }
        client.send(std::mem::take(&mut unsent));
        match &step.action {
            Action::Send(_) => {}
            Action::Expect(pattern) => {
                let line = client.line().unwrap_or_else(|| panic!("{at}: nothing was said"));
                assert!(pattern.matches(&line), "{at}: {line:?} is not {pattern:?}");
                if line.contains("queued as ") {
                    ids.push(id(&line));
                }
            }
            Action::Stored(expected) => {
                let id = ids.get(seen).unwrap_or_else(|| panic!("{at}: nothing"));
                let taken = sink.wait_id(id);
                let body = taken.original().to_vec();
                let from = format!("<{}>", taken.from);
                let rcpts = taken.to.iter().map(|to| format!("<{to}>")).collect();
                assert_eq!(Stored { from, rcpts, body }, ended(expected), "{at}");
                seen += 1;
            }
            Action::Eof => client.finish(),
            Action::Closed => assert_eq!(client.expect_end(), "", "{at}: more was said"),
        }
    }
    assert!(unsent.is_empty(), "{}: the last step sends", dialog.name);
    assert_eq!(ids.len(), seen, "{}: a message that it does not name", dialog.name);
    seen
}

/// What the upstream gets of it: DATA has no way to say that the last line does not end.
fn ended(stored: &Stored) -> Stored {
    let mut stored = stored.clone();
    if !stored.body.is_empty() && !stored.body.ends_with(b"\r\n") {
        stored.body.extend_from_slice(b"\r\n");
    }
    stored
}
