use super::*;
use crate::kernels::simd::tests::on_every_path;

/// Number of blocks of a test.
const BLOCKS: usize = 5;

/// Returns bytes without a pattern.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..count).map(|_| next()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

#[test]
fn blocks_decode_equally_on_all_vectors() {
    for &(name, len, decoder) in TYPES {
        let codes = bytes(BLOCKS * 256);
        let decoder = decoder(BLOCKS * len);
        let decoded = || {
            let mut out = vec![0.0; BLOCKS * len];
            decoder.decode(&[&codes], 0..1, 0..BLOCKS * len, &mut out);
            bits(&out)
        };
        let expected = decoded();
        assert!(expected.iter().any(|&x| x != 0), "{name}");
        on_every_path(|path| assert_eq!(decoded(), expected, "{name} on {path:?}"));
    }
}

#[test]
fn parts_of_rows_are_those_of_whole_matrices() {
    for &(name, len, decoder) in TYPES {
        let codes = bytes(BLOCKS * 256);
        let total = BLOCKS * len;
        let mut whole = vec![0.0; total];
        decoder(total).decode(&[&codes], 0..1, 0..total, &mut whole);
        // Rows that begin within blocks.
        let (rows, cols) = (len / 4, BLOCKS * 4);
        let decoder = decoder(cols);
        for range in [0..cols, 0..1, 3..cols, 7..9, 5..5] {
            let mut out = vec![0.0; (rows - 1) * range.len()];
            decoder.decode(&[&codes], 1..rows, range.clone(), &mut out);
            let expected: Vec<f32> =
                (1..rows).flat_map(|i| &whole[i * cols..][range.clone()]).copied().collect();
            assert_eq!(bits(&out), bits(&expected), "{name} {range:?}");
        }
    }
}
