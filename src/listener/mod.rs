//! Sockets in: bind, accept, limits, drain. One task per connection drives one [`crate::smtp::session::Session`].
//!
//! The listener never asks a provider anything: it reads [`Intake`].

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config;
use crate::envelope::{Intake, SpoolId};
use crate::listener::connection::{Peer, Stream};
use crate::listener::slots::{Slot, Slots};
use crate::metrics::{Metrics, Refusal};
use crate::policy::Policy;
use crate::shutdown::Shutdown;
use crate::smtp::reply;
use crate::spool::Spool;

mod connection;
pub mod slots;

/// Connections the kernel keeps for us until we accept them.
const BACKLOG: u32 = 4096;
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all listeners and their connections share.
pub struct Shared<S> {
    pub hostname: String,
    pub policy: Arc<Policy>,
    pub limits: config::Limits,
    pub spool: Arc<S>,
    /// Takes the id of each accepted message: the one wake-up of the delivery side.
    pub accepted: mpsc::UnboundedSender<SpoolId>,
    pub intake: watch::Receiver<Intake>,
    pub metrics: Arc<Metrics>,
    pub slots: Arc<Slots>,
    /// Its token ends idle sessions and lets those that receive content finish.
    pub shutdown: Shutdown,
    /// Ends every session at once.
    pub abort: CancellationToken,
}

/// A socket that is bound and not served yet.
#[derive(Debug)]
pub struct Bound {
    socket: Socket,
    allow: Vec<IpNet>,
    /// As logs and errors name it.
    pub name: String,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Binds one listener; the error says which and what to do.
pub fn bind(config: &config::Listener) -> io::Result<Bound> {
    let (socket, name) = match &config.bind {
        config::Bind::Tcp(address) => {
            let socket =
                bind_tcp(*address).map_err(|error| cannot_bind(&address.to_string(), error))?;
            let name =
                socket.local_addr().map_or_else(|_| address.to_string(), |bound| bound.to_string());
            (Socket::Tcp(socket), name)
        }
        config::Bind::Unix(path) => {
            let name = format!("unix:{}", path.display());
            let socket = bind_unix(path).map_err(|error| cannot_bind(&name, error))?;
            (Socket::Unix(socket, path.clone()), name)
        }
    };
    Ok(Bound { socket, allow: config.allow.clone(), name })
}

/// Says which socket could not be bound, and what to do.
pub fn cannot_bind(name: &str, error: io::Error) -> io::Error {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there: `ss -ltnp` shows which",
        io::ErrorKind::PermissionDenied => {
            "; ports below 1024 need CAP_NET_BIND_SERVICE, sockets a writable folder"
        }
        io::ErrorKind::AddrNotAvailable => "; no interface of this host has that address",
        _ => "",
    };
    io::Error::new(error.kind(), format!("cannot listen on {name}: {error}{hint}"))
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A socket file that a former run left behind is replaced; one that somebody listens on is not.
fn bind_unix(path: &PathBuf) -> io::Result<UnixListener> {
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is no socket is in the way",
            ));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        fs::remove_file(path)?;
    }
    let socket = UnixListener::bind(path)?;
    // As open as the loopback port that it stands for; the folder says who may reach it.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(socket)
}

/// Accepts until the shutdown token fires.
pub async fn listen<S: Spool>(bound: Bound, shared: Arc<Shared<S>>) {
    let stop = shared.shutdown.token.clone();
    let name = &bound.name;
    info!(event = "listening", address = %name, protocol = "smtp", "listening for SMTP on {name}");
    loop {
        // An accept that is dropped mid-way has taken no connection.
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = bound.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => admit(&bound, &shared, stream, peer),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                warn!(%error, address = %name, "cannot accept on {name}: {error}; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    if let Socket::Unix(_, path) = &bound.socket {
        // It may be gone already.
        drop(fs::remove_file(path));
    }
}

/// The client went away before it was accepted: nothing is wrong here.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Gives the connection a place and a task, or turns it away.
fn admit<S: Spool>(bound: &Bound, shared: &Arc<Shared<S>>, stream: Stream, peer: Peer) {
    let refusal = match take_slot(bound, shared, &peer) {
        Ok(slot) => {
            shared.shutdown.tasks.spawn(connection::serve(stream, peer, Arc::clone(shared), slot));
            return;
        }
        Err(refusal) => refusal,
    };
    shared.metrics.refuse_connection(refusal);
    let reason = refusal.label();
    info!(event = "refused", client = %peer, reason, "connection from {peer} refused: {reason}");
    let reply = match refusal {
        Refusal::NotAllowed => reply::not_allowed(),
        _ => reply::too_many_connections(),
    };
    connection::turn_away(stream, &reply);
}

fn take_slot<S: Spool>(
    bound: &Bound,
    shared: &Arc<Shared<S>>,
    peer: &Peer,
) -> Result<Slot, Refusal> {
    let client = match peer {
        Peer::Unix => None,
        Peer::Tcp(address) if !bound.allow.iter().any(|net| net.contains(address)) => {
            return Err(Refusal::NotAllowed);
        }
        Peer::Tcp(address) => Some(*address).filter(|address| !address.is_loopback()),
    };
    shared.slots.take(client)
}

impl Bound {
    /// The address it is bound to, where it is TCP.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().ok(),
            Socket::Unix(..) => None,
        }
    }

    async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, address) = socket.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), Peer::Tcp(canonical(address.ip()))))
            }
            Socket::Unix(socket, _) => {
                let (stream, _) = socket.accept().await?;
                Ok((Stream::Unix(stream), Peer::Unix))
            }
        }
    }
}

/// IPv4-mapped IPv6 is IPv4 (R14).
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_file_is_replaced_and_a_served_one_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("smtp.sock");
        drop(bind_unix(&path).unwrap());
        assert!(path.exists());
        let _served = bind_unix(&path).unwrap();
        assert_eq!(bind_unix(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(bind_unix(&file).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
