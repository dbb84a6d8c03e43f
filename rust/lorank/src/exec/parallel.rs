//! The thread budget: threads work on different matrices, or together within one, never both.
//!
//! Work within a matrix is cut into pieces of a size that is fixed by its shape, whichever of the two it
//! is. The bits of a result therefore depend neither on that nor on the number of threads.
//!
//! Pools are made for one call and dropped with it: a process may fork between calls.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::exec::cancel::CancelToken;
use crate::{Error, Result};

/// How threads are spent on one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// One thread does it all; other threads work on other matrices.
    Alone,
    /// All threads of the pool work on it together, and on nothing else.
    Together,
}

/// Multiplications of a Gram matrix from which a matrix deserves all threads: some seconds of work on one
/// core, so that a queue of smaller ones never waits long for its last, and few are in memory at a time.
const TOGETHER_FROM: u128 = 40_000_000_000;

/// Those from which threads that have nothing else to do are of use: some milliseconds of work.
const USEFUL_FROM: u128 = 30_000_000;

impl Strategy {
    /// The strategy of a `(rows, cols)` matrix among many.
    #[must_use]
    pub const fn for_shape(rows: usize, cols: usize) -> Self {
        Self::from(rows, cols, TOGETHER_FROM)
    }

    /// The strategy of a `(rows, cols)` matrix while other threads have nothing to do.
    #[must_use]
    pub const fn for_single(rows: usize, cols: usize) -> Self {
        Self::from(rows, cols, USEFUL_FROM)
    }

    const fn from(rows: usize, cols: usize, least: u128) -> Self {
        let short = if rows < cols { rows } else { cols };
        if (rows as u128) * (cols as u128) * (short as u128) >= least { Self::Together } else { Self::Alone }
    }
}

/// The processors that this process may use.
#[must_use]
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A pool of `threads` threads for one call.
///
/// # Errors
/// [`Error::NoThreads`] if the system does not start them.
pub fn pool(threads: usize) -> Result<ThreadPool> {
    pool_built(threads.max(1), ThreadPoolBuilder::build)
}

fn pool_built(
    threads: usize,
    build: impl FnOnce(ThreadPoolBuilder) -> std::result::Result<ThreadPool, ThreadPoolBuildError>,
) -> Result<ThreadPool> {
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("lorank-{i}"));
    build(builder).map_err(|e| Error::NoThreads { threads, source: e.into() })
}

/// Does `work` for every index of `order`, in that order, side by side within the current pool of
/// `threads` threads. Each worker keeps one workspace from one index to the next.
pub(crate) fn side_by_side<W: Default>(
    order: &[usize],
    threads: usize,
    cancel: &CancelToken,
    work: &(dyn Fn(usize, &mut W) + Sync),
) {
    let next = AtomicUsize::new(0);
    rayon::scope(|scope| {
        for _ in 0..threads.clamp(1, order.len().max(1)) {
            scope.spawn(|_| {
                let mut workspace = W::default();
                while let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed))
                    && !cancel.is_cancelled()
                {
                    work(i, &mut workspace);
                }
            });
        }
    });
}

/// The indices of pieces of work, costliest first, so that none is left alone at the end.
pub(crate) fn costliest_first(costs: impl Iterator<Item = u128>) -> Vec<usize> {
    let costs: Vec<u128> = costs.collect();
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(costs[i]));
    order
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_refusal_of_threads_is_an_error() {
        let refusal = |_| Err(io::ErrorKind::WouldBlock.into());
        let error = pool_built(3, |builder| builder.spawn_handler(refusal).build()).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::NoThreads { threads: 3, .. }));
        assert!(error.to_string().starts_with("could not start 3 threads: "), "{error}");
        let refused = Error::NoThreads { threads: 1, source: "why".into() };
        assert_eq!(refused.to_string(), "could not start 1 thread: why");
    }

    #[test]
    fn every_index_once_and_none_after_cancelling() {
        for threads in [1, 3] {
            let (seen, cancel) = (Mutex::new(Vec::new()), CancelToken::default());
            let order: Vec<usize> = (0..50).rev().collect();
            let work = |i: usize, calls: &mut usize| {
                *calls += 1;
                seen.lock().unwrap().push((i, *calls));
                if i == 10 {
                    cancel.cancel();
                }
            };
            pool(threads).unwrap().install(|| side_by_side(&order, threads, &cancel, &work));
            let mut indices: Vec<usize> = seen.lock().unwrap().iter().map(|&(i, _)| i).collect();
            indices.sort_unstable();
            indices.dedup();
            assert_eq!(indices.len(), seen.lock().unwrap().len());
            assert!((40..40 + threads).contains(&indices.len()), "{}", indices.len());
        }
    }
}
