//! What one host has to say to one peer, as the engine's lines keep it: control messages overtake
//! updates, except `Sync`, which waits until the stream has passed its update.

use std::collections::VecDeque;

use vmfs_common::Seq;
use vmfs_common::msg::ImageMsg;
use vmfs_store::LogEntry;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Feed {
    pub(crate) next: Seq,
    pub(crate) headers_only: bool,
    pub(crate) upto: Option<Seq>,
}

#[derive(Debug)]
pub(crate) enum Work {
    Message(ImageMsg),
    /// Read from the log.
    Read(Feed, bool),
    /// Send an update that was read.
    Item(LogEntry, bool),
    Idle,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Line {
    pub(crate) messages: VecDeque<ImageMsg>,
    pub(crate) feed: Option<Feed>,
    pub(crate) serve: Option<Feed>,
    pub(crate) sync: Option<(Seq, Seq, Seq)>,
    /// Read and not yet sent, with the feed it was read for.
    pub(crate) batch: VecDeque<LogEntry>,
    pub(crate) batch_of: Option<(Feed, bool)>,
    pub(crate) sent: Option<Seq>,
    /// A pump event is under way.
    pub(crate) pumping: bool,
}

impl Line {
    pub(crate) fn sync(&mut self, seq: Seq, commit: Seq) {
        let (low, high) = self.sync.map_or((seq, seq), |(l, h, _)| (l.min(seq), h.max(seq)));
        self.sync = Some((low, high, commit));
    }
    pub(crate) fn stop_feed(&mut self) {
        self.feed = None;
        self.sync = None;
    }

    pub(crate) fn next_work(&mut self, head: Seq) -> Work {
        if let Some(m) = self.messages.pop_front() {
            return Work::Message(m);
        }
        if let Some((feed, serving)) = self.batch_of {
            if let Some(entry) = self.batch.pop_front() {
                let seq = entry.update.header.seq;
                if feed.upto.is_none_or(|u| seq <= u) && self.advance(feed, seq, serving) {
                    return Work::Item(entry, serving);
                }
            }
            self.batch.clear();
            self.batch_of = None;
        }
        if let (Some(feed), Some((low, high, commit))) = (self.feed, self.sync)
            && feed.next > low
        {
            let seq = high.min(feed.next.prev());
            self.sync = (high > seq).then_some((high, high, commit));
            return Work::Message(ImageMsg::Sync { seq, commit });
        }
        if let Some(serve) = self.serve {
            if serve.upto.is_some_and(|u| serve.next <= u) {
                return Work::Read(serve, true);
            }
            self.serve = None;
        }
        match self.feed {
            Some(feed) if feed.next <= head => Work::Read(feed, false),
            _ => Work::Idle,
        }
    }

    /// Moves the feed past `seq`; false when it was stopped or restarted meanwhile.
    fn advance(&mut self, feed: Feed, seq: Seq, serving: bool) -> bool {
        let slot = if serving { &mut self.serve } else { &mut self.feed };
        match slot {
            Some(f) if f.next == seq && f.headers_only == feed.headers_only => {
                f.next = seq.next();
                if !serving {
                    self.sent = Some(seq);
                }
                true
            }
            _ => false,
        }
    }
}
