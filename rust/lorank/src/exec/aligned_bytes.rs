//! Memory that begins at a chosen place of a cache line: bytes that files are read into and written from, and numbers.
//!
//! The system copies a file's bytes from and to pages of its own. Where a copy's target lies less than half a cache
//! line further in its page than the source does in its own, the processor takes loads for such of what was stored
//! just before: the copy takes two to four times as long, as measured for targets 8 and 16 bytes further. An
//! allocator's large pieces begin 16 bytes into a page, so that every 256th file would be read that slowly. Copies that
//! begin at the same place of a cache line as in the file, or less than 8 bytes before it, are never slow.

use crate::kernels::simd::LINE;

/// What numbers' alignments divide.
const ALIGNMENT: usize = 8;

/// Memory that is used again and again: it grows and never shrinks.
#[derive(Debug, Default)]
pub(crate) struct AlignedBytes {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBytes {
    /// At least so many bytes, whatever they hold, for copies from or to a place in a file and what follows it; those
    /// for place 0 begin with a cache line. `None` if the system does not have them.
    pub(crate) fn room(&mut self, size: usize, position: u64) -> Option<&mut [u8]> {
        let needed = size.checked_add(LINE)?;
        if needed > self.memory.len() {
            self.memory = Vec::new(); // Not copied, and never held together with the larger one.
            // Asked before, as what follows ends the process where there is no memory. But it need not touch pages
            // that nobody will use.
            Vec::<u8>::new().try_reserve_exact(needed).ok()?;
            self.memory = vec![0; needed];
        }
        let place = usize::try_from(position % LINE as u64).ok()? / ALIGNMENT * ALIGNMENT;
        self.start = (LINE + place - self.memory.as_ptr().addr() % LINE) % LINE;
        Some(self.bytes_mut())
    }

    /// The room that was made last.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..]
    }

    /// The same to write to.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_the_file() {
        let mut buffer = AlignedBytes::default();
        for (size, position) in
            [(0, 0), (10, 8), (100, 63), (100, 64), (99, 4096 + 17), (5000, 1 << 40), (1, 24)]
        {
            let room = buffer.room(size, position).unwrap();
            assert!(room.len() >= size);
            let address = room.as_ptr().addr() as u64;
            assert_eq!(address % 8, 0);
            assert_eq!(address % 64, position / 8 * 8 % 64, "{position}");
            let (start, length) = (room.as_ptr(), room.len());
            assert_eq!((buffer.bytes().as_ptr(), buffer.bytes().len()), (start, length));
        }
    }

    #[test]
    fn memory_grows_and_never_shrinks() {
        let mut buffer = AlignedBytes::default();
        buffer.room(1000, 0).unwrap().fill(7);
        let memory = buffer.memory.as_ptr();
        for size in [10, 1000, 0] {
            assert!(buffer.room(size, 24).unwrap().len() >= size);
            assert_eq!(buffer.memory.as_ptr(), memory);
        }
        assert!(buffer.room(usize::MAX, 0).is_none());
        assert!(buffer.room(1 << 60, 0).is_none());
    }
}
