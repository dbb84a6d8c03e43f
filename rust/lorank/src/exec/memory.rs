//! Allocation that reports a lack of memory as [`Error::OutOfMemory`].
//!
//! `Vec` and `Mat` abort the process if the system provides no memory. Everything whose size grows with a
//! matrix or a file is allocated here instead.

use bytemuck::Zeroable;
use bytemuck::allocation::try_zeroed_vec;
use faer::dyn_stack::{MemBuffer, StackReq};
use faer::{Mat, MatRef};

use crate::{Error, Result};

/// Returns an empty vector with memory for exactly `count` elements.
pub(crate) fn with_capacity<T>(count: usize, what: &str) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_| no_memory::<T>(count, what))?;
    Ok(values)
}

/// Returns `count` zeros, whose pages are not touched.
pub(crate) fn zeros<T: Zeroable>(count: usize, what: &str) -> Result<Vec<T>> {
    try_zeroed_vec(count).map_err(|()| no_memory::<T>(count, what))
}

/// Collects an iterator of at most `count` elements.
pub(crate) fn collected<T>(values: impl IntoIterator<Item = T>, count: usize, what: &str) -> Result<Vec<T>> {
    let mut found = with_capacity(count, what)?;
    found.extend(values);
    Ok(found)
}

/// Gives a reusable vector `count` elements with unspecified values.
pub(crate) fn resize<T: Zeroable + Copy>(values: &mut Vec<T>, count: usize, what: &str) -> Result<()> {
    if values.capacity() < count {
        *values = Vec::new(); // Freed first: the peak must not contain both.
        *values = zeros(count, what)?;
    }
    values.resize(count, T::zeroed());
    Ok(())
}

/// Returns the matrix with the entries `entry(i, j)`.
pub(crate) fn matrix(
    rows: usize,
    cols: usize,
    what: &str,
    entry: impl FnMut(usize, usize) -> f64,
) -> Result<Mat<f64>> {
    let mut matrix = Mat::new();
    matrix.try_reserve(rows, cols).map_err(|_| no_memory::<f64>(rows.saturating_mul(cols), what))?;
    matrix.resize_with(rows, cols, entry);
    Ok(matrix)
}

/// Returns a matrix of zeros.
pub(crate) fn zero_matrix(rows: usize, cols: usize, what: &str) -> Result<Mat<f64>> {
    matrix(rows, cols, what, |_, _| 0.0)
}

/// Returns the first columns of the identity.
pub(crate) fn identity(rows: usize, cols: usize, what: &str) -> Result<Mat<f64>> {
    matrix(rows, cols, what, |i, j| f64::from(u8::from(i == j)))
}

/// Returns a copy of a matrix.
pub(crate) fn copied(of: MatRef<'_, f64>, what: &str) -> Result<Mat<f64>> {
    let mut copy = zero_matrix(of.nrows(), of.ncols(), what)?;
    copy.copy_from(of);
    Ok(copy)
}

/// Returns uninitialised memory for temporaries of faer.
pub(crate) fn buffer(request: StackReq, what: &str) -> Result<MemBuffer> {
    MemBuffer::try_new(request).map_err(|_| Error::no_memory(request.size_bytes(), what))
}

/// Checks that the system provides `bytes` bytes at once, and returns them to it. For collections of parts
/// that cannot report a lack of memory, such as parsed JSON.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn probe(bytes: usize, what: &str) -> Result<()> {
    with_capacity::<u8>(bytes, what).map(|memory| drop(std::hint::black_box(memory)))
}

/// Checks that the system maps `bytes` new bytes, as [`probe`] does. The allocator may have as many free, but
/// a new thread cannot use them: its stack is mapped, and without 64 MiB of address space it has no heap.
///
/// # Errors
/// [`Error::OutOfMemory`].
#[cfg(target_os = "linux")]
pub(crate) fn probe_mapping(bytes: usize, what: &str) -> Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: the system chooses an unused address, and nothing refers to the memory when it is unmapped.
    unsafe {
        mmap_anonymous(std::ptr::null_mut(), bytes, access, flags)
            .and_then(|memory| munmap(memory, bytes))
            .map_err(|_| Error::no_memory(bytes, what))
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) use probe as probe_mapping;

fn no_memory<T>(count: usize, what: &str) -> Error {
    Error::no_memory(count.saturating_mul(size_of::<T>()), what)
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn sizes_that_no_system_provides_are_errors() {
        let what = "a test";
        for count in [1 << 58, usize::MAX / 8, usize::MAX] {
            // The compiler removes an allocation that nothing observes.
            let found = [
                black_box(with_capacity::<f64>(count, what)).err(),
                black_box(zeros::<f64>(count, what)).err(),
                resize(black_box(&mut vec![0.0f64]), count, what).err(),
                black_box(zero_matrix(count, 3, what)).err(),
                probe(count, what).err(),
                probe_mapping(count, what).err(),
            ];
            for error in found {
                assert!(matches!(error, Some(Error::OutOfMemory { .. })), "{count}: {error:?}");
            }
        }
    }

    #[test]
    fn buffers_have_the_requested_contents() {
        assert_eq!(zeros::<f32>(3, "").unwrap(), [0.0; 3]);
        assert_eq!(collected(0..3, 5, "").unwrap(), [0, 1, 2]);
        let mut values = vec![1.0; 4];
        resize(&mut values, 2, "").unwrap();
        assert_eq!(values, [1.0; 2]);
        resize(&mut values, 9, "").unwrap();
        assert_eq!(values.len(), 9);
        let entry = |i: usize, j: usize| (10 * i + j) as f64;
        let expected = Mat::from_fn(5, 3, entry);
        let found = matrix(5, 3, "", entry).unwrap();
        assert_eq!((&found, found.col_stride()), (&expected, expected.col_stride()));
        assert_eq!(copied(expected.as_ref(), "").unwrap(), expected);
        assert_eq!(identity(4, 2, "").unwrap(), Mat::<f64>::identity(4, 2));
    }
}
