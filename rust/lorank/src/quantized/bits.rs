//! Unpacking of codes that follow each other in little-endian order, without gaps.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

/// Unpacks `out.len()` codes of 1 to 8 bits, starting with the code at position `first`. A code may cross
/// bytes.
///
/// # Panics
/// Panics if `bytes` is too short.
#[inline(always)]
pub(crate) fn unpack(bytes: &[u8], bits: usize, first: usize, out: &mut [u8]) {
    match bits {
        8 => out.copy_from_slice(&bytes[first..first + out.len()]),
        4 if first.is_multiple_of(2) => {
            let (pairs, last) = out.as_chunks_mut::<2>();
            let bytes = &bytes[first / 2..];
            for (pair, &byte) in pairs.iter_mut().zip(bytes) {
                *pair = [byte & 15, byte >> 4];
            }
            if let [last] = last {
                *last = bytes[pairs.len()] & 15;
            }
        }
        2 if first.is_multiple_of(4) => {
            let (fours, last) = out.as_chunks_mut::<4>();
            let bytes = &bytes[first / 4..];
            for (four, &byte) in fours.iter_mut().zip(bytes) {
                *four = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6];
            }
            for (i, x) in last.iter_mut().enumerate() {
                *x = bytes[fours.len()] >> (2 * i) & 3;
            }
        }
        _ => {
            for (i, x) in out.iter_mut().enumerate() {
                *x = single(bytes, bits, first + i);
            }
        }
    }
}

/// Returns the code at a position.
#[inline(always)]
fn single(bytes: &[u8], bits: usize, at: usize) -> u8 {
    let start = at * bits;
    let low = u16::from(bytes[start / 8]);
    // The last byte has no successor.
    let high = u16::from(bytes.get(start / 8 + 1).copied().unwrap_or(0));
    let both = (low | high << 8) >> (start % 8);
    both.to_le_bytes()[0] & u8::MAX >> (8 - bits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_are_those_of_a_long_integer(bytes in prop::array::uniform16(any::<u8>()), bits in 1usize..=8,
                                             first in 0usize..16, count in 0usize..17) {
            let all = u128::from_le_bytes(bytes);
            let count = count.min((128 / bits).saturating_sub(first));
            let mut found = vec![0; count];
            unpack(&bytes, bits, first, &mut found);
            for (i, &code) in found.iter().enumerate() {
                let expected = all >> ((first + i) * bits) & ((1 << bits) - 1);
                prop_assert_eq!(u128::from(code), expected, "{} bits, code {}", bits, first + i);
            }
        }
    }
}
