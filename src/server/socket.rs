//! A connection's bytes, and whether its client has hung up.

use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// Between two looks at a client that has sent more than has been read.
const PAUSE: Duration = Duration::from_millis(250);

/// After a client has hung up: an answer that is ready may still go out to one that has only closed its own side.
const GRACE: Duration = Duration::from_secs(1);

/// Where a connection reads and writes.
pub(super) struct Socket {
    reader: Arc<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

/// Knows when the client hangs up, even where it has sent something that is not read before its answer is done, behind which
/// the connection itself does not see the end.
pub(super) struct HangUp {
    reader: Arc<OwnedReadHalf>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> (Self, HangUp) {
        let (reader, writer) = stream.into_split();
        let reader = Arc::new(reader);
        (Self { reader: Arc::clone(&reader), writer }, HangUp { reader })
    }
}

impl HangUp {
    /// Ready a moment after the client has closed its side.
    pub(super) async fn wait(self) {
        // Readable at once as long as something has not been read, hence the pause.
        while self.reader.ready(Interest::READABLE).await.is_ok_and(|ready| !ready.is_read_closed()) {
            tokio::time::sleep(PAUSE).await;
        }
        tokio::time::sleep(GRACE).await;
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!((*self.reader).as_ref().poll_read_ready(context))?;
            match self.reader.try_read(buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.writer.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(context)
    }
}
