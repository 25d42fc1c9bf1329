//! How long work reports on itself: one JSON document a line, the last one the result.

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::error::ApiError;

/// Reports a client has not read yet; further ones are dropped, since a newer one supersedes them.
const PROGRESS_BACKLOG_MAX: usize = 16;

/// What [`ProgressEvent`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Updates of the chain.
    Updates,
    /// Members of the image.
    Members,
}

/// How far a piece of work is. Rate and time to go are the reader's to work out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressEvent {
    /// What is being done, in a word or two ("collecting votes").
    pub stage: String,
    /// How much of it is done.
    pub done: u64,
    /// How much there is to do; absent while nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// What is counted.
    pub unit: Unit,
}

/// One line of a streamed answer: any number of `progress`, then one `done` or `error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamLine<T> {
    /// How far the work is.
    Progress(ProgressEvent),
    /// The result; the last line.
    Done(T),
    /// Why there is none; the last line.
    Error(ApiError),
}

/// Where a piece of work reports to. Cheap to clone; reporting never waits.
#[derive(Debug, Clone)]
pub struct Progress(mpsc::Sender<ProgressEvent>);

impl Progress {
    /// A reporter and what it reports to.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<ProgressEvent>) {
        let (sender, receiver) = mpsc::channel(PROGRESS_BACKLOG_MAX);
        (Self(sender), receiver)
    }

    /// A reporter nobody listens to.
    #[must_use]
    pub fn ignored() -> Self {
        Self::channel().0
    }

    /// Reports; dropped when the reader is behind or gone.
    pub fn report(&self, stage: impl Into<String>, done: u64, total: Option<u64>, unit: Unit) {
        // A full channel means that the reader will be shown a later report instead.
        let _ = self.0.try_send(ProgressEvent { stage: stage.into(), done, total, unit });
    }
}
