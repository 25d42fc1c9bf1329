//! The background scrub: reads everything every image has here, image after image, at a bounded rate, and
//! repairs what is damaged. One thread; an operator may ask for an image to be next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmfs_common::{ImageId, msg};
use vmfs_store::{BadPayload, ScrubProgress, StoreError};

use super::NodeInner;
use super::image::Image;

/// Key of the times of the last scrubs among the images' meta records.
const SCRUB_META: ImageId = ImageId::from_bytes([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
/// How often the thread looks whether there is something to do.
const LOOK: Duration = Duration::from_millis(200);
/// Read at a time, when the rate allows it.
const STEP_BYTES_MAX: u64 = 1 << 20;
/// Steps in a second at least, so that the load is even.
const STEPS_PER_SECOND: u64 = 8;
/// While guests write more than this in a second, the scrub goes at a quarter of its rate.
const BUSY_BYTES_PER_S: u64 = 8 << 20;
/// Rate of a scrub that was asked for while the background scrub is off.
const ASKED_RATE_BYTES: u64 = 64 << 20;
/// Damaged payload without a good copy is asked for again after this.
const RETRY: Duration = Duration::from_secs(20);
/// Damaged payload remembered for another attempt, per image; the rest waits for the next scrub.
const WAITING_MAX: usize = 4096;
/// A scrub that was given up is begun again after this.
const GIVEN_UP_MS: u64 = 3_600_000;
/// A step that failed is tried again so often before the scrub is given up.
const FAILURES_MAX: u32 = 3;

/// What is known of the scrubs of one image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ScrubState {
    /// Scrubs that ran to their end since the daemon started.
    pub(crate) finished: u64,
    /// From when on the interval counts, ms since 1970: the end of the last one, or when the image was first
    /// seen; 0 before that.
    since_ms: u64,
    /// When the last whole one ended, ms since 1970.
    pub(crate) ended_ms: Option<u64>,
    /// The one under way.
    pub(crate) running: Option<ScrubProgress>,
    /// Bytes that the last one read.
    pub(crate) last_read_bytes: u64,
    /// Why the last one was given up.
    pub(crate) error: Option<String>,
}

/// What lies on the disk beside the store: its name, and how it is looked at (true: it was repaired).
type Beside = (&'static str, Box<dyn Fn() -> Result<bool, String> + Send + Sync>);

/// The scrubs of all images.
#[derive(Default)]
pub(crate) struct Scrubs {
    /// What operators asked for, and at which rate in bytes a second.
    asked: Mutex<VecDeque<(ImageId, Option<u64>)>>,
    states: Mutex<BTreeMap<ImageId, ScrubState>>,
    beside: Mutex<Vec<Beside>>,
}

impl Scrubs {
    /// Has an image scrubbed next, from its beginning. The returned number of finished scrubs grows when
    /// that is done.
    pub(crate) fn ask(&self, image: ImageId, rate_bytes: Option<u64>) -> u64 {
        let mut asked = self.asked.lock();
        asked.retain(|(id, _)| *id != image);
        asked.push_back((image, rate_bytes));
        self.state(image).finished
    }
    pub(crate) fn state(&self, image: ImageId) -> ScrubState {
        self.states.lock().get(&image).cloned().unwrap_or_default()
    }
    fn change(&self, image: ImageId, f: impl FnOnce(&mut ScrubState)) {
        f(self.states.lock().entry(image).or_default());
    }
    fn take_asked(&self, only: Option<ImageId>) -> Option<(ImageId, Option<u64>)> {
        let mut asked = self.asked.lock();
        match only {
            None => asked.pop_front(),
            Some(image) => {
                let at = asked.iter().position(|(id, _)| *id == image)?;
                asked.remove(at)
            }
        }
    }
}

impl NodeInner {
    fn load_scrub_times(&self) {
        let record = self.store.get_meta(SCRUB_META);
        let times: Vec<(ImageId, u64, Option<u64>)> =
            record.and_then(|r| msg::decode(&r).ok()).unwrap_or_default();
        for (image, since_ms, ended_ms) in times {
            self.scrubs.change(image, |s| (s.since_ms, s.ended_ms) = (since_ms, ended_ms));
        }
    }

    fn save_scrub_times(&self) {
        let images: Vec<ImageId> = self.images().iter().map(|i| i.id).collect();
        let mut states = self.scrubs.states.lock();
        states.retain(|id, _| images.contains(id));
        let times: Vec<_> = states.iter().map(|(id, s)| (*id, s.since_ms, s.ended_ms)).collect();
        drop(states);
        if let Err(e) = self.store.put_meta(SCRUB_META, &msg::encode(&times)) {
            tracing::warn!("cannot remember when images were scrubbed: {e}");
        }
    }

    /// Scrubs until the node stops. Runs on a thread of its own.
    pub(super) fn scrub(self: &Arc<Self>) {
        self.load_scrub_times();
        let mut waiting: BTreeMap<ImageId, Vec<BadPayload>> = BTreeMap::new();
        let mut retried = Instant::now();
        while !*self.stopping().borrow() {
            if let Some((id, rate)) = self.scrubs.take_asked(None).or_else(|| self.next_due()) {
                if let Some(image) = self.image(id) {
                    let left = self.scrub_image(&image, rate);
                    waiting.insert(id, left);
                    self.save_scrub_times();
                }
                continue;
            }
            if retried.elapsed() >= RETRY {
                for (id, bad) in &mut waiting {
                    match self.image(*id) {
                        Some(image) => bad.retain(|b| !image.repair_payload_now(b)),
                        None => bad.clear(),
                    }
                }
                waiting.retain(|_, bad| !bad.is_empty());
                retried = Instant::now();
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The image whose last scrub is longest ago, when that is longer than the interval.
    fn next_due(&self) -> Option<(ImageId, Option<u64>)> {
        let store = &self.config.store;
        let (rate, interval_ms) = (store.scrub_rate.bytes(), store.scrub_interval.millis());
        if rate == 0 || interval_ms == 0 {
            return None;
        }
        let now_ms = super::unix_ns() / 1_000_000;
        let (mut due, mut is_new) = (None, false);
        for image in self.images() {
            let mut since_ms = 0;
            self.scrubs.change(image.id, |s| {
                if s.since_ms == 0 || s.since_ms > now_ms {
                    s.since_ms = now_ms;
                    is_new = true;
                }
                since_ms = s.since_ms;
            });
            if now_ms - since_ms >= interval_ms && due.is_none_or(|(since, _)| since_ms < since) {
                due = Some((since_ms, image.id));
            }
        }
        if is_new {
            // A daemon that is restarted more often than the interval would never come to it.
            self.save_scrub_times();
        }
        due.map(|(_, id)| (id, None))
    }

    /// One whole scrub. Returns the damaged payload that nobody could replace yet.
    fn scrub_image(self: &Arc<Self>, image: &Arc<Image>, asked_rate: Option<u64>) -> Vec<BadPayload> {
        let configured = Some(self.config.store.scrub_rate.bytes()).filter(|r| *r > 0);
        let mut rate = asked_rate.or(configured).unwrap_or(ASKED_RATE_BYTES);
        let mut left = Vec::new();
        let mut scrub = image.store.begin_scrub();
        let (mut pace, mut failures, mut shared_done) = (Pace::new(self), 0, false);
        let error = loop {
            if *self.stopping().borrow() || self.image(image.id).is_none() {
                break Some("stopped".to_owned());
            }
            if let Some((_, again)) = self.scrubs.take_asked(Some(image.id)) {
                // Whoever asks wants to know what is true from now on.
                rate = again.unwrap_or(rate);
                scrub = image.store.begin_scrub();
                left.clear();
                shared_done = false;
            }
            let step = (rate / STEPS_PER_SECOND).clamp(4096, STEP_BYTES_MAX);
            let before = self.scrubs.state(image.id).running.map_or(0, |p| p.read_bytes);
            let stepped = self.shared_first(&mut shared_done).and_then(|()| scrub.step(step));
            left.extend(scrub.take_bad().into_iter().filter(|bad| !image.repair_payload_now(bad)));
            match stepped {
                Ok(progress) => {
                    self.scrubs.change(image.id, |s| s.running = Some(progress));
                    if progress.finished {
                        break None;
                    }
                    failures = 0;
                    pace.wait(self, progress.read_bytes.saturating_sub(before), rate);
                }
                Err(e @ StoreError::Latched { .. }) => break Some(e.to_string()),
                Err(e) => {
                    failures += 1;
                    if failures > FAILURES_MAX {
                        break Some(e.to_string());
                    }
                    std::thread::sleep(LOOK);
                }
            }
        };
        self.note_scrub(image, error);
        left.truncate(WAITING_MAX);
        left
    }

    /// What all images share is looked at with each of them, once.
    fn shared_first(&self, done: &mut bool) -> Result<(), StoreError> {
        if std::mem::replace(done, true) {
            return Ok(());
        }
        for (what, look) in self.scrubs.beside.lock().iter() {
            match look() {
                Ok(true) => self.store.note_mended(what),
                Ok(false) => {}
                Err(e) => tracing::warn!("{what} cannot be scrubbed: {e}"),
            }
        }
        self.store.scrub_shared().inspect_err(|_| *done = false)
    }

    /// Notes that something beside the store was damaged and has been repaired.
    pub fn note_mended(&self, what: &str) {
        self.store.note_mended(what);
    }

    /// Has something beside the store looked at with every scrub.
    pub fn also_scrub(
        &self,
        what: &'static str,
        look: impl Fn() -> Result<bool, String> + Send + Sync + 'static,
    ) {
        self.scrubs.beside.lock().push((what, Box::new(look)));
    }

    fn note_scrub(&self, image: &Image, error: Option<String>) {
        if let Some(why) = &error {
            tracing::warn!(image = %image.id, "scrub given up: {why}");
        }
        let now_ms = super::unix_ns() / 1_000_000;
        let interval_ms = self.config.store.scrub_interval.millis();
        self.scrubs.change(image.id, |s| {
            s.last_read_bytes = s.running.take().map_or(0, |p| p.read_bytes);
            if error.is_none() {
                (s.since_ms, s.ended_ms) = (now_ms, Some(now_ms));
            } else {
                s.since_ms = now_ms.saturating_sub(interval_ms).saturating_add(GIVEN_UP_MS).min(now_ms);
            }
            s.error = error;
            s.finished += 1;
        });
    }
}

/// Keeps the scrub to its rate, and out of the way of guests.
struct Pace {
    last: Instant,
    appended: u64,
}

impl Pace {
    fn new(node: &NodeInner) -> Self {
        Self { last: Instant::now(), appended: node.appended_bytes.load(Ordering::Relaxed) }
    }
    /// Waits as long as reading `bytes` should have taken.
    fn wait(&mut self, node: &NodeInner, bytes: u64, rate: u64) {
        let appended = node.appended_bytes.load(Ordering::Relaxed);
        let written = appended - std::mem::replace(&mut self.appended, appended);
        let took = self.last.elapsed();
        let busy = u128::from(written) * 1000 > u128::from(BUSY_BYTES_PER_S) * took.as_millis().max(1);
        let rate = if busy { rate / 4 } else { rate }.max(1);
        let due = Duration::from_micros(bytes.saturating_mul(1_000_000) / rate);
        let stopping = node.stopping();
        while self.last.elapsed() < due && !*stopping.borrow() {
            std::thread::sleep((due - self.last.elapsed().min(due)).min(LOOK));
        }
        self.last = Instant::now();
    }
}

impl Image {
    /// Replaces one damaged payload block from another member. True when there is nothing left to be done.
    /// Called from a thread that is not of the runtime.
    fn repair_payload_now(self: &Arc<Self>, bad: &BadPayload) -> bool {
        let node = self.node();
        node.runtime().block_on(self.repair_payload(bad))
    }
}
