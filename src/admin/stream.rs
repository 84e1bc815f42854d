//! An answer that is made while it is sent: only one piece of it is in memory, and none is made that nobody takes.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::BoxError;
use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::Frame;

/// A piece and what makes the next one; or the end.
pub(super) type Piece<S> = Result<Option<(Bytes, S)>, BoxError>;

struct Stream<S, F, Fut> {
    make: F,
    rest: Option<S>,
    making: Option<Pin<Box<Fut>>>,
}

/// A body of what `make` makes of `first`, then of what it has given back.
pub(super) fn body<S, F, Fut>(first: S, make: F) -> Body
where
    S: Send + Unpin + 'static,
    F: FnMut(S) -> Fut + Send + Unpin + 'static,
    Fut: Future<Output = Piece<S>> + Send + 'static,
{
    Body::new(Stream { make, rest: Some(first), making: None })
}

impl<S, F, Fut> HttpBody for Stream<S, F, Fut>
where
    S: Unpin,
    F: FnMut(S) -> Fut + Unpin,
    Fut: Future<Output = Piece<S>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Some(rest) = this.rest.take() {
            this.making = Some(Box::pin((this.make)(rest)));
        }
        let Some(making) = &mut this.making else { return Poll::Ready(None) };
        let made = std::task::ready!(making.as_mut().poll(cx));
        this.making = None;
        Poll::Ready(match made {
            Ok(None) => None,
            Ok(Some((piece, rest))) => {
                this.rest = Some(rest);
                Some(Ok(Frame::data(piece)))
            }
            Err(error) => Some(Err(error)),
        })
    }
}
