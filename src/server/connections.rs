//! Taking connections in: a bounded number of them, none of which may dawdle over its request or leave its answer unread.

use super::socket::Socket;
use super::validate::Limits;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

/// Connections at the same time; more wait in the system's queue. Each costs a few kilobytes.
const MOST_CONNECTIONS: usize = 4096;

/// After a failure to accept that is not one connection's own, such as too many open files.
const PAUSE: Duration = Duration::from_secs(1);

/// Serves every connection until `closed` is ready, then lets each finish the request it is at.
///
/// A connection is closed where the head of its next request has not come after the limits' `head_timeout` (idle ones
/// included), and where nothing of an answer could be written for `stall_timeout`: its sequences hold places and blocks.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    closed: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head_timeout);
    let mut closed = std::pin::pin!(closed);
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await.ok();
            (place, accept(&listener).await)
        };
        let (place, stream) = tokio::select! {
            () = &mut closed => break,
            accepted = accepted => accepted,
        };
        let (socket, hang_up) = Socket::new(stream);
        let mut stream = TimeoutStream::new(socket);
        stream.set_write_timeout(Some(limits.stall_timeout));
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended early");
                    }
                }
                () = hang_up.wait() => tracing::debug!("a client hung up"),
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Tokens are small packets that must not wait for each other; a system that cannot do this is slower.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
                if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
                    tracing::error!(%error, "cannot accept connections");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
