//! Why a command did not do what was asked: one line, and the exit code.

use std::fmt;
use std::process::ExitCode;

use vmfs_replica::api::{ApiError, ErrorCode};

/// A failed command. The line is printed to standard error by `main` and nowhere else.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CliError {
    message: String,
    code: u8,
}

pub(crate) type CliResult<T = ()> = Result<T, CliError>;

impl CliError {
    /// Exit code 1.
    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self { message: one_line(&message.to_string()), code: ErrorCode::Failed.exit_code() }
    }
    /// Exit code 2.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self { message: one_line(&message.to_string()), code: ErrorCode::Usage.exit_code() }
    }
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> Self {
        Self { message: one_line(&error.message), code: error.code.exit_code() }
    }
}

/// `vmfs` promises one line; causes from elsewhere may have more.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use vmfs_replica::daemon::usage_line;

    use super::*;

    #[test]
    fn errors_are_one_line_whatever_they_were_made_of() {
        assert_eq!(CliError::failed("a\n\n  b\n").to_string(), "a; b");
        for line in ["promote", "frob", "up d --hosts 9", "policy set x --acks most", "status --wath"] {
            let words = std::iter::once("vmfs").chain(line.split(' '));
            let error = crate::args::Cli::try_parse_from(words).unwrap_err();
            let text = usage_line(&error);
            assert!(!text.contains('\n') && !text.is_empty() && !text.starts_with("error"), "{text}");
        }
    }

    #[test]
    fn api_refusals_keep_their_exit_code() {
        for (error, code) in [
            (ApiError::failed("x"), 1),
            (ApiError::not_found("x"), 1),
            (ApiError::usage("x"), 2),
            (ApiError::no_quorum("x"), 3),
        ] {
            assert_eq!(CliError::from(error).code, code);
        }
    }
}
