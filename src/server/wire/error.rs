//! The one shape of every error: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// An error as the client sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(in crate::server) status: StatusCode,
    pub(in crate::server) message: String,
    pub(in crate::server) param: Option<String>,
    pub(in crate::server) code: Option<&'static str>,
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, message: String) -> Self {
        Self { status, message, param: None, code: None, retry_after: None }
    }

    /// 400: the named field has a value that cannot be served.
    pub(in crate::server) fn invalid(param: &str, message: String) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 400 about the body as a whole.
    pub(in crate::server) fn malformed(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400: prompt and answer do not fit into the context together.
    pub(in crate::server) fn too_long(param: &str, message: String) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// 400: the models here do something else.
    pub(in crate::server) fn wrong_task(message: &str) -> Self {
        Self { code: Some("unsupported_task"), ..Self::invalid("model", message.into()) }
    }

    /// 401: `key` is the kind of key that is needed.
    pub(in crate::server) fn unauthorized(key: &str) -> Self {
        let message = format!("missing or wrong {key}: send it as `Authorization: Bearer KEY`");
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// 404: no such model or sub-network.
    pub(in crate::server) fn no_model(param: &str, message: String) -> Self {
        let param = Some(param.into());
        Self { param, code: Some("model_not_found"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    /// 403: the server was started without what this needs.
    pub(in crate::server) fn forbidden(code: &'static str, message: String) -> Self {
        Self { code: Some(code), ..Self::new(StatusCode::FORBIDDEN, message) }
    }

    /// 409: what there is stands in the way.
    pub(in crate::server) fn conflict(code: &'static str, param: Option<&str>, message: String) -> Self {
        let param = param.map(String::from);
        Self { param, code: Some(code), ..Self::new(StatusCode::CONFLICT, message) }
    }

    /// Any other status that HTTP itself asks for.
    pub(in crate::server) fn http(status: StatusCode, code: &'static str, message: String) -> Self {
        Self { code: Some(code), ..Self::new(status, message) }
    }

    /// 503: try again a little later.
    pub(in crate::server) fn unavailable(code: &'static str, message: String) -> Self {
        let base = Self::new(StatusCode::SERVICE_UNAVAILABLE, message);
        Self { code: Some(code), retry_after: Some(1), ..base }
    }

    /// 500; what went wrong stands in the log.
    pub(in crate::server) fn internal() -> Self {
        let message = "the server failed to answer this request; its log says why".to_string();
        Self { code: Some("internal_error"), ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, message) }
    }

    /// The body, also as an event within a stream.
    pub(in crate::server) fn to_json(&self) -> Value {
        let kind = if self.status.is_server_error() { "server_error" } else { "invalid_request_error" };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            // The same request would fail again; OpenAI's clients obey this header.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
