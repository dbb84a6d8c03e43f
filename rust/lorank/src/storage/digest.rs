//! Digests of bytes. They detect changes of files; they do not prove an origin.

use crc_fast::CrcAlgorithm;

/// Number of bytes to digest at a time, so that they are still in a core's cache.
pub(crate) const PIECE: usize = 1 << 18;

/// A digest of 64 bits. CRC-64 runs faster than memory copies on processors with carry-less multiplication.
pub(crate) struct Digest(crc_fast::Digest);

impl Digest {
    pub(crate) fn new() -> Self {
        Self(crc_fast::Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_the_published_check_value_for_any_pieces() {
        for cut in 0..=9 {
            let (first, rest) = b"123456789".split_at(cut);
            let mut digest = Digest::new();
            digest.update(first);
            digest.update(rest);
            assert_eq!(digest.value(), 0xae8b_1486_0a79_9888);
        }
    }
}
