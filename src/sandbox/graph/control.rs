//! The API of the simulated service for tests: its settings, its faults, what it was asked.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use axum::{Json, Router};
use serde_json::Value;

use super::Service;
use super::faults::Fault;

/// `/api/v1/settings` (GET, PATCH), `/api/v1/faults` (GET, POST, DELETE), `/api/v1/requests` (GET, DELETE),
/// `/api/v1/tokens` (DELETE).
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/api/v1/settings", get(settings).patch(change))
        .route("/api/v1/faults", get(faults).post(add_fault).delete(clear_faults))
        .route("/api/v1/requests", get(requests).delete(clear_requests))
        .route("/api/v1/tokens", delete(revoke))
        .with_state(service)
}

type Shared = State<Arc<Service>>;

async fn settings(State(service): Shared) -> Response {
    Json(service.settings().as_ref().clone()).into_response()
}

async fn change(State(service): Shared, Json(change): Json<Value>) -> Response {
    match service.settings().patched(&change) {
        Ok(settings) => {
            service.set(settings.clone());
            Json(settings).into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn faults(State(service): Shared) -> Json<Vec<Fault>> {
    Json(service.faults.all())
}

/// One fault, or a list of them.
async fn add_fault(State(service): Shared, Json(json): Json<Value>) -> Response {
    let list = if json.is_array() { json } else { Value::Array(vec![json]) };
    match serde_json::from_value::<Vec<Fault>>(list) {
        Ok(faults) => {
            for fault in faults {
                service.fault(fault);
            }
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn clear_faults(State(service): Shared) -> StatusCode {
    service.faults.clear();
    StatusCode::NO_CONTENT
}

async fn requests(State(service): Shared) -> Response {
    Json(serde_json::json!({ "requests": service.requests() })).into_response()
}

async fn clear_requests(State(service): Shared) -> StatusCode {
    service.records.clear();
    StatusCode::NO_CONTENT
}

async fn revoke(State(service): Shared) -> StatusCode {
    service.revoke_tokens();
    StatusCode::NO_CONTENT
}
