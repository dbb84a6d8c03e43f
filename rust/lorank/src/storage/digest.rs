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

/// The identity and the digest of a tensor in a file.
pub(crate) struct DigestedTensor<'a> {
    pub name: &'a str,
    pub dtype: &'a str,
    pub shape: &'a [usize],
    pub digest: u64,
}

/// Returns the digest of a file's tensors in any order, and of `seed`, as 16 hexadecimal digits.
pub(crate) fn of_file(seed: &[u8], mut tensors: Vec<DigestedTensor<'_>>) -> String {
    tensors.sort_unstable_by_key(|tensor| tensor.name);
    let mut whole = Digest::new();
    // The length before each text separates it from the next.
    let mut add = |text: &[u8]| {
        whole.update(&(text.len() as u64).to_le_bytes());
        whole.update(text);
    };
    add(seed);
    for DigestedTensor { name, dtype, shape, digest } in tensors {
        add(name.as_bytes());
        add(dtype.as_bytes());
        add(format!("{shape:?}").as_bytes());
        add(&digest.to_le_bytes());
    }
    format!("{:016x}", whole.value())
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
