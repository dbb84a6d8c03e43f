//! The steps of a spectrum, for `benches/phases.rs`, which measures each of them.
//!
//! Not part of the public interface: the feature `bench` enables it, and it may change in any version.

use faer::dyn_stack::{MemStack, StackReq};

use crate::Result;
pub use crate::eigen::band::{reduce_to_band, reduce_to_band_scratch};
pub use crate::eigen::band_layout::{WIDTH, position, storage};
pub use crate::eigen::bulge::{reduce_to_tridiagonal, reduce_to_tridiagonal_scratch};
pub use crate::eigen::gram::{gram, gram_scratch, panel_size};
pub use crate::eigen::root_free_ql::tridiagonal_eigenvalues;
pub use crate::eigen::tridiagonal::Tridiagonal;
pub use crate::kernels::number::Number;
use crate::workspace::Scratch;

/// Returns the memory that `request` describes.
///
/// # Errors
/// [`OutOfMemory`](crate::Error::OutOfMemory).
pub fn stack(scratch: &mut Scratch, request: StackReq) -> Result<&mut MemStack> {
    scratch.stack(request)
}

/// Returns `count` numbers with unspecified values, and the memory that `request` describes.
///
/// # Errors
/// [`OutOfMemory`](crate::Error::OutOfMemory).
pub fn numbers<T: Number>(
    scratch: &mut Scratch,
    count: usize,
    request: StackReq,
) -> Result<(&mut [T], &mut MemStack)> {
    scratch.numbers(count, request)
}
