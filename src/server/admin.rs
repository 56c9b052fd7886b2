//! `/v1/subnetworks`: what there is, for everybody; registering and removing, for who has the admin key.

use super::app::ServerState;
use super::generate::draining;
use super::registry::{Registered, find_sub_network};
use super::wire::{
    ApiError, PathId, RegisterRequest, RemoveQuery, Removed, SubNetworkCard, SubNetworkList, read_json,
};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// Bytes of a sub-network's JSON: a thousand groups take less than ten thousand.
const MOST_BYTES: usize = 64 << 10;

type Shared = State<Arc<ServerState>>;

/// `GET /v1/subnetworks`: each sub-network of each super-adapter, as the catalog has it.
pub(super) async fn list(State(state): Shared) -> Response {
    let models = state.registry.now();
    let cards =
        models.models().iter().flat_map(|m| m.sub_networks.iter().map(|s| SubNetworkCard::new(&m.name, s)));
    Json(SubNetworkList { object: "list", data: cards.collect() }).into_response()
}

/// `GET /v1/subnetworks/{id}`
pub(super) async fn get(State(state): Shared, PathId(id): PathId) -> Result<Response, ApiError> {
    let models = state.registry.now();
    let (model, sub_network) = find_sub_network(&models, &id)?;
    Ok(Json(SubNetworkCard::new(&model.name, sub_network)).into_response())
}

/// `POST /v1/subnetworks`: 201 for a new one, 200 for one that was there.
pub(super) async fn register(State(state): Shared, request: Request) -> Result<Response, ApiError> {
    let mut request: RegisterRequest = read_json(request, MOST_BYTES).await?;
    let (model, persist) = (request.model.take(), request.persist.unwrap_or(false));
    let line = request.into_line();
    let registered = changed(&state, move |state| state.registry.register(model.as_deref(), line, persist));
    let Registered { model, sub_network, created } = registered.await?;
    if created {
        tracing::info!(
            "registered {}{}",
            sub_network.label,
            if persist { ", in the catalog too" } else { "" }
        );
    }
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(SubNetworkCard::new(&model, &sub_network))).into_response())
}

/// `DELETE /v1/subnetworks/{id}`
pub(super) async fn remove(
    State(state): Shared,
    PathId(id): PathId,
    query: Result<Query<RemoveQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(RemoveQuery { persist }) =
        query.map_err(|error| ApiError::invalid("persist", error.body_text()))?;
    let persist = persist.unwrap_or(false);
    let label = changed(&state, move |state| state.registry.remove(&id, persist)).await?;
    tracing::info!("removed {label}{}", if persist { ", from the catalog too" } else { "" });
    Ok(Json(Removed { id: &label, object: "subnetwork", deleted: true }).into_response())
}

/// Runs a change to its end, even if its client goes, on a thread that may wait for a disk.
async fn changed<T: Send + 'static>(
    state: &Arc<ServerState>,
    change: impl FnOnce(&ServerState) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if state.admission.draining() {
        return Err(draining());
    }
    let shared = state.clone();
    tokio::task::spawn_blocking(move || change(&shared)).await.map_err(|error| {
        tracing::error!(%error, "a change of the sub-networks panicked");
        ApiError::internal()
    })?
}
