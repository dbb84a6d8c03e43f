use std::sync::Arc;

use super::*;
use crate::low_rank::replay::{Replayed, compare};
use crate::matrix::dtype::DType;

fn numbers(count: usize, seed: usize) -> Vec<f64> {
    (0..count).map(|i| (((i + seed) * 7919) % 1013) as f64 / 506.0 - 1.0).collect()
}

fn stored(values: &[f64], shape: (usize, usize)) -> StoredMatrix {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    StoredMatrix::in_memory(Arc::new(bytes), DType::F64, shape, (shape.1, 1)).unwrap()
}

fn rows_of(matrix: &UpdatedMatrix) -> Vec<f64> {
    let mut found = Vec::new();
    matrix
        .stream(&mut Buffer::default(), &CancelToken::default(), &mut |rows| {
            found.extend_from_slice(rows);
            Ok(())
        })
        .unwrap();
    found
}

#[test]
fn updated_weight_is_the_sum_of_its_terms() {
    for (rows, cols, ranks) in
        [(1, 1, vec![1]), (7, 3, vec![2, 3]), (300, 700, vec![8]), (40, 5000, vec![130])]
    {
        for is_transposed in [false, true] {
            let base = numbers(rows * cols, 1);
            let mut expected = base.clone();
            let mut addends = Vec::new();
            for (k, r) in ranks.iter().enumerate() {
                let (out, fan_in) = if is_transposed { (cols, rows) } else { (rows, cols) };
                let (b, a, weight) = (numbers(out * r, 2 + k), numbers(r * fan_in, 5 + k), 0.5 + k as f64);
                for i in 0..rows {
                    for j in 0..cols {
                        let (o, n) = if is_transposed { (j, i) } else { (i, j) };
                        let sum: f64 = (0..*r).map(|l| b[o * r + l] * a[l * fan_in + n]).sum();
                        expected[i * cols + j] += weight * sum;
                    }
                }
                let term = Term { b: stored(&b, (out, *r)), a: stored(&a, (*r, fan_in)), weight };
                addends.push(Addend { term, is_transposed });
            }
            let matrix = UpdatedMatrix::new(stored(&base, (rows, cols)), addends, None).unwrap();
            for (x, y) in rows_of(&matrix).iter().zip(&expected) {
                assert!((x - y).abs() < 1e-11, "{rows}x{cols}: {x} {y}");
            }
        }
    }
}

#[test]
fn magnitudes_are_the_norms_of_rows_or_columns() {
    let (rows, cols) = (50, 33);
    for is_of_columns in [false, true] {
        let count = if is_of_columns { cols } else { rows };
        let values: Vec<f64> = (0..count).map(|i| 1.0 + i as f64).collect();
        let magnitude = Magnitude { values: values.clone(), is_of_columns };
        let base = stored(&numbers(rows * cols, 3), (rows, cols));
        let found = rows_of(&UpdatedMatrix::new(base, vec![], Some(magnitude)).unwrap());
        for (k, value) in values.iter().enumerate() {
            let square = |i: usize, j: usize| found[i * cols + j].powi(2);
            let norm: f64 = if is_of_columns {
                (0..rows).map(|i| square(i, k)).sum()
            } else {
                (0..cols).map(|j| square(k, j)).sum()
            };
            assert!((norm.sqrt() - value).abs() < 1e-12 * value);
        }
    }
}

#[test]
fn misfits_are_errors() {
    let term = Term { b: stored(&[0.0; 6], (3, 2)), a: stored(&[0.0; 8], (2, 4)), weight: 1.0 };
    let addend = Addend { term, is_transposed: false };
    let fail = |shape: (usize, usize), magnitude| {
        UpdatedMatrix::new(stored(&vec![0.0; shape.0 * shape.1], shape), vec![addend.clone()], magnitude)
            .unwrap_err()
            .to_string()
    };
    assert!(fail((4, 3), None).contains("3x2 and 2x4 do not fit a weight stored as 4x3"));
    let magnitude = Magnitude { values: vec![1.0; 4], is_of_columns: false };
    assert!(fail((3, 4), Some(magnitude)).contains("4 magnitudes"));
    let term = Term { b: stored(&[f64::NAN; 3], (3, 1)), a: stored(&[0.0; 4], (1, 4)), weight: 1.0 };
    let addends = vec![Addend { term, is_transposed: false }];
    let matrix = UpdatedMatrix::new(stored(&[0.0; 12], (3, 4)), addends, None).unwrap();
    let error = matrix.stream(&mut Buffer::default(), &CancelToken::default(), &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("NaN"));
}

#[test]
fn comparison_separates_lost_updates_from_rounded_ones() {
    let (rows, cols) = (30, 40);
    let base = numbers(rows * cols, 1);
    let (b, a) = (numbers(rows, 2), numbers(cols, 3));
    let term = Term { b: stored(&b, (rows, 1)), a: stored(&a, (1, cols)), weight: 0.25 };
    let addends = vec![Addend { term, is_transposed: false }];
    let expected = UpdatedMatrix::new(stored(&base, (rows, cols)), addends, None).unwrap();
    let of = |values: &[f64]| {
        let found = stored(values, (rows, cols));
        let pair = Replayed { expected: expected.clone(), found };
        compare(&pair, &mut Default::default(), &CancelToken::default()).unwrap()
    };
    let whole = of(&rows_of(&expected));
    assert_eq!((whole.exact, whole.error.to_bits(), whole.largest_error.to_bits()), (1200, 0, 0));
    assert!(whole.unchanged < 100 && (whole.overlap - whole.update).abs() < 1e-12 * whole.update);
    let lost = of(&base);
    assert_eq!((lost.unchanged, lost.change.to_bits()), (1200, 0));
    assert!((lost.error - lost.update).abs() < 1e-12 * lost.update);
}
