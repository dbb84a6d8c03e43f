//! Reusable memory with a chosen alignment relative to a cache line, for file contents and for numbers.
//!
//! Reads and writes of a file copy between this memory and the page cache. The copy suffers from 4K aliasing
//! where its target lies up to half a cache line further in its page than its source: the processor takes
//! loads to depend on earlier stores with the same low address bits. Such copies took two to four times as
//! long (measured for targets 8 and 16 bytes further). Large allocations begin 16 bytes into a page, so that
//! every 256th file would be read slowly. Copies whose target has the same place within a cache line as the
//! source, or lies less than 8 bytes before it, are never slow.

use bytemuck::allocation::try_zeroed_vec;

use crate::kernels::simd::LINE;

/// Multiple of the alignment of every number type, in bytes.
const ALIGNMENT: usize = 8;

/// Reusable memory, which grows and never shrinks.
#[derive(Debug, Default)]
pub(crate) struct AlignedBytes {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBytes {
    /// Returns at least `size` bytes with unspecified contents, aligned for copies to or from `position` in a
    /// file. For position 0 they begin at a cache line. `None` if the system does not provide the memory.
    pub(crate) fn reserve(&mut self, size: usize, position: u64) -> Option<&mut [u8]> {
        let needed = size.checked_add(LINE)?;
        if needed > self.memory.len() {
            *self = Self::default(); // Freed first: the peak must not contain both.
            self.memory = try_zeroed_vec(needed).ok()?; // Does not touch the pages.
        }
        let place = usize::try_from(position % LINE as u64).ok()? / ALIGNMENT * ALIGNMENT;
        self.start = (LINE + place - self.memory.as_ptr().addr() % LINE) % LINE;
        Some(self.bytes_mut())
    }

    /// Returns the memory of the latest [`reserve`](Self::reserve).
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..]
    }

    /// Returns the memory of the latest [`reserve`](Self::reserve), mutable.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn place_within_a_cache_line_is_that_of_the_file() {
        let mut buffer = AlignedBytes::default();
        for (size, position) in
            [(0, 0), (10, 8), (100, 63), (100, 64), (99, 4096 + 17), (5000, 1 << 40), (1, 24)]
        {
            let memory = buffer.reserve(size, position).unwrap();
            assert!(memory.len() >= size);
            let address = memory.as_ptr().addr() as u64;
            assert_eq!(address % 8, 0);
            assert_eq!(address % 64, position / 8 * 8 % 64, "{position}");
            let (start, length) = (memory.as_ptr(), memory.len());
            assert_eq!((buffer.bytes().as_ptr(), buffer.bytes().len()), (start, length));
        }
    }

    #[test]
    fn memory_grows_and_never_shrinks() {
        let mut buffer = AlignedBytes::default();
        buffer.reserve(1000, 0).unwrap().fill(7);
        let memory = buffer.memory.as_ptr();
        for size in [10, 1000, 0] {
            assert!(buffer.reserve(size, 24).unwrap().len() >= size);
            assert_eq!(buffer.memory.as_ptr(), memory);
        }
        // The compiler removes an allocation that nothing observes.
        assert!(black_box(buffer.reserve(usize::MAX, 0)).is_none());
        assert!(black_box(buffer.reserve(1 << 60, 0)).is_none());
        assert!(buffer.bytes().is_empty());
    }
}
