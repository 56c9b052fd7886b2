//! Keys: kept as digests, compared in constant time. Those that requests bring are optional; whoever changes what is served
//! needs one of the admin's.

use super::app::ServerState;
use super::wire::ApiError;
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Digests of keys.
pub(super) struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    pub(super) fn new(keys: &[String]) -> Self {
        Self { digests: keys.iter().map(|key| Sha256::digest(key.as_bytes()).into()).collect() }
    }

    fn are_none(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whether a request brings one of them.
    fn open(&self, request: &Request) -> bool {
        let header = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let bearer = |(scheme, _): &(&str, &str)| scheme.eq_ignore_ascii_case("bearer");
        let Some((_, key)) = header.and_then(|h| h.split_once(' ')).filter(bearer) else { return false };
        let given: [u8; 32] = Sha256::digest(key.trim().as_bytes()).into();
        // Every byte of every digest is looked at, whatever the first ones say.
        let differs = |known: &[u8; 32]| known.iter().zip(&given).fold(0u8, |all, (a, b)| all | (a ^ b)) != 0;
        self.digests.iter().fold(false, |any, known| any | !differs(known))
    }
}

/// Lets a request on to its route only with a key, if there are any.
pub(super) async fn check(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    if state.api_keys.are_none() || state.api_keys.open(&request) {
        return next.run(request).await;
    }
    unauthorized(&state, "API key")
}

/// Lets a request on to its route only with an admin key; nobody where there is none.
pub(super) async fn check_admin(
    State(state): State<Arc<ServerState>>,
    request: Request,
    next: Next,
) -> Response {
    if state.admin_keys.are_none() {
        let message = "this server's sub-networks cannot be changed: it was started without --admin-key";
        return ApiError::forbidden("admin_disabled", message.into()).into_response();
    }
    if state.admin_keys.open(&request) {
        return next.run(request).await;
    }
    unauthorized(&state, "admin key")
}

fn unauthorized(state: &ServerState, key: &str) -> Response {
    state.metrics.counts.rejected.with_label_values(&["auth"]).inc();
    ApiError::unauthorized(key).into_response()
}
