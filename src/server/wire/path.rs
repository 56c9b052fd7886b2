//! An id in a path, or an error of our own shape.

use super::ApiError;
use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;

/// The one parameter of a path.
pub(in crate::server) struct PathId(pub(in crate::server) String);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(id) = path.map_err(|error| ApiError::invalid("id", format!("id: {}", error.body_text())))?;
        Ok(Self(id))
    }
}
