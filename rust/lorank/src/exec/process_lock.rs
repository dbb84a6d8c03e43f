//! A lock that a forked process does not inherit.
//!
//! If one thread forks while another holds a lock, the child has the lock without the thread that would
//! release it. An ordinary lock would stay closed for ever.

use std::sync::atomic::{AtomicU32, Ordering};

/// A lock whose holder is known by the id of its process. Waiting neither allocates nor sleeps for long: a
/// lock is held for microseconds.
pub struct ProcessLock(AtomicU32);

/// Releases a [`ProcessLock`] when it is dropped.
pub struct Held<'a>(&'a AtomicU32);

impl ProcessLock {
    /// Creates an open lock.
    #[must_use]
    #[allow(clippy::new_without_default)] // For static variables, which need a const function.
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Waits until no other thread of this process holds the lock, and takes it.
    pub fn lock(&self) -> Held<'_> {
        let process = std::process::id();
        loop {
            let holder = self.0.load(Ordering::Relaxed);
            // The thread of another process holds its own copy of the lock.
            let is_open = holder != process;
            if is_open
                && self.0.compare_exchange(holder, process, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return Held(&self.0);
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::UnsafeCell;

    use super::*;

    struct Shared(ProcessLock, UnsafeCell<u64>);

    // SAFETY: the number is only used under the lock.
    unsafe impl Sync for Shared {}

    impl Shared {
        fn add_one(&self) {
            let _held = self.0.lock();
            // SAFETY: the lock is held.
            unsafe { *self.1.get() += 1 };
        }
    }

    #[test]
    fn one_thread_at_a_time_holds_the_lock() {
        let shared = Shared(ProcessLock::new(), UnsafeCell::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| shared.add_one()));
            }
        });
        assert_eq!(shared.1.into_inner(), 40_000);
    }

    #[test]
    fn lock_of_another_process_is_open() {
        let lock = ProcessLock(AtomicU32::new(std::process::id() + 1));
        let held = lock.lock();
        assert_eq!(held.0.load(Ordering::Relaxed), std::process::id());
        drop(held);
        assert_eq!(lock.0.load(Ordering::Relaxed), 0);
    }
}
