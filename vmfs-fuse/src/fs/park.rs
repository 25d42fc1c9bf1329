//! Operations that the engine cannot do now: copied, parked per image, tried again when it says.
//!
//! Bounds: [`PARKED_OPS_MAX`] operations and [`PARKED_BYTES_MAX`] bytes of data over all images;
//! beyond, an operation that would have to wait answers `EAGAIN` at once. The kernel itself keeps
//! at most `max_background` asynchronous requests outstanding, and one per calling thread.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use vmfs_common::ids::ImageId;

use super::data::{DataOp, Outcome};
use super::wait::Pending;
use crate::backend::{Attempt, Backend, Errno};

/// Most operations parked at a time.
pub const PARKED_OPS_MAX: usize = 4096;
/// Most bytes of data parked at a time.
pub const PARKED_BYTES_MAX: usize = 256 << 20;
/// Pause after a wake-up that brought nothing, so that an eager engine does not spin.
const FUTILE_PAUSE: Duration = Duration::from_millis(2);

/// A data operation whose reply is owed.
pub(crate) struct Parked {
    pub(crate) op: DataOp,
    pub(crate) pending: Arc<Pending<Outcome>>,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<Parked>,
    /// The engine was asked for a wake-up that has not come.
    armed: bool,
}

#[derive(Default)]
struct State {
    queues: HashMap<ImageId, Queue>,
    ready: VecDeque<ImageId>,
    ops: usize,
    bytes: usize,
    closed: bool,
}

/// The parking place. See the module.
#[derive(Default)]
pub(crate) struct Park {
    state: Mutex<State>,
    changed: Condvar,
}

impl Park {
    /// Parks an operation of image `id`.
    pub(crate) fn park<B: Backend>(self: &Arc<Self>, backend: &B, id: ImageId, parked: Parked) {
        let bytes = parked.op.held_bytes();
        {
            let mut state = self.state.lock();
            if state.closed || state.ops >= PARKED_OPS_MAX || state.bytes + bytes > PARKED_BYTES_MAX {
                let errno = if state.closed { Errno::IO } else { Errno::AGAIN };
                drop(state);
                parked.pending.finish(Err(errno));
                return;
            }
            state.ops += 1;
            state.bytes += bytes;
            state.queues.entry(id).or_default().ops.push_back(parked);
        }
        self.arm(backend, id);
    }

    fn arm<B: Backend>(self: &Arc<Self>, backend: &B, id: ImageId) {
        match self.state.lock().queues.get_mut(&id) {
            Some(queue) if !queue.armed => queue.armed = true,
            _ => return,
        }
        let park = self.clone();
        backend.notify_ready(id, Box::new(move || park.wake(id)));
    }

    fn wake(&self, id: ImageId) {
        let mut state = self.state.lock();
        if let Some(queue) = state.queues.get_mut(&id) {
            queue.armed = false;
            state.ready.push_back(id);
            self.changed.notify_one();
        }
    }

    /// Ends [`Park::run`]. The replies still owed are failed by `Waits::close`.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.queues.clear();
        self.changed.notify_all();
    }

    /// Tries parked operations again, first come first served per image, until closed.
    pub(crate) fn run<B: Backend>(
        self: &Arc<Self>,
        backend: &B,
        retry: impl Fn(&DataOp) -> Attempt<Outcome>,
    ) {
        loop {
            let id = {
                let mut state = self.state.lock();
                loop {
                    if state.closed {
                        return;
                    }
                    if let Some(id) = state.ready.pop_front() {
                        break id;
                    }
                    self.changed.wait(&mut state);
                }
            };
            if !self.drain(id, &retry) {
                std::thread::sleep(FUTILE_PAUSE);
            }
            self.arm(backend, id);
        }
    }

    /// True when at least one operation ended. Leaves the queue when it is empty.
    fn drain(&self, id: ImageId, retry: &impl Fn(&DataOp) -> Attempt<Outcome>) -> bool {
        let mut progress = false;
        loop {
            let parked = {
                let mut state = self.state.lock();
                let Some(parked) = state.queues.get_mut(&id).and_then(|q| q.ops.pop_front()) else {
                    state.queues.remove(&id);
                    return true;
                };
                state.ops -= 1;
                state.bytes -= parked.op.held_bytes();
                parked
            };
            // Taken out while it is tried: a timeout cannot answer for what is being done.
            let Some(answer) = parked.pending.take() else { continue };
            match retry(&parked.op) {
                Attempt::Ready(result) => {
                    progress = true;
                    answer(result);
                }
                Attempt::Wait => {
                    parked.pending.put_back(answer);
                    let mut state = self.state.lock();
                    if state.closed {
                        drop(state);
                        parked.pending.finish(Err(Errno::IO));
                        return true;
                    }
                    state.ops += 1;
                    state.bytes += parked.op.held_bytes();
                    state.queues.entry(id).or_default().ops.push_front(parked);
                    return progress;
                }
            }
        }
    }
}
