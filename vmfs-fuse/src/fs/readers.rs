//! Threads for reads that have to wait for the disk. The mount's own few threads go on serving meanwhile, and
//! a disk that can do many reads at a time is given as many.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::{Condvar, Mutex};

/// Most threads; what comes beyond waits for one. The kernel bounds how much that is.
pub(crate) const READERS_MAX: usize = 16;

pub(crate) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads, and those of them that wait for a job.
    threads: usize,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    turn_taken: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// See the module. Threads are started as they are needed, and end after the last job once this is dropped.
#[derive(Default)]
pub(crate) struct Readers(Arc<Shared>);

impl Readers {
    /// A serving thread's turn to wait for the disk itself, which saves a hand-over: one at a time, so that
    /// others are left.
    pub(crate) fn turn(&self) -> Option<Turn<'_>> {
        let taken = self.0.turn_taken.swap(true, Ordering::AcqRel);
        (!taken).then_some(Turn(&self.0.turn_taken))
    }

    /// Has `job` run on one of the threads; here and now when none can be had.
    pub(crate) fn run(&self, job: Job) {
        let mut state = self.0.state.lock();
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            self.0.changed.notify_one();
            return;
        }
        if state.threads < READERS_MAX {
            let shared = self.0.clone();
            let started = thread::Builder::new().name("vmfs-read".to_owned()).spawn(move || shared.serve());
            state.threads += usize::from(started.is_ok());
        }
        if state.threads == 0
            && let Some(job) = state.jobs.pop_back()
        {
            drop(state);
            job();
        }
    }
}

/// See [`Readers::turn`].
pub(crate) struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.0.state.lock().closed = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                self.changed.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};
    use std::time::Duration;

    use super::*;

    #[test]
    fn all_threads_wait_at_the_same_time_and_no_job_is_lost() {
        let readers = Readers::default();
        // Passes only when so many wait at it at the same time.
        let all = Arc::new(Barrier::new(READERS_MAX + 1));
        let (tell, told) = mpsc::channel();
        for _ in 0..3 * READERS_MAX {
            let (all, tell) = (all.clone(), tell.clone());
            readers.run(Box::new(move || {
                all.wait();
                tell.send(()).unwrap();
            }));
        }
        assert_eq!(readers.0.state.lock().threads, READERS_MAX);
        // Dropped with jobs still waiting; this thread is what the barrier waits for now.
        drop(readers);
        (0..3).for_each(|_| _ = all.wait());
        for _ in 0..3 * READERS_MAX {
            told.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    }

    #[test]
    fn one_turn_at_a_time() {
        let readers = Readers::default();
        let turn = readers.turn();
        assert!(turn.is_some() && readers.turn().is_none());
        drop(turn);
        assert!(readers.turn().is_some());
    }
}
