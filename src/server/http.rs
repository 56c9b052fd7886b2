//! What every exchange gets: an id, a line in the log, its place in the metrics, and an answer even after a panic.

use super::app::ServerState;
use super::wire::ApiError;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::any::Any;
use std::sync::Arc;
use std::time::Instant;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::{Instrument, Span};

const REQUEST_ID: &str = "x-request-id";

/// A panic's text, which must not go to the client.
type Panic = Box<dyn Any + Send + 'static>;

/// Turns a panic into a 500 of our own shape.
pub(super) fn catch_panic() -> CatchPanicLayer<fn(Panic) -> Response<Body>> {
    #[expect(clippy::needless_pass_by_value, reason = "the layer hands the payload over")]
    fn answer(panic: Panic) -> Response<Body> {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        tracing::error!(panic = text, "a handler panicked");
        ApiError::internal().into_response()
    }
    CatchPanicLayer::custom(answer as fn(Panic) -> Response<Body>)
}

/// Names, times and counts each exchange, also one whose client goes before it is answered.
pub(super) async fn observe(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_string();
    let id = request.headers().get(REQUEST_ID).filter(|id| acceptable(id.as_bytes())).cloned();
    let id = id.unwrap_or_else(generated);
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default());
    let exchange =
        Exchange { state, method, route, span: span.clone(), started: Instant::now(), status: None };
    let mut response = next.run(request).instrument(span).await;
    response.headers_mut().insert(REQUEST_ID, id);
    exchange.answered(response.status());
    response
}

/// An exchange from its request on. Dropped without an answer its client has gone, which is counted as nginx does: 499.
struct Exchange {
    state: Arc<ServerState>,
    method: Method,
    route: String,
    span: Span,
    started: Instant,
    status: Option<StatusCode>,
}

impl Exchange {
    fn answered(mut self, status: StatusCode) {
        self.status = Some(status);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let Self { state, method, route, started, status, .. } = self;
        let (gone, took) = (status.is_none(), started.elapsed());
        let status = status.or(StatusCode::from_u16(499).ok()).unwrap_or_default();
        state.metrics.http(route, method, status, took);
        let (code, ms) = (status.as_u16(), took.as_millis());
        self.span.in_scope(|| match gone {
            true => tracing::info!(%method, route, status = code, ms, "its client went"),
            false => tracing::info!(%method, route, status = code, ms, "answered"),
        });
    }
}

/// A client's own id is repeated in logs and headers, so it must be harmless there.
fn acceptable(id: &[u8]) -> bool {
    let harmless = |b: &u8| b.is_ascii_alphanumeric() || b"._-".contains(b);
    (1..=128).contains(&id.len()) && id.iter().all(harmless)
}

fn generated() -> HeaderValue {
    HeaderValue::try_from(unique("req-")).unwrap_or(HeaderValue::from_static("req-unknown"))
}

/// `prefix` and 96 random bits.
pub(super) fn unique(prefix: &str) -> String {
    format!("{prefix}{:016x}{:08x}", rand::random::<u64>(), rand::random::<u32>())
}
