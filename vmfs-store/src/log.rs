//! An image's log: the chain of segments and its tail.

use std::collections::VecDeque;
use std::sync::Arc;

use vmfs_common::header::Update;
use vmfs_common::state::ImageState;
use vmfs_common::{Head, Seq};

use crate::error::StoreError;
use crate::pool::Spare;
use crate::records::{Next, Record, Records};
use crate::segment::Segment;
use crate::shared::Shared;
use crate::writer::{LogPos, SegmentWriter};

/// A segment of the log: it holds the updates after `start_seq` up to the next one's `start_seq`.
#[derive(Clone)]
pub(crate) struct ChainSegment {
    pub(crate) seg: Arc<Segment>,
    pub(crate) ordinal: u64,
    pub(crate) start_seq: Seq,
}

/// The end of the log, and the state there. Guarded by the image's append lock.
pub(crate) struct Tail {
    pub(crate) state: Arc<ImageState>,
    pub(crate) chain: Arc<Vec<ChainSegment>>,
    pub(crate) current: Option<SegmentWriter>,
    /// Full segments that are not completely on disk yet, oldest first.
    pub(crate) closing: Vec<SegmentWriter>,
    /// Segments that reservations need, in order.
    pub(crate) spares: VecDeque<Spare>,
    pub(crate) log_start: Seq,
    /// Bytes of log ever written to the present chain; the class of new segments follows it.
    pub(crate) log_bytes: u64,
    pub(crate) bytes_since_checkpoint: u64,
    /// Where the log ends in the last segment of the chain, while there is no current one.
    pub(crate) end: Option<LogPos>,
    /// New segments count only once a checkpoint lists them.
    pub(crate) shadow: bool,
    pub(crate) crcs: Vec<u32>,
}

impl Tail {
    /// Of an image without updates.
    pub(crate) fn new(state: ImageState) -> Self {
        Self {
            state: Arc::new(state),
            chain: Arc::default(),
            current: None,
            closing: Vec::new(),
            spares: VecDeque::new(),
            log_start: Seq(1),
            log_bytes: 0,
            bytes_since_checkpoint: 0,
            end: None,
            shadow: false,
            crcs: Vec::new(),
        }
    }
    pub(crate) fn head(&self) -> Head {
        self.state.head()
    }
    /// Where the next record goes, for a checkpoint at the head.
    pub(crate) fn position(&self) -> Option<LogPos> {
        self.current.as_ref().map_or(self.end, |w| Some(w.position()))
    }
    /// All writers, oldest first.
    pub(crate) fn writers(&mut self) -> impl Iterator<Item = &mut SegmentWriter> {
        self.closing.iter_mut().chain(self.current.as_mut())
    }
}

/// Calls `f` with the log's updates `from..=end` and their records, until it returns false.
///
/// # Errors
/// [`StoreError::Corrupt`] when the log does not hold together, or the disk's.
pub(crate) fn walk(
    shared: &Shared,
    chain: &[ChainSegment],
    from: Seq,
    end: Seq,
    mut f: impl FnMut(&Arc<Segment>, Record, Update) -> Result<bool, StoreError>,
) -> Result<(), StoreError> {
    let mut want = from;
    let first = chain.partition_point(|c| c.start_seq < from).saturating_sub(1);
    for (i, part) in chain.iter().enumerate().skip(first) {
        let last = chain.get(i + 1).map_or(end, |n| n.start_seq.min(end));
        if want > last {
            continue;
        }
        let damaged = || StoreError::corrupt(format!("the log at update {want}"));
        let records = Records::from_index(shared, &part.seg, |e| e.start.seq <= want.0)?;
        let mut records = records.ok_or_else(damaged)?;
        while want <= last {
            let Next::Record(record) = records.next()? else {
                return Err(StoreError::corrupt(format!("the log at update {want}")));
            };
            let seq = record.seq().ok_or_else(|| StoreError::corrupt(format!("the log at update {want}")))?;
            if seq < want {
                continue;
            }
            let update = record.update()?;
            if seq > want {
                return Err(StoreError::corrupt(format!("the log at update {want}")));
            }
            if !f(&part.seg, record, update)? {
                return Ok(());
            }
            want = want.next();
        }
    }
    if want <= end { Err(StoreError::corrupt(format!("the log at update {want}"))) } else { Ok(()) }
}
