//! The headers in which gateways pass on how fast an answer must be (llm-d, Kubernetes' inference gateways): the same bounds
//! as `elastic.max_ttft_ms` and `elastic.max_tpot_ms`.

use super::{ApiError, ElasticFields};
use axum::http::HeaderMap;

const TTFT: &str = "x-slo-ttft-ms";
const TPOT: &str = "x-slo-tpot-ms";

/// Bounds that came in headers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(in crate::server) struct Slo {
    ttft: Option<f64>,
    tpot: Option<f64>,
}

impl Slo {
    /// # Errors
    /// A header that is no number of milliseconds, or that says two things.
    pub(in crate::server) fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        Ok(Self { ttft: milliseconds(headers, TTFT)?, tpot: milliseconds(headers, TPOT)? })
    }

    /// # Errors
    /// A bound on each generated token, where there are none.
    pub(in crate::server) fn of_whole_answer(headers: &HeaderMap) -> Result<Self, ApiError> {
        match Self::of(headers)? {
            Self { tpot: Some(_), .. } => {
                let message = format!("{TPOT} is about generated tokens, of which a classification has none");
                Err(ApiError::invalid(TPOT, message))
            }
            slo => Ok(slo),
        }
    }

    /// What the body asks for and what the headers do.
    ///
    /// # Errors
    /// Both bound the same and differ.
    pub(in crate::server) fn with(
        self,
        body: Option<ElasticFields>,
    ) -> Result<Option<ElasticFields>, ApiError> {
        if self == Self::default() {
            return Ok(body);
        }
        let mut elastic = body.unwrap_or_default();
        let bounds = [
            (TTFT, self.ttft, "elastic.max_ttft_ms", &mut elastic.max_ttft_ms),
            (TPOT, self.tpot, "elastic.max_tpot_ms", &mut elastic.max_tpot_ms),
        ];
        for (header, asked, field, bound) in bounds {
            match (asked, *bound) {
                (Some(asked), Some(given)) if asked != given => {
                    let message = format!("{header} says {asked} milliseconds, {field} {given}");
                    return Err(ApiError::invalid(header, message));
                }
                (asked, given) => *bound = asked.or(given),
            }
        }
        Ok(Some(elastic))
    }
}

fn milliseconds(headers: &HeaderMap, name: &'static str) -> Result<Option<f64>, ApiError> {
    const MOST: f64 = 1e9;
    let mut found = None;
    for value in headers.get_all(name) {
        let number = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
        let Some(number) = number.filter(|n| *n > 0.0 && *n <= MOST) else {
            let message = format!("{name} must be a number of milliseconds above 0 and at most {MOST}");
            return Err(ApiError::invalid(name, message));
        };
        if found.is_some_and(|other| other != number) {
            return Err(ApiError::invalid(name, format!("{name} came twice, with different numbers")));
        }
        found = Some(number);
    }
    Ok(found)
}
