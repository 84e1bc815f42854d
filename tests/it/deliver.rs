//! Mail goes from a client to an upstream, byte for byte.

use crate::support::client::Client;
use crate::support::gateway::Setup;
use crate::support::sink::Sink;

#[test]
fn a_message_arrives_with_its_envelope_and_one_received_line() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let content = "From: a@example.com\r\nTo: header-only@example.org\r\nMessage-ID: <1@x>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\n.\r\n..\r\nhello \t\r\n\r\n";
    let id = Client::hello(gateway.smtp()).mail(
        "bounce@example.com",
        &["b@example.org", "c@example.org"],
        content,
    );
    let taken = sink.wait(1).remove(0);
    assert_eq!(taken.from, "bounce@example.com");
    assert_eq!(taken.to, ["b@example.org", "c@example.org"]);
    assert_eq!(String::from_utf8_lossy(taken.original()), content);
    assert!(
        taken.text().starts_with("Received: from client.test ([127.0.0.1])\r\n\tby relay.test "),
        "{}",
        taken.text()
    );
    assert!(taken.text().contains(&format!(" id {id};")));
    gateway.wait_empty();
    gateway.wait_event("delivered", |event| {
        event["id"] == id.as_str() && event["to"] == "c@example.org"
    });
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
}
