//! Types whose codes are 4-bit floats: twice the numbers of E2M1, times half of the scale.

use crate::quantized::gguf::Block;

/// Twice the number of every code.
const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// 32 codes, low halves of the bytes first, with the exponent of the scale in the first byte.
pub(super) struct Mx;

impl Block<17, 32> for Mx {
    #[inline(always)]
    fn decode(block: &[u8; 17], out: &mut [f32; 32]) {
        let exponent = u32::from(block[0]);
        // Half of the two lowest powers of two is subnormal.
        let bits = if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 };
        let d = f32::from_bits(bits);
        for (i, q) in block[1..].iter().enumerate() {
            out[i] = d * f32::from(DOUBLED[usize::from(q & 15)]);
            out[i + 16] = d * f32::from(DOUBLED[usize::from(q >> 4)]);
        }
    }
}

/// Four groups of 16 codes, with a scale of 8 bits each in the first four bytes.
pub(super) struct Nv;

impl Block<36, 64> for Nv {
    #[inline(always)]
    fn decode(block: &[u8; 36], out: &mut [f32; 64]) {
        for (k, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let d = half_of_e4m3(block[k]);
            for (i, q) in block[4 + 8 * k..][..8].iter().enumerate() {
                out[i] = d * f32::from(DOUBLED[usize::from(q & 15)]);
                out[i + 8] = d * f32::from(DOUBLED[usize::from(q >> 4)]);
            }
        }
    }
}

/// Returns half of a scale of 4 exponent and 3 mantissa bits, without its sign. The code of NaN is zero.
#[inline(always)]
fn half_of_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), u32::from(code & 7));
    match (code, exponent) {
        (0x7F, _) => 0.0,
        (_, 0) => f32::from(code & 7) / 1024.0,
        _ => f32::from_bits((exponent + 119) << 23 | mantissa << 20),
    }
}
