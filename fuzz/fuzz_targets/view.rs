//! Compares views of any shape and strides with elements that are decoded one by one.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use lorank::matrix::MatrixView;
use lorank_fuzz::{DTYPES, decode};

/// Largest number of elements that are compared.
const COMPARED: u128 = 1 << 14;

#[derive(Debug)]
struct Claim {
    dtype: lorank::dtype::DType,
    shape: (usize, usize),
    strides: (usize, usize),
    bytes: Vec<u8>,
}

impl<'a> Arbitrary<'a> for Claim {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let dtype = *u.choose(&DTYPES)?;
        let mut size = || -> arbitrary::Result<usize> {
            if u.ratio(1, 16)? { u.arbitrary() } else { u.int_in_range(0..=20) }
        };
        let (shape, strides) = ((size()?, size()?), (size()?, size()?));
        Ok(Self { dtype, shape, strides, bytes: u.bytes(u.len())?.to_vec() })
    }
}

fuzz_target!(|claim: Claim| {
    let Claim { dtype, shape, strides, bytes } = claim;
    let [rows, cols, down, right] = [shape.0, shape.1, strides.0, strides.1].map(|n| n as u128);
    let span = if rows * cols == 0 {
        0
    } else {
        let last = (rows - 1).checked_mul(down).zip((cols - 1).checked_mul(right));
        let last =
            last.and_then(|(a, b)| a.checked_add(b)?.checked_add(1)?.checked_mul(dtype.size() as u128));
        last.unwrap_or(u128::MAX)
    };
    let fits = span <= bytes.len() as u128;
    let Ok(view) = MatrixView::new(&bytes, dtype, shape, strides) else {
        // Numbers that are repeated beyond the size of the bytes may be refused.
        assert!(!fits || rows * cols > (bytes.len() / dtype.size()) as u128);
        return;
    };
    assert!(fits);
    if rows * cols > COMPARED || rows.max(cols) > COMPARED {
        return;
    }
    let element = |i: usize, j: usize| {
        let start = (i * strides.0 + j * strides.1) * dtype.size();
        decode(&bytes[start..start + dtype.size()], dtype)
    };
    let same = |a: &f64, b: &f64| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    let expected: Vec<f64> =
        (0..shape.0).flat_map(|i| (0..shape.1).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect();
    let found = view.to_row_major();
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(&expected).all(|(a, b)| same(a, b)));
    let turned = view.transposed().to_row_major();
    for (k, value) in turned.iter().enumerate() {
        assert!(same(value, &element(k % shape.0, k / shape.0)));
    }
    match view.max_abs() {
        Ok(largest) => {
            assert_eq!(largest, expected.iter().fold(0.0, |m: f64, x| m.max(x.abs())));
            let sum: f64 = expected.iter().map(|x| x * x).sum();
            let found = view.sum_of_squares(1.0);
            assert!(found == sum || (found - sum).abs() <= 1e-12 * sum || sum < 1e-290);
        }
        Err(_) => assert!(expected.iter().any(|x| !x.is_finite())),
    }
});
