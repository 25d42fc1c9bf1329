//! Requests that cannot be answered yet, and how they end without being done.
//!
//! No wait is for ever. A waiting request ends when it is done, when its deadline
//! (`stall_timeout`) passes, when the caller is killed, or when the mount goes away; an operator's
//! `vmfs fail` ends it through the engine. Whoever takes the reply out of its [`Pending`] first
//! answers; the others find it gone.
//!
//! Interruption: fuser 0.18 answers `FUSE_INTERRUPT` with `ENOSYS`, after which the kernel sends
//! none and waits uninterruptibly. So the callers of *waiting* requests (only those) are looked at
//! every [`TICK`]: one with a deadly signal pending gets `EINTR`; one that waits for a lock gets it
//! for any signal that it does not block.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::backend::Errno;

/// How often waiting requests are looked at.
pub(crate) const TICK: Duration = Duration::from_millis(100);

type Answer<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

/// Who asks, and for how long he may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The calling thread as `/proc` numbers it; 0 when unknown (another pid namespace).
    pub pid: u32,
}

/// Which signals end a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signals {
    /// Those that kill the caller: disk I/O is not interrupted by less.
    Deadly,
    /// Any that is not blocked.
    Any,
}

/// A reply that is still owed.
pub(crate) struct Pending<T> {
    answer: Mutex<Option<Answer<T>>>,
}

impl<T> Pending<T> {
    /// Takes the reply out: the caller must answer it or [`Pending::put_back`] it.
    pub(crate) fn take(&self) -> Option<Answer<T>> {
        self.answer.lock().take()
    }
    pub(crate) fn put_back(&self, answer: Answer<T>) {
        *self.answer.lock() = Some(answer);
    }
    pub(crate) fn is_owed(&self) -> bool {
        self.answer.lock().is_some()
    }
    /// Answers, unless somebody did.
    pub(crate) fn finish(&self, result: Result<T, Errno>) {
        if let Some(answer) = self.take() {
            answer(result);
        }
    }
}

trait Owed: Send + Sync {
    fn fail(&self, errno: Errno);
    fn owed(&self) -> bool;
}

impl<T: Send> Owed for Pending<T> {
    fn fail(&self, errno: Errno) {
        self.finish(Err(errno));
    }
    fn owed(&self) -> bool {
        self.is_owed()
    }
}

struct Watched {
    owed: Weak<dyn Owed>,
    caller: Caller,
    deadline: Option<Instant>,
    signals: Signals,
}

#[derive(Default)]
struct State {
    watched: Vec<Watched>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Looks after everything that waits.
pub(crate) struct Waits {
    desk: Desk,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Where waits are registered.
#[derive(Clone)]
pub(crate) struct Desk(Arc<Shared>);

impl std::ops::Deref for Waits {
    type Target = Desk;
    fn deref(&self) -> &Desk {
        &self.desk
    }
}

impl Desk {
    /// Registers a reply that is owed. After [`Waits::close`] it fails at once.
    pub(crate) fn owe<T: Send + 'static>(
        &self,
        caller: Caller,
        signals: Signals,
        limit: Option<Duration>,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) -> Arc<Pending<T>> {
        let pending = Arc::new(Pending { answer: Mutex::new(Some(Box::new(answer) as Answer<T>)) });
        let owed: Weak<dyn Owed> = Arc::downgrade(&(pending.clone() as Arc<dyn Owed>));
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut state = self.0.state.lock();
        if state.closed {
            drop(state);
            pending.finish(Err(Errno::IO));
            return pending;
        }
        if state.watched.is_empty() {
            self.0.changed.notify_all();
        }
        state.watched.push(Watched { owed, caller, deadline, signals });
        pending
    }
}

impl Waits {
    pub(crate) fn start() -> std::io::Result<Self> {
        let desk = Desk(Arc::default());
        let theirs = desk.clone();
        let thread =
            std::thread::Builder::new().name("vmfs-wait".to_owned()).spawn(move || watch(&theirs.0))?;
        Ok(Self { desk, thread: Mutex::new(Some(thread)) })
    }

    /// Fails everything that waits, and whatever would wait from now on.
    pub(crate) fn close(&self) {
        self.desk.0.state.lock().closed = true;
        self.desk.0.changed.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            // The thread only dies by a panic of a reply, which was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.close();
    }
}

fn watch(shared: &Shared) {
    loop {
        let mut state = shared.state.lock();
        while state.watched.is_empty() && !state.closed {
            shared.changed.wait(&mut state);
        }
        if !state.closed {
            shared.changed.wait_for(&mut state, TICK);
        }
        let closed = state.closed;
        // Replies are sent without the lock: they may register the next wait.
        let mut looking = std::mem::take(&mut state.watched);
        drop(state);
        let now = Instant::now();
        looking.retain(|w| {
            let Some(owed) = w.owed.upgrade().filter(|o| o.owed()) else { return false };
            let errno = if closed || w.deadline.is_some_and(|d| d <= now) {
                Errno::IO
            } else if w.caller.pid != 0 && has_signal(w.caller.pid, w.signals) {
                Errno::INTR
            } else {
                return true;
            };
            owed.fail(errno);
            // One that is being tried right now still owes its reply afterwards.
            true
        });
        if closed {
            // Nothing new is accepted any more; what is being tried right now ends by itself.
            return;
        }
        shared.state.lock().watched.append(&mut looking);
    }
}

/// Whether the thread has a signal pending that ends its wait.
fn has_signal(pid: u32, signals: Signals) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let mask = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    // A signal whose action is to end the process shows as SIGKILL in each of its threads.
    let pending = mask("SigPnd:").unwrap_or(0) | mask("ShdPnd:").unwrap_or(0);
    match signals {
        Signals::Deadly => pending & KILL != 0,
        Signals::Any => pending & !mask("SigBlk:").unwrap_or(0) != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_wait_ends_at_its_deadline_and_when_the_mount_goes_away() {
        let waits = Waits::start().unwrap();
        let (tx, rx) = mpsc::channel();
        let send = |name: &'static str, tx: &mpsc::Sender<_>| {
            let tx = tx.clone();
            move |r: Result<(), Errno>| tx.send((name, r)).unwrap()
        };
        let me = Caller { pid: 0 };
        let _late = waits.owe(me, Signals::Deadly, Some(Duration::from_millis(150)), send("late", &tx));
        let ever = waits.owe(me, Signals::Any, None, send("ever", &tx));
        assert_eq!(rx.recv().unwrap(), ("late", Err(Errno::IO)));
        assert!(ever.is_owed());
        waits.close();
        assert_eq!(rx.recv().unwrap(), ("ever", Err(Errno::IO)));
        let _after = waits.owe(me, Signals::Any, None, send("after", &tx));
        assert_eq!(rx.recv().unwrap(), ("after", Err(Errno::IO)));
    }
}
