//! The thread budget: threads work on different matrices, or together within one, never both.
//!
//! Which of the two is decided by the shape of the matrix alone, and work within a matrix is cut
//! into pieces of a size that is fixed by its shape. The bits of a result therefore do not depend
//! on the number of threads.
//!
//! Pools are made for one call and dropped with it: a process may fork between calls.

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

/// How threads are spent on one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// One thread does it all; other threads work on other matrices.
    Alone,
    /// All threads of the pool work on it together, and on nothing else.
    Together,
}

/// Multiplications of a Gram matrix from which a matrix deserves all threads: about half a second
/// of work on one core, so that a queue of smaller ones never waits long for its last.
const TOGETHER_FROM: u128 = 8_000_000_000;

impl Strategy {
    /// The strategy of every `(rows, cols)` matrix.
    #[must_use]
    pub const fn for_shape(rows: usize, cols: usize) -> Self {
        let short = if rows < cols { rows } else { cols };
        if (rows as u128) * (cols as u128) * (short as u128) >= TOGETHER_FROM {
            Self::Together
        } else {
            Self::Alone
        }
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
/// [`Error::Numerical`] if the system has no more threads to give.
pub fn pool(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(threads.max(1))
        .thread_name(|i| format!("lorank-{i}"))
        .build()
        .map_err(|e| Error::Numerical(format!("could not start {threads} threads: {e}")))
}
