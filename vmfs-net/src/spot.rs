//! Tasks that can be run on the spot, by whoever has just woken them.
//!
//! A thread of the mount that hands a message to the network wakes the network's thread for it, which on an
//! idle machine takes longer than sending does. With [`gather`] it finds out which tasks it has woken, and
//! with [`Woken::run`] it runs them itself; the packet is on its way when it returns. Else they go to the
//! runtime, as ever.

use std::cell::RefCell;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use tokio::runtime::Handle;

/// Tasks run on the spot at most, counting one again that wakes itself; what is left goes to the runtime.
const RUNS_MAX: usize = 16;

thread_local! {
    /// What was woken on this thread, while it gathers.
    static GATHERED: RefCell<Option<Vec<Arc<Task>>>> = const { RefCell::new(None) };
}

type Future = Pin<Box<dyn std::future::Future<Output = ()> + Send>>;

struct Task {
    /// `None` once it is done. Locked while it is polled.
    future: Mutex<Option<Future>>,
    /// Has the runtime poll it.
    runtime: Mutex<Option<Waker>>,
}

impl Task {
    fn poll(self: &Arc<Self>, future: &mut Option<Future>) -> Poll<()> {
        let Some(running) = future else { return Poll::Ready(()) };
        let waker = Waker::from(Arc::clone(self));
        let polled = running.as_mut().poll(&mut Context::from_waker(&waker));
        if polled.is_ready() {
            *future = None;
        }
        polled
    }

    fn wake_runtime(&self) {
        if let Some(waker) = &*self.runtime.lock() {
            waker.wake_by_ref();
        }
    }

    /// Polls it here, unless another thread does so at this moment. What a poll needs to be told twice, the
    /// runtime is told.
    fn run(self: &Arc<Self>) {
        let pending = self.future.try_lock().is_some_and(|mut future| self.poll(&mut future).is_pending());
        if !pending {
            // Busy, or at its end, which the runtime has to see.
            self.wake_runtime();
        }
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let gathered = GATHERED.with_borrow_mut(|gathered| {
            let Some(tasks) = gathered else { return false };
            if !tasks.iter().any(|t| Arc::ptr_eq(t, self)) {
                tasks.push(Arc::clone(self));
            }
            true
        });
        if !gathered {
            self.wake_runtime();
        }
    }
}

/// A task on the runtime's side.
struct Spawned(Arc<Task>);

impl std::future::Future for Spawned {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let task = &self.0;
        // First, so that a wake during the poll finds it.
        match &mut *task.runtime.lock() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        let mut future = task.future.lock();
        task.poll(&mut future)
    }
}

impl Drop for Spawned {
    /// The future's own wakers keep the task, and so it: that would be for ever.
    fn drop(&mut self) {
        let future = self.0.future.lock().take();
        drop(future);
    }
}

/// Spawns a task that [`gather`] sees being woken.
pub fn spawn(runtime: &Handle, future: impl std::future::Future<Output = ()> + Send + 'static) {
    let future = Mutex::new(Some(Box::pin(future) as Future));
    runtime.spawn(Spawned(Arc::new(Task { future, runtime: Mutex::new(None) })));
}

/// Runs `f`, and keeps the tasks of [`spawn`] that it wakes on this thread from being run elsewhere until the
/// result is used or dropped, which is to be soon: before anything that waits. Inside another `gather` or
/// [`Woken::run`], they are left to that one.
pub fn gather<R>(f: impl FnOnce() -> R) -> (R, Woken) {
    /// Ends the gathering, also when `f` panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            drop(taken());
        }
    }
    fn taken() -> Woken {
        Woken(GATHERED.with_borrow_mut(Option::take).unwrap_or_default())
    }
    let outermost = GATHERED.with_borrow_mut(|gathered| {
        let none = gathered.is_none();
        gathered.get_or_insert_default();
        none
    });
    if !outermost {
        return (f(), Woken(Vec::new()));
    }
    let end = End;
    let result = f();
    let woken = taken();
    drop(end);
    (result, woken)
}

/// Tasks that were woken. Dropping it hands them to the runtime.
#[must_use = "dropping it wakes the runtime's threads"]
pub struct Woken(Vec<Arc<Task>>);

impl fmt::Debug for Woken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Woken").field(&self.0.len()).finish()
    }
}

