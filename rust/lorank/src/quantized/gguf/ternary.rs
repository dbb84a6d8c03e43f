//! Types whose codes are -1, 0 and 1, with one scale for 256 values.

use crate::quantized::gguf::{Block, half};

/// Five codes in a byte, in base 3. The byte times `3^n`, without its carry, begins with the `n`-th digit.
pub(super) struct Base3;

impl Block<54, 256> for Base3 {
    #[inline(always)]
    fn decode(block: &[u8; 54], out: &mut [f32; 256]) {
        let d = half(block, 52);
        let (first, rest) = out.split_at_mut(160);
        let (second, third) = rest.split_at_mut(80);
        digits(&block[..32], first, d);
        digits(&block[32..48], second, d);
        digits(&block[48..52], third, d);
    }
}

/// Decodes one digit of every byte, then the next digit of every byte, until `out` is full.
#[inline(always)]
fn digits(bytes: &[u8], out: &mut [f32], d: f32) {
    let mut power = 1u8;
    for out in out.chunks_exact_mut(bytes.len()) {
        for (x, byte) in out.iter_mut().zip(bytes) {
            let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
            *x = d * (f32::from(digit) - 1.0);
        }
        power = power.wrapping_mul(3);
    }
}

/// Codes of 2 bits, minus 1.
pub(super) struct Bits2;

impl Block<66, 256> for Bits2 {
    #[inline(always)]
    fn decode(block: &[u8; 66], out: &mut [f32; 256]) {
        let d = half(block, 64);
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (x, q) in out.iter_mut().zip(&block[k / 4 * 32..][..32]) {
                *x = d * (f32::from(q >> (k % 4 * 2) & 3) - 1.0);
            }
        }
    }
}
