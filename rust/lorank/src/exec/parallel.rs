//! The thread policy: threads work on different matrices, or together on one, never both.
//!
//! The work on a matrix is cut into pieces whose sizes depend only on its shape. Therefore the bits of a
//! result depend neither on the policy nor on the number of threads.
//!
//! A pool serves one call and is dropped with it, so that a process may fork between calls. It has at most one
//! thread for every piece of work that is long enough to occupy a thread, and at most [`MOST_THREADS`]. Within
//! these limits it may have more threads than there are processors.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::exec::cancel::CancelToken;
use crate::exec::memory::probe_mapping;
use crate::{Error, Result};

/// The assignment of threads to one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// One thread works on the matrix; other threads work on other matrices.
    Alone,
    /// All threads of the pool work on the matrix, and on no other matrix.
    Together,
}

/// Smallest number of multiplications for which all threads work together on a Gram matrix: some seconds of
/// work on one core. This limit bounds the wait for the last matrix of a queue, and the number of large
/// matrices in memory.
const TOGETHER_FROM: u128 = 40_000_000_000;

/// Smallest number of multiplications for which otherwise idle threads save time: some milliseconds of work.
const USEFUL_FROM: u128 = 30_000_000;

/// Smallest number of multiplications that occupy a thread for longer than its start takes: a millisecond.
const PIECE: u128 = 4_000_000;

/// Largest number of threads of a pool, unless the machine has more processors.
const MOST_THREADS: usize = 256;

impl Strategy {
    /// Returns the strategy of a `(rows, cols)` matrix among many matrices.
    #[must_use]
    pub const fn for_shape(rows: usize, cols: usize) -> Self {
        Self::from(rows, cols, TOGETHER_FROM)
    }

    /// Returns the strategy of a `(rows, cols)` matrix while other threads are idle.
    #[must_use]
    pub const fn for_single(rows: usize, cols: usize) -> Self {
        Self::from(rows, cols, USEFUL_FROM)
    }

    const fn from(rows: usize, cols: usize, least: u128) -> Self {
        if multiplications(rows, cols) >= least { Self::Together } else { Self::Alone }
    }
}

/// Returns the number of multiplications of a Gram matrix.
const fn multiplications(rows: usize, cols: usize) -> u128 {
    let short = if rows < cols { rows } else { cols };
    // Saturating, as three lengths may exceed 128 bits.
    (rows as u128 * cols as u128).saturating_mul(short as u128)
}

/// Returns the largest number of threads to which a `(rows, cols)` matrix gives work.
#[must_use]
pub(crate) fn pieces_of(rows: usize, cols: usize) -> usize {
    usize::try_from(multiplications(rows, cols) / PIECE).unwrap_or(usize::MAX)
}

/// Returns the number of processors available to this process.
#[must_use]
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Checks that the system provides memory for `threads` new threads. The standard library and the C library
/// abort the process if memory ends while a thread starts.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn check_stacks(threads: usize) -> Result<()> {
    /// Size of a stack, as the standard library chooses it.
    const STACK: usize = 2 << 20;
    /// Size of the data of a thread and of its pool.
    const OTHER: usize = 1 << 20;
    let bytes = threads.saturating_mul(STACK + OTHER / 4).saturating_add(OTHER);
    probe_mapping(bytes, "the stacks of threads")
}

/// Returns the number of threads for a number of pieces of work: at least 1, and at most [`MOST_THREADS`] or
/// the number of processors.
#[must_use]
pub(crate) fn useful_threads(threads: usize, pieces: usize) -> usize {
    let threads = threads.min(pieces);
    // The number of processors is read from files of the system, which takes longer than small calls.
    if threads <= MOST_THREADS { threads.max(1) } else { threads.min(available_threads().max(MOST_THREADS)) }
}

/// Starts a pool of up to `threads` threads: no more than [`useful_threads`].
///
/// # Errors
/// [`Error::OutOfMemory`] if there is no memory for their stacks, and [`Error::NoThreads`] if the system does
/// not start them.
pub fn pool(threads: usize) -> Result<ThreadPool> {
    pool_for(threads, usize::MAX)
}

/// Starts a pool of up to `threads` threads for a number of pieces of work.
///
/// # Errors
/// The errors of [`pool`].
pub(crate) fn pool_for(threads: usize, pieces: usize) -> Result<ThreadPool> {
    let threads = useful_threads(threads, pieces);
    check_stacks(threads)?;
    pool_built(threads, ThreadPoolBuilder::build)
}

fn pool_built(
    threads: usize,
    build: impl FnOnce(ThreadPoolBuilder) -> std::result::Result<ThreadPool, ThreadPoolBuildError>,
) -> Result<ThreadPool> {
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("lorank-{i}"));
    build(builder).map_err(|e| Error::NoThreads { threads, source: e.into() })
}

/// Calls `work` for the indices in `order`, on up to `threads` threads of the current pool. A worker that has
/// finished an index takes the next one, and reuses its workspace.
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

/// Returns the indices of `costs` in descending order of cost, so that the last pieces of work are short.
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
    fn missing_threads_are_an_error() {
        let refusal = |_| Err(io::ErrorKind::WouldBlock.into());
        let error = pool_built(3, |builder| builder.spawn_handler(refusal).build()).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::NoThreads { threads: 3, .. }));
        assert!(error.to_string().starts_with("could not start 3 threads: "), "{error}");
        let refused = Error::NoThreads { threads: 1, source: "why".into() };
        assert_eq!(refused.to_string(), "could not start 1 thread: why");
    }

    #[test]
    fn threads_never_exceed_the_work() {
        let most = available_threads().max(MOST_THREADS);
        for (threads, pieces, expected) in [
            (0, 5, 1),
            (5, 0, 1),
            (3, 5, 3),
            (3000, 5, 5),
            (usize::MAX, usize::MAX, most),
            (most + 1, usize::MAX, most),
        ] {
            assert_eq!(useful_threads(threads, pieces), expected, "{threads} {pieces}");
        }
        assert_eq!(pool_for(1 << 40, 2).unwrap().current_num_threads(), 2);
        assert_eq!(pool(usize::MAX).unwrap().current_num_threads(), most);
        assert_eq!((pieces_of(64, 64), pieces_of(500, 400)), (0, 20));
        assert_eq!(pieces_of(usize::MAX, usize::MAX), usize::MAX);
        // Whatever threads work on together gives work to several of them.
        assert!((0..2000).all(|n| Strategy::for_single(n, n) == Strategy::Alone || pieces_of(n, n) > 6));
    }

    #[test]
    fn every_index_is_visited_once_until_cancelled() {
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
