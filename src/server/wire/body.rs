//! A JSON body, or an error of our own shape that names the field.

use super::ApiError;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads and parses a request's body. The limit on its size is the router's.
pub(in crate::server) async fn read_json<T: DeserializeOwned>(request: Request) -> Result<T, ApiError> {
    let content_type =
        request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let message = "send the body as JSON with the header `Content-Type: application/json`".to_string();
        return Err(ApiError::http(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let read = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &())).await;
    let Ok(read) = read else {
        let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
        return Err(ApiError::http(StatusCode::REQUEST_TIMEOUT, "request_timeout", message));
    };
    let bytes = read.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = "the body is larger than the server accepts".to_string();
            ApiError::http(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
        }
        _ => ApiError::malformed("the body could not be read".into()),
    })?;
    parse(&bytes)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize::<_, T>(&mut deserializer);
    let value = parsed.map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match inner.classify() {
            serde_json::error::Category::Data => match path.as_str() {
                "." | "?" | "" => ApiError::malformed(format!("the body does not fit: {inner}")),
                field => ApiError::invalid(field, format!("{field}: {inner}")),
            },
            _ => ApiError::malformed(format!("the body is not JSON: {inner}")),
        }
    })?;
    deserializer.end().map_err(|error| ApiError::malformed(format!("the body is not JSON: {error}")))?;
    Ok(value)
}
