//! Types whose codes select vectors of eight magnitudes, of which each is 8, 25 or 43: some 2 bits per value.

use crate::quantized::gguf::grids::{IQ2_S, IQ2_XS, IQ2_XXS, even_signs, signed};
use crate::quantized::gguf::{Block, double_word, half, word};

/// A scale for 32 values in a word with their signs.
pub(super) struct Xxs;

impl Block<66, 256> for Xxs {
    #[inline(always)]
    fn decode(block: &[u8; 66], out: &mut [f32; 256]) {
        let d = half(block, 0);
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let at = 2 + 8 * k;
            let signs = double_word(block, at + 4);
            let scale = quarter(d, (signs >> 28).to_le_bytes()[0]);
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let vector = &IQ2_XXS[usize::from(block[at + i])];
                signed(out, vector, scale, even_signs(signs >> (7 * i)));
            }
        }
    }
}

/// Words with the code and the signs of eight values, and a scale for 16.
pub(super) struct Xs;

impl Block<74, 256> for Xs {
    #[inline(always)]
    fn decode(block: &[u8; 74], out: &mut [f32; 256]) {
        let d = half(block, 0);
        for (k, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = quarter(d, block[66 + k / 2] >> (k % 2 * 4) & 15);
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let code = word(block, 2 + 4 * k + 2 * i);
                signed(out, &IQ2_XS[usize::from(code & 511)], scale, even_signs(u32::from(code >> 9)));
            }
        }
    }
}

/// Codes, signs, higher bits of the codes, and scales of 16 values, stored apart.
pub(super) struct S;

impl Block<82, 256> for S {
    #[inline(always)]
    fn decode(block: &[u8; 82], out: &mut [f32; 256]) {
        let d = half(block, 0);
        for (k, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = quarter(d, block[74 + k / 2] >> (k % 2 * 4) & 15);
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let at = 2 * k + i;
                let high = usize::from(block[66 + at / 4] >> (at % 4 * 2) & 3);
                signed(out, &IQ2_S[usize::from(block[2 + at]) | high << 8], scale, block[34 + at]);
            }
        }
    }
}

#[inline(always)]
fn quarter(d: f32, scale: u8) -> f32 {
    d * (0.5 + f32::from(scale)) * 0.25
}
