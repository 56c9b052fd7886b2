//! The other end of `admin`: having a running server register sub-networks.

use crate::artifact::CatalogLine;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Request, Uri, header, uri::Scheme};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

/// A server registers within milliseconds; this one does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers are a few hundred bytes.
const MOST_BYTES: usize = 1 << 20;

/// Why a running server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    #[error("{url}: expected http://HOST:PORT")]
    Url { url: String },
    #[error("the admin key has a character that no HTTP header can carry")]
    Key,
    #[error("{server}: {source}")]
    Connection { server: String, source: io::Error },
    #[error("{server} answered {status}: {message}")]
    Refused { server: String, status: u16, message: String },
}

/// A server that runs somewhere, and the key that opens it.
#[derive(Debug)]
pub struct RunningServer {
    /// Host and port.
    authority: String,
    /// What stands before the API's own paths, e.g. behind a proxy.
    prefix: String,
    authorization: HeaderValue,
}

impl RunningServer {
    /// # Errors
    /// A URL that is not `http://HOST:PORT`, perhaps with a path; a key that no header can carry.
    pub fn new(url: &str, admin_key: &str) -> Result<Self, ClientError> {
        let wrong = || ClientError::Url { url: url.into() };
        let uri = url.parse::<Uri>().map_err(|_| wrong())?;
        let authority = uri.authority().filter(|_| uri.scheme() == Some(&Scheme::HTTP)).ok_or_else(wrong)?;
        let prefix = uri.path().trim_end_matches('/');
        if uri.query().is_some() || authority.as_str().contains('@') {
            return Err(wrong());
        }
        let port = authority.port_u16().unwrap_or(80);
        let authorization = format!("Bearer {admin_key}");
        let mut authorization = HeaderValue::try_from(authorization).map_err(|_| ClientError::Key)?;
        authorization.set_sensitive(true);
        Ok(Self { authority: format!("{}:{port}", authority.host()), prefix: prefix.into(), authorization })
    }

    /// Makes a sub-network of the super-adapter `model` one that can be asked for there.
    ///
    /// # Errors
    /// A server that cannot be reached, does not answer, or refuses; its own words are the message.
    pub async fn register(&self, model: &str, line: &CatalogLine) -> Result<(), ClientError> {
        let connection = |source| ClientError::Connection { server: self.authority.clone(), source };
        let mut body = serde_json::to_value(line).map_err(|e| connection(e.into()))?;
        body["model"] = json!(model);
        let asked = tokio::time::timeout(PATIENCE, self.post(&body)).await;
        let (status, text) = asked.map_err(|late| connection(late.into()))?.map_err(connection)?;
        if (200..300).contains(&status) {
            return Ok(());
        }
        let error = serde_json::from_slice::<Value>(&text).unwrap_or_default();
        let message = error["error"]["message"].as_str().unwrap_or("not a lonas server?").to_string();
        Err(ClientError::Refused { server: self.authority.clone(), status, message })
    }

    /// Status and body of the answer to a registration.
    async fn post(&self, body: &Value) -> io::Result<(u16, Vec<u8>)> {
        let stream = TcpStream::connect(&self.authority).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // It ends when the sender is dropped; what goes wrong before, the sender says.
        tokio::spawn(async move { drop(connection.await) });
        let request = Request::post(format!("{}/v1/subnetworks", self.prefix))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, &self.authorization)
            .body(Body::from(body.to_string()))
            .map_err(io::Error::other)?;
        let answer = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = answer.status().as_u16();
        let text = to_bytes(Body::new(answer.into_body()), MOST_BYTES).await.map_err(io::Error::other)?;
        Ok((status, text.to_vec()))
    }
}
