//! The listener below the HTTP server: few connections at once, and none that says nothing.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

use crate::clock;

/// Connections at once; the next ones wait in the kernel. Mail must not want for descriptors because of them.
pub(crate) const PLACES: usize = 48;
/// The same on the socket of the operator, whom a crowd on TCP is not to lock out.
pub(crate) const OPERATORS: usize = 16;
/// A connection on which nothing moves for so long is closed: half a request holds a place, and the end of the daemon.
const IDLE: Duration = Duration::from_secs(10);
/// After an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Pending connections that the kernel keeps.
const BACKLOG: i32 = 64;

/// Listens on `path` for the user of this process alone. What a dead daemon left there is replaced, and nothing else.
pub(crate) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let what = "a file that is no socket is in the way";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?;
            }
            // Somebody listens there, or may: a full backlog, a socket of another type, one of another user.
            Ok(_) | Err(_) => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file gets the mode that the socket has, less what the umask takes: it is at no time open to others.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

/// What connections come from.
pub(crate) trait Source: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    type Address: Send;

    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Address)>> + Send;

    fn local_address(&self) -> io::Result<Self::Address>;
}

impl Source for TcpListener {
    type Stream = TcpStream;
    type Address = SocketAddr;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }

    fn local_address(&self) -> io::Result<SocketAddr> {
        self.local_addr()
    }
}

impl Source for UnixListener {
    type Stream = UnixStream;
    type Address = PathBuf;

    async fn accept(&self) -> io::Result<(UnixStream, PathBuf)> {
        let (stream, _) = Self::accept(self).await?;
        Ok((stream, PathBuf::new()))
    }

    fn local_address(&self) -> io::Result<PathBuf> {
        let address = self.local_addr()?;
        Ok(address.as_pathname().map(Path::to_path_buf).unwrap_or_default())
    }
}

pub(crate) struct Guarded<L> {
    socket: L,
    places: Arc<Semaphore>,
}

impl<L> Guarded<L> {
    pub(crate) fn new(socket: L, places: usize) -> Self {
        Self { socket, places: Arc::new(Semaphore::new(places)) }
    }
}

impl<L: Source> Listener for Guarded<L> {
    type Io = Connection<L::Stream>;
    type Addr = L::Address;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let place = Arc::clone(&self.places).acquire_owned().await;
            match (place, self.socket.accept().await) {
                (Ok(place), Ok((stream, address))) => {
                    let deadline = Box::pin(tokio::time::sleep(IDLE));
                    return (Connection { stream, deadline, _place: place }, address);
                }
                _ => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<L::Address> {
        self.socket.local_address()
    }
}

pub(crate) struct Connection<T> {
    stream: T,
    deadline: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl<T> Connection<T> {
    /// What moved puts the deadline off; what did not may have met it.
    fn watch<R>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if poll.is_ready() {
            self.deadline.as_mut().reset((clock::now() + IDLE).into());
            return poll;
        }
        self.deadline.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Connection<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_read(cx, buf);
        this.watch(cx, poll)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Connection<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.watch(cx, poll)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_private_and_only_a_dead_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(bind_private(&path).unwrap());
        let _served = bind_private(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(bind_private(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let other = folder.path().join("other.sock");
        let _dgram = std::os::unix::net::UnixDatagram::bind(&other).unwrap();
        assert_eq!(bind_private(&other).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(other.exists(), "it may be alive");
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(bind_private(&file).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
