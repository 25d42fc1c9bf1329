//! What a refusal looks like to a client.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

/// Why a request was not done. Decides the exit code of the `vmfs` command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// It was tried, or could not be tried; exit code 1.
    Failed,
    /// The request itself is wrong; exit code 2.
    Usage,
    /// Refused for lack of a quorum; exit code 3.
    NoQuorum,
    /// No such image, host or fork; exit code 1.
    NotFound,
}

impl ErrorCode {
    /// The exit code that scripts see.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed | Self::NotFound => 1,
            Self::Usage => 2,
            Self::NoQuorum => 3,
        }
    }

    const fn http(self) -> StatusCode {
        match self {
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Usage => StatusCode::BAD_REQUEST,
            Self::NoQuorum => StatusCode::CONFLICT,
            Self::NotFound => StatusCode::NOT_FOUND,
        }
    }
}

/// A request that was not done: one line for people, one code for programs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct ApiError {
    /// What kind of refusal.
    pub code: ErrorCode,
    /// One line that names what is wrong.
    pub message: String,
}

impl ApiError {
    /// [`ErrorCode::Failed`]
    pub fn failed(message: impl ToString) -> Self {
        Self { code: ErrorCode::Failed, message: message.to_string() }
    }
    /// [`ErrorCode::Usage`]
    pub fn usage(message: impl ToString) -> Self {
        Self { code: ErrorCode::Usage, message: message.to_string() }
    }
    /// [`ErrorCode::NoQuorum`]
    pub fn no_quorum(message: impl ToString) -> Self {
        Self { code: ErrorCode::NoQuorum, message: message.to_string() }
    }
    /// [`ErrorCode::NotFound`]
    pub fn not_found(message: impl ToString) -> Self {
        Self { code: ErrorCode::NotFound, message: message.to_string() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.code.http(), Json(self)).into_response()
    }
}