impl Woken {
    /// Runs them here, and the tasks that they wake. To be called without any lock that a task may want.
    pub fn run(mut self, runtime: &Handle) {
        if self.0.is_empty() {
            return;
        }
        let _inside = runtime.enter();
        let mut runs = 0;
        while !self.0.is_empty() && runs < RUNS_MAX {
            let tasks = std::mem::take(&mut self.0);
            runs += tasks.len();
            let ((), mut more) = gather(|| tasks.iter().for_each(Task::run));
            self.0 = std::mem::take(&mut more.0);
        }
    }
}

impl Drop for Woken {
    fn drop(&mut self) {
        self.0.iter().for_each(|t| t.wake_runtime());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::Notify;

    use super::*;

    /// A runtime that runs only when it is told to, and a task that counts its runs: one at first, and one each
    /// time that it is notified.
    fn task() -> (tokio::runtime::Runtime, Arc<Notify>, Arc<AtomicUsize>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (notify, runs) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let (notified, ran) = (Arc::clone(&notify), Arc::clone(&runs));
        spawn(runtime.handle(), async move {
            loop {
                ran.fetch_add(1, Ordering::SeqCst);
                // Timers need the runtime's context, wherever the task runs.
                drop(tokio::time::sleep(Duration::ZERO));
                notified.notified().await;
            }
        });
        drive(&runtime);
        (runtime, notify, runs)
    }

    fn drive(runtime: &tokio::runtime::Runtime) {
        runtime.block_on(async {
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn a_task_runs_where_it_was_woken_if_that_is_asked_for_else_on_the_runtime() {
        let (runtime, notify, runs) = task();
        let runs = || runs.load(Ordering::SeqCst);
        let mut expected = 1;
        assert_eq!(runs(), expected);
        for _ in 0..3 {
            notify.notify_one();
            assert_eq!(runs(), expected, "the runtime's");
            drive(&runtime);
            expected += 1;
            assert_eq!(runs(), expected);
            let ((), woken) = gather(|| notify.notify_one());
            assert_eq!(runs(), expected, "nobody's yet");
            woken.run(runtime.handle());
            expected += 1;
            assert_eq!(runs(), expected);
            drive(&runtime);
            assert_eq!(runs(), expected, "once is enough");
            let ((), woken) = gather(|| notify.notify_one());
            drop(woken);
            assert_eq!(runs(), expected);
            drive(&runtime);
            expected += 1;
            assert_eq!(runs(), expected);
        }
        let (((), inner), outer) = gather(|| gather(|| notify.notify_one()));
        assert_eq!((inner.0.len(), outer.0.len()), (0, 1), "the outermost decides");
    }

    #[test]
    fn no_wake_is_lost_between_threads() {
        const ROUNDS: usize = 20_000;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (notify, wanted, seen) =
            (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let task = (Arc::clone(&notify), Arc::clone(&wanted), Arc::clone(&seen));
        spawn(runtime.handle(), async move {
            loop {
                task.2.store(task.1.load(Ordering::SeqCst), Ordering::SeqCst);
                task.0.notified().await;
            }
        });
        std::thread::scope(|s| {
            for thread in 0..3 {
                let (runtime, notify, wanted) = (&runtime, &notify, &wanted);
                s.spawn(move || {
                    for _ in 0..ROUNDS {
                        let ((), woken) = gather(|| {
                            wanted.fetch_add(1, Ordering::SeqCst);
                            notify.notify_one();
                        });
                        if thread > 0 {
                            woken.run(runtime.handle());
                        }
                    }
                });
            }
        });
        let began = std::time::Instant::now();
        while seen.load(Ordering::SeqCst) < 3 * ROUNDS {
            assert!(began.elapsed() < Duration::from_secs(10), "a wake was lost");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_task_goes_with_its_runtime_although_its_own_wakers_keep_it() {
        let (runtime, notify, _) = task();
        assert_eq!(Arc::strong_count(&notify), 2);
        drop(runtime);
        assert_eq!(Arc::strong_count(&notify), 1, "the future is gone");
        let ((), woken) = gather(|| notify.notify_one());
        drop(woken);
    }

    #[test]
    fn a_panic_ends_the_gathering() {
        let panicked = std::panic::catch_unwind(|| {
            let _ = gather(|| panic!("on purpose"));
        });
        assert!(panicked.is_err());
        assert!(GATHERED.with_borrow(Option::is_none));
    }
}
