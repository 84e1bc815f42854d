//! Work on the raw bytes of a message's header. A body is never parsed or written anew here.

pub mod addresses;
pub mod dsn;
pub mod header;
pub mod outgoing;
pub mod received;
pub mod rewrite;
