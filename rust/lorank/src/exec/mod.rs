//! Threads, cancellation, panics and reusable memory.

pub(crate) mod aligned_bytes;
pub mod cancel;
pub mod panics;
pub mod parallel;
pub mod scratch;
pub(crate) mod strips;
