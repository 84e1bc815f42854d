//! Work on the raw bytes of a message's header; a body is never parsed or written anew. In `dsn`, what this gateway writes
//! itself.

pub mod addresses;
pub mod dsn;
pub mod header;
pub mod outgoing;
pub mod received;
pub mod rewrite;
