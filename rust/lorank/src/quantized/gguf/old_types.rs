//! Types with one scale for 32 values: `d * q`, and for names that end with 1 `d * q + m`.

use crate::quantized::gguf::{Block, double_word, half};

/// Codes of 4 bits, low halves of the bytes first, minus 8.
pub(super) struct Q4With0;

impl Block<18, 32> for Q4With0 {
    #[inline(always)]
    fn decode(block: &[u8; 18], out: &mut [f32; 32]) {
        let d = half(block, 0);
        for (i, q) in block[2..].iter().enumerate() {
            out[i] = d * (f32::from(q & 15) - 8.0);
            out[i + 16] = d * (f32::from(q >> 4) - 8.0);
        }
    }
}

/// Codes of 4 bits and a minimum.
pub(super) struct Q4With1;

impl Block<20, 32> for Q4With1 {
    #[inline(always)]
    fn decode(block: &[u8; 20], out: &mut [f32; 32]) {
        let (d, m) = (half(block, 0), half(block, 2));
        for (i, q) in block[4..].iter().enumerate() {
            out[i] = d * f32::from(q & 15) + m;
            out[i + 16] = d * f32::from(q >> 4) + m;
        }
    }
}

/// Codes of 5 bits, of which the highest are stored together, minus 16.
pub(super) struct Q5With0;

impl Block<22, 32> for Q5With0 {
    #[inline(always)]
    fn decode(block: &[u8; 22], out: &mut [f32; 32]) {
        let (d, high) = (half(block, 0), double_word(block, 2));
        for (i, q) in block[6..].iter().enumerate() {
            out[i] = d * (f32::from(q & 15 | bit(high, i)) - 16.0);
            out[i + 16] = d * (f32::from(q >> 4 | bit(high, i + 16)) - 16.0);
        }
    }
}

/// Codes of 5 bits and a minimum.
pub(super) struct Q5With1;

impl Block<24, 32> for Q5With1 {
    #[inline(always)]
    fn decode(block: &[u8; 24], out: &mut [f32; 32]) {
        let (d, m, high) = (half(block, 0), half(block, 2), double_word(block, 4));
        for (i, q) in block[8..].iter().enumerate() {
            out[i] = d * f32::from(q & 15 | bit(high, i)) + m;
            out[i + 16] = d * f32::from(q >> 4 | bit(high, i + 16)) + m;
        }
    }
}

/// Returns a bit of a word as the fifth bit of a code.
#[inline(always)]
fn bit(high: u32, at: usize) -> u8 {
    u8::from(high >> at & 1 != 0) << 4
}

/// Codes of 8 bits.
pub(super) struct Q8With0;

impl Block<34, 32> for Q8With0 {
    #[inline(always)]
    fn decode(block: &[u8; 34], out: &mut [f32; 32]) {
        let d = half(block, 0);
        for (x, q) in out.iter_mut().zip(&block[2..]) {
            *x = f32::from(q.cast_signed()) * d;
        }
    }
}
