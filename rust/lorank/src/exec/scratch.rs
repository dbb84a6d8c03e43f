//! Memory that a worker reuses for every matrix.
//!
//! Buffers of changing sizes that are freed and allocated again fragment the heap, so that the peak would
//! grow with the number of matrices. Reused memory grows to the size of the largest matrix and no further.

use faer::dyn_stack::{MemBuffer, MemStack, StackReq};

use crate::exec::aligned_bytes::AlignedBytes;
use crate::kernels::number::Number;
use crate::{Error, Result};

/// Reusable memory for matrices and temporaries of a decomposition.
#[derive(Default)]
pub struct Scratch {
    memory: Option<MemBuffer>,
    numbers: AlignedBytes,
}

impl Scratch {
    /// Returns uninitialised memory for `request`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn stack(&mut self, request: StackReq) -> Result<&mut MemStack> {
        stack(&mut self.memory, request)
    }

    /// Returns `count` numbers with unspecified values, and memory for `request` as [`stack`](Self::stack)
    /// does. The numbers are not zeroed: this would touch a large matrix once more, and on one thread.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn numbers<T: Number>(
        &mut self,
        count: usize,
        request: StackReq,
    ) -> Result<(&mut [T], &mut MemStack)> {
        let bytes = count.saturating_mul(size_of::<T>());
        let memory = self.numbers.reserve(bytes, 0).ok_or_else(|| no_memory(bytes))?;
        Ok((pulp::bytemuck::cast_slice_mut(&mut memory[..bytes]), stack(&mut self.memory, request)?))
    }
}

fn stack(memory: &mut Option<MemBuffer>, request: StackReq) -> Result<&mut MemStack> {
    // Sufficient for any address of the memory, as the next request may have another alignment.
    let bytes = request.unaligned_bytes_required();
    if memory.as_ref().is_none_or(|memory| memory.len() < bytes) {
        *memory = None; // Freed first: the peak must not contain both.
    }
    let found = match memory.take() {
        Some(found) => found,
        None => MemBuffer::try_new(StackReq::new::<u8>(bytes)).map_err(|_| no_memory(bytes))?,
    };
    Ok(MemStack::new(memory.insert(found)))
}

fn no_memory(bytes: usize) -> Error {
    Error::no_memory(bytes, "a decomposition")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_never_shrinks() {
        let mut scratch = Scratch::default();
        let mut place = |request| {
            let stack = scratch.stack(request).unwrap();
            assert!(stack.can_hold(request));
            (stack.as_ptr(), stack.len_bytes())
        };
        let small = place(StackReq::new_aligned::<f64>(100, 64));
        assert!(small.1 < 1024);
        let large = place(StackReq::new_aligned::<f64>(1000, 64));
        assert!(large.1 >= 8000);
        for again in [(1000, 64), (10, 8), (900, 512), (1000, 16)] {
            assert_eq!(place(StackReq::new_aligned::<f64>(again.0, again.1)), large, "{again:?}");
        }
    }

    #[test]
    fn missing_memory_is_an_error() {
        let error = Scratch::default().stack(StackReq::new::<f64>(1 << 58)).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        for count in [1 << 58, usize::MAX] {
            let error = Scratch::default().numbers::<f64>(count, StackReq::EMPTY).map(|_| ()).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        }
    }

    #[test]
    fn numbers_begin_with_a_cache_line() {
        let mut scratch = Scratch::default();
        for count in [0, 1, 1000, 10] {
            let (numbers, stack) = scratch.numbers::<f32>(count, StackReq::new::<f64>(5)).unwrap();
            assert!(stack.can_hold(StackReq::new::<f64>(5)));
            numbers.fill(1.0);
            assert_eq!((numbers.len(), numbers.as_ptr().addr() % 64), (count, 0));
        }
    }
}
