//! A JSON body, or an error of our own shape that names the field.

use super::ApiError;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use futures_core::Stream;
use serde::de::DeserializeOwned;
use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a body that is too large that are still taken: a client that writes first and reads afterwards would otherwise see
/// a broken connection in place of the answer.
const DRAINED: usize = 64 << 20;

/// Reads and parses a request's body of at most so many bytes.
pub(in crate::server) async fn read_json<T: DeserializeOwned>(
    request: Request,
    most: usize,
) -> Result<T, ApiError> {
    let content_type =
        request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let message = "send the body as JSON with the header `Content-Type: application/json`".to_string();
        return Err(ApiError::http(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let announced = announced(&request);
    // Whoever asks first has sent nothing yet.
    let asks = request.headers().contains_key(header::EXPECT);
    if announced > DRAINED || (asks && announced > most) {
        return Err(too_large(most));
    }
    match tokio::time::timeout(BODY_TIMEOUT, read(request, most)).await {
        Ok(bytes) => parse(&bytes?),
        Err(_) if announced > most => Err(too_large(most)),
        Err(_) => {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::http(StatusCode::REQUEST_TIMEOUT, "request_timeout", message))
        }
    }
}

/// The length that the client says, 0 if it says none.
fn announced(request: &Request) -> usize {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    length.and_then(|length| length.parse().ok()).unwrap_or(0)
}

async fn read(request: Request, most: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::with_capacity(announced(&request).min(most));
    let mut length = 0usize;
    let mut body = request.into_body().into_data_stream();
    while let Some(piece) = poll_fn(|context| Pin::new(&mut body).poll_next(context)).await {
        let piece = piece.map_err(|_| ApiError::malformed("the body could not be read".into()))?;
        length = length.saturating_add(piece.len());
        if length <= most {
            bytes.extend_from_slice(&piece);
        } else {
            bytes = Vec::new();
        }
        if length > DRAINED {
            break;
        }
    }
    if length > most { Err(too_large(most)) } else { Ok(bytes) }
}

fn too_large(most: usize) -> ApiError {
    let message = format!("the body is larger than the {most} bytes that the server accepts");
    ApiError::http(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
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
