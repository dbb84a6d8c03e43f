//! Types whose codes select vectors of -1, 0 and 1, shifted by an eighth: `scale * (vector + shift)`.

use half::f16;

use crate::quantized::gguf::grids::IQ1;
use crate::quantized::gguf::{Block, half, word};

/// A scale and a shift for 32 values.
pub(super) struct S;

impl Block<50, 256> for S {
    #[inline(always)]
    fn decode(block: &[u8; 50], out: &mut [f32; 256]) {
        let d = half(block, 0);
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let high = word(block, 34 + 2 * k);
            let scale = d * f32::from(2 * (high >> 12 & 7) + 1);
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let code = u16::from(block[2 + 4 * k + i]) | (high >> (3 * i) & 7) << 8;
                shifted(out, code, scale, high >> 15 != 0);
            }
        }
    }
}

/// A scale for 16 values and a shift for 8. The 16-bit scale of the block is stored in four parts.
pub(super) struct M;

impl Block<56, 256> for M {
    #[inline(always)]
    fn decode(block: &[u8; 56], out: &mut [f32; 256]) {
        let parts = [0, 1, 2, 3].map(|i| word(block, 48 + 2 * i));
        let bits = parts[0] >> 12 | parts[1] >> 12 << 4 | parts[2] >> 12 << 8 | parts[3] >> 12 << 12;
        let d = f16::from_bits(bits).to_f32();
        for (k, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = d * f32::from(2 * (parts[k / 4] >> (k % 4 * 3) & 7) + 1);
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let high = u16::from(block[32 + k] >> (4 * i) & 15);
                shifted(out, u16::from(block[2 * k + i]) | (high & 7) << 8, scale, high & 8 != 0);
            }
        }
    }
}

#[inline(always)]
fn shifted(out: &mut [f32; 8], code: u16, scale: f32, is_negative: bool) {
    let shift = if is_negative { -0.125 } else { 0.125 };
    for (x, &value) in out.iter_mut().zip(&IQ1[usize::from(code)]) {
        *x = scale * (f32::from(value) + shift);
    }
}
