//! Microsoft 365 by Graph.

pub mod message;

mod answer;
