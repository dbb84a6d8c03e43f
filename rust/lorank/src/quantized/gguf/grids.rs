//! Tables of the types whose codes select one of some hundred vectors of 4 or 8 magnitudes.

/// The tables, one after another: a word of 16 bits for a vector, with 2 bits for each of 8 elements or 4 bits
/// for each of 4 elements.
const PACKED: &[u8] = include_bytes!("grids.bin");

pub(super) static IQ2_XXS: [[i8; 8]; 256] = unpacked(0, [8, 25, 43, 0]);
pub(super) static IQ2_XS: [[i8; 8]; 512] = unpacked(256, [8, 25, 43, 0]);
pub(super) static IQ2_S: [[i8; 8]; 1024] = unpacked(768, [8, 25, 43, 0]);
pub(super) static IQ3_XXS: [[i8; 4]; 256] = unpacked(1792, [4, 12, 20, 28, 36, 44, 52, 62]);
pub(super) static IQ3_S: [[i8; 4]; 512] = unpacked(2048, [1, 3, 5, 7, 9, 11, 13, 15]);
pub(super) static IQ1: [[i8; 8]; 2048] = unpacked(2560, [-1, 0, 1, 0]);

/// Returns `COUNT` vectors of a table from a word of [`PACKED`] on, given the values of the packed codes.
const fn unpacked<const LEN: usize, const COUNT: usize, const VALUES: usize>(
    first: usize,
    values: [i8; VALUES],
) -> [[i8; LEN]; COUNT] {
    let mut table = [[0; LEN]; COUNT];
    let mut k = 0;
    while k < COUNT {
        let at = 2 * (first + k);
        let word = u16::from_le_bytes([PACKED[at], PACKED[at + 1]]);
        let mut i = 0;
        while i < LEN {
            let code = word as usize >> (16 / LEN * i) & (VALUES - 1);
            table[k][i] = values[code];
            i += 1;
        }
        k += 1;
    }
    table
}

/// Returns eight signs from seven bits: the number of negative signs is even.
#[inline(always)]
pub(super) fn even_signs(code: u32) -> u8 {
    let seven = code.to_le_bytes()[0] & 127;
    seven | u8::from(seven.count_ones() % 2 == 1) << 7
}

/// Writes `scale * magnitude` with the signs of the lowest bits.
#[inline(always)]
pub(super) fn signed<const LEN: usize>(out: &mut [f32], magnitudes: &[i8; LEN], scale: f32, signs: u8) {
    for (i, (x, &magnitude)) in out.iter_mut().zip(magnitudes).enumerate() {
        let sign = u32::from(signs) << (31 - i) & 1 << 31;
        *x = f32::from_bits((scale * f32::from(magnitude)).to_bits() ^ sign);
    }
}
