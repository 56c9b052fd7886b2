//! Serving until asked to stop, and stopping without losing an accepted request.

use super::app::{ServerState, app};
use super::connections;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// How long connections may take to close after the last answer has been computed or given up.
const CLOSING: Duration = Duration::from_secs(5);

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every accepted request was answered.
    All,
    /// Some were still running after the drain timeout; they were told so within their answers.
    TimedOut,
}

/// Serves until `shutdown` is ready, then drains: `/health` and new requests answer 503 while running ones finish, for
/// at most `drain`. The engine is the caller's to stop afterwards.
///
/// # Errors
/// Serving panicked.
pub async fn serve(
    listener: TcpListener,
    state: Arc<ServerState>,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> io::Result<Drained> {
    let (close, closed) = oneshot::channel::<()>();
    let serving = connections::serve(listener, app(&state), state.limits.clone(), async move {
        // An error means that the sender is gone: also a reason to close.
        let _ = closed.await;
    });
    let mut serving = tokio::spawn(serving);
    let joined = |result: Result<(), tokio::task::JoinError>| result.map_err(io::Error::other);
    tokio::select! {
        result = &mut serving => return joined(result).map(|()| Drained::All),
        () = shutdown => {}
    }
    state.admission.close();
    tracing::info!(seconds = drain.as_secs(), "draining: new requests are refused, running ones finish");
    // The listener stays open meanwhile, so that newcomers are told to go elsewhere instead of finding nobody.
    let emptied = state.admission.emptied(drain).await;
    if !emptied {
        tracing::warn!("the drain timeout has passed; remaining requests are cut off");
        state.admission.cut_off();
    }
    // If the receiver is gone, serving has ended by itself.
    let _ = close.send(());
    match tokio::time::timeout(CLOSING, &mut serving).await {
        Ok(result) => joined(result)?,
        Err(_) => serving.abort(),
    }
    Ok(if emptied { Drained::All } else { Drained::TimedOut })
}
