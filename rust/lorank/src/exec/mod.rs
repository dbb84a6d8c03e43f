//! Threads, cancellation, panics and reusable memory.

pub(crate) mod aligned_bytes;
pub mod cancel;
pub(crate) mod memory;
pub mod panics;
pub mod parallel;
pub mod process_lock;
pub(crate) mod product_memory;
pub mod scratch;
pub(crate) mod strips;
