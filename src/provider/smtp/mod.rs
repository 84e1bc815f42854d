//! The upstream SMTP server.
