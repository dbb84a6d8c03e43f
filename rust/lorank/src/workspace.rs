//! Memory that a worker keeps from one matrix to the next.
//!
//! Buffers of changing sizes that are freed and allocated again leave holes in the allocator's heap,
//! so the peak would grow with the number of matrices. A workspace only ever grows, to the size of
//! the largest matrix that it has met.

use faer::dyn_stack::{MemBuffer, MemStack, StackReq};

use crate::source::Buffer;
use crate::{Error, Result};

/// The buffers of one worker.
#[derive(Default)]
pub struct Workspace {
    /// The matrix at hand.
    pub buffer: Buffer,
    /// What its decomposition needs.
    pub scratch: Scratch,
}

/// Uninitialised memory for faer's temporaries.
#[derive(Default)]
pub struct Scratch(Option<MemBuffer>);

impl Scratch {
    /// At least the memory that `request` describes.
    ///
    /// # Errors
    /// [`Error::Numerical`] if the system does not have it.
    pub fn stack(&mut self, request: StackReq) -> Result<&mut MemStack> {
        // Enough wherever the memory starts, as the next request may ask for another alignment.
        let bytes = request.unaligned_bytes_required();
        let enough = self.0.as_ref().is_some_and(|memory| memory.len() >= bytes);
        if !enough {
            self.0 = None; // Freed first: old and new together would set the peak.
        }
        let memory = match self.0.take() {
            Some(memory) => memory,
            None => MemBuffer::try_new(StackReq::new::<u8>(bytes)).map_err(|_| {
                Error::Numerical(format!("no memory for the {bytes} bytes that its decomposition needs"))
            })?,
        };
        Ok(MemStack::new(self.0.insert(memory)))
    }
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
    fn too_much_is_an_error() {
        let error = Scratch::default().stack(StackReq::new::<f64>(1 << 58)).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("no memory"), "{error}");
    }
}
