//! Types whose codes of 4 bits select one of 16 numbers, which are denser near zero.

use crate::quantized::gguf::{Block, half, word};

const NUMBERS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// One scale for 32 values.
pub(super) struct Nl;

impl Block<18, 32> for Nl {
    #[inline(always)]
    fn decode(block: &[u8; 18], out: &mut [f32; 32]) {
        numbers(&block[2..], out, half(block, 0));
    }
}

/// Scales of 6 bits for 32 values, of which the higher bits are stored together.
pub(super) struct Xs;

impl Block<136, 256> for Xs {
    #[inline(always)]
    fn decode(block: &[u8; 136], out: &mut [f32; 256]) {
        let (d, high) = (half(block, 0), word(block, 2));
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = block[4 + k / 2] >> (k % 2 * 4) & 15;
            let scale = u16::from(low) | (high >> (2 * k) & 3) << 4;
            numbers(&block[8 + 16 * k..][..16], out, d * (f32::from(scale) - 32.0));
        }
    }
}

/// Decodes 16 bytes, low halves first.
#[inline(always)]
fn numbers(codes: &[u8], out: &mut [f32; 32], scale: f32) {
    for (i, q) in codes.iter().enumerate() {
        out[i] = scale * f32::from(NUMBERS[usize::from(q & 15)]);
        out[i + 16] = scale * f32::from(NUMBERS[usize::from(q >> 4)]);
    }
}
