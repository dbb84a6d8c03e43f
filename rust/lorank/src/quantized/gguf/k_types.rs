//! Types of 256 values with scales of 16 or 32 values, which are quantized themselves.

use crate::quantized::gguf::{Block, half};

/// Codes of 2 bits: `d * scale * q - dmin * min`, with scales and minima of 4 bits.
pub(super) struct Q2;

impl Block<84, 256> for Q2 {
    #[inline(always)]
    fn decode(block: &[u8; 84], out: &mut [f32; 256]) {
        let (d, dmin) = (half(block, 80), half(block, 82));
        let value =
            |k: usize, q: u8| d * f32::from(block[k] & 15) * f32::from(q) - dmin * f32::from(block[k] >> 4);
        for_quarters(out, |k, i| {
            let codes = block[16 + k / 8 * 32 + i];
            [0, 1, 2, 3].map(|j| value(k + 2 * j, codes >> (2 * j) & 3))
        });
    }
}

/// Codes of 3 bits, of which the highest are stored together: `d * (scale - 32) * q`. A code without its
/// highest bit has 4 subtracted.
pub(super) struct Q3;

impl Block<110, 256> for Q3 {
    #[inline(always)]
    fn decode(block: &[u8; 110], out: &mut [f32; 256]) {
        let d = half(block, 108);
        let scales = &block[96..108];
        let mut scale = [0.0; 16];
        for (k, scale) in scale.iter_mut().enumerate() {
            let low = scales[k % 8] >> (k / 8 * 4) & 15;
            let high = scales[8 + k % 4] >> (k / 4 * 2) & 3;
            *scale = d * (f32::from(low | high << 4) - 32.0);
        }
        for_quarters(out, |k, i| {
            let codes = block[32 + k / 8 * 32 + i];
            let highest = block[i] >> (k / 8 * 4);
            [0, 1, 2, 3].map(|j| {
                let code = codes >> (2 * j) & 3 | (highest >> j & 1) << 2;
                scale[k + 2 * j] * (f32::from(code) - 4.0)
            })
        });
    }
}

/// Writes the values of both halves of a block. `values(k, i)` returns the `i`-th value of each 32 of a half; the
/// first of them belongs to the `k`-th 16 values of the block, the others to every second 16 values from there.
#[inline(always)]
fn for_quarters(out: &mut [f32; 256], values: impl Fn(usize, usize) -> [f32; 4]) {
    for (h, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        for part in 0..2 {
            for i in 16 * part..16 * part + 16 {
                let found = values(8 * h + part, i);
                for (j, value) in found.into_iter().enumerate() {
                    out[32 * j + i] = value;
                }
            }
        }
    }
}

/// Codes of 4 bits: `d * scale * q - dmin * min`, with scales and minima of 6 bits.
pub(super) struct Q4;

impl Block<144, 256> for Q4 {
    #[inline(always)]
    fn decode(block: &[u8; 144], out: &mut [f32; 256]) {
        let (scales, mins) = scales_and_mins(block);
        for (k, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            let codes = &block[16 + 32 * k..][..32];
            let (scale, min) = (scales[2 * k], mins[2 * k]);
            let (next, next_min) = (scales[2 * k + 1], mins[2 * k + 1]);
            let (low, high) = out.split_at_mut(32);
            for (x, q) in low.iter_mut().zip(codes) {
                *x = scale * f32::from(q & 15) - min;
            }
            for (x, q) in high.iter_mut().zip(codes) {
                *x = next * f32::from(q >> 4) - next_min;
            }
        }
    }
}

/// Codes of 5 bits, of which the highest are stored together, otherwise as [`Q4`].
pub(super) struct Q5;

impl Block<176, 256> for Q5 {
    #[inline(always)]
    fn decode(block: &[u8; 176], out: &mut [f32; 256]) {
        let (scales, mins) = scales_and_mins(block);
        let highest = &block[16..48];
        for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let codes = &block[48 + k / 2 * 32..][..32];
            for (x, (q, h)) in out.iter_mut().zip(codes.iter().zip(highest)) {
                let code = q >> (k % 2 * 4) & 15 | (h >> k & 1) << 4;
                *x = scales[k] * f32::from(code) - mins[k];
            }
        }
    }
}

/// Returns the eight scales and minima of 32 values. Four of each are stored in 6 bits of a byte; of the other
/// four, the higher bits are stored above those.
#[inline(always)]
fn scales_and_mins<const BYTES: usize>(block: &[u8; BYTES]) -> ([f32; 8], [f32; 8]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    for i in 0..4 {
        let (scale, min, both) = (block[4 + i], block[8 + i], block[12 + i]);
        scales[i] = d * f32::from(scale & 63);
        mins[i] = dmin * f32::from(min & 63);
        scales[i + 4] = d * f32::from(both & 15 | scale >> 2 & 0x30);
        mins[i + 4] = dmin * f32::from(both >> 4 | min >> 2 & 0x30);
    }
    (scales, mins)
}

/// Codes of 6 bits, of which the two highest are stored together, minus 32, with scales of 8 bits.
pub(super) struct Q6;

impl Block<210, 256> for Q6 {
    #[inline(always)]
    fn decode(block: &[u8; 210], out: &mut [f32; 256]) {
        let d = half(block, 208);
        let value = |k: usize, q: u8| d * f32::from(block[192 + k].cast_signed()) * (f32::from(q) - 32.0);
        for_quarters(out, |k, i| {
            // The low halves of 64 bytes, then the high halves.
            let (h, highest) = (k / 8, block[128 + k / 8 * 32 + i]);
            let (first, second) = (block[64 * h + i], block[64 * h + 32 + i]);
            [
                value(k, first & 15 | (highest & 3) << 4),
                value(k + 2, second & 15 | (highest >> 2 & 3) << 4),
                value(k + 4, first >> 4 | (highest >> 4 & 3) << 4),
                value(k + 6, second >> 4 | highest >> 6 << 4),
            ]
        });
    }
}
