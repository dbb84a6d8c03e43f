//! Types whose codes select vectors of four magnitudes out of eight: some 3 bits per value.

use crate::quantized::gguf::grids::{IQ3_S, IQ3_XXS, even_signs, signed};
use crate::quantized::gguf::{Block, double_word, half};

/// A scale for 32 values in a word with their signs.
pub(super) struct Xxs;

impl Block<98, 256> for Xxs {
    #[inline(always)]
    fn decode(block: &[u8; 98], out: &mut [f32; 256]) {
        let d = half(block, 0);
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let word = double_word(block, 66 + 4 * k);
            let scale = d * (0.5 + f32::from((word >> 28).to_le_bytes()[0])) * 0.5;
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let codes = &block[2 + 8 * k + 2 * i..][..2];
                let signs = even_signs(word >> (7 * i));
                signed(&mut out[..4], &IQ3_XXS[usize::from(codes[0])], scale, signs);
                signed(&mut out[4..], &IQ3_XXS[usize::from(codes[1])], scale, signs >> 4);
            }
        }
    }
}

/// Codes, their highest bits, signs, and odd scales of 32 values, stored apart.
pub(super) struct S;

impl Block<110, 256> for S {
    #[inline(always)]
    fn decode(block: &[u8; 110], out: &mut [f32; 256]) {
        let d = half(block, 0);
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let scale = d * f32::from(1 + 2 * (block[106 + k / 2] >> (k % 2 * 4) & 15));
            let high = usize::from(block[66 + k]);
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let codes = &block[2 + 8 * k + 2 * i..][..2];
                let signs = block[74 + 4 * k + i];
                let code = |j: usize| usize::from(codes[j]) | (high >> (2 * i + j) & 1) << 8;
                signed(&mut out[..4], &IQ3_S[code(0)], scale, signs);
                signed(&mut out[4..], &IQ3_S[code(1)], scale, signs >> 4);
            }
        }
    }
}
