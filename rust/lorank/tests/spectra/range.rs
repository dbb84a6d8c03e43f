//! Tests of norms far from 1, entries that are not finite or have squares out of range, and empty shapes.

use lorank::cancel::CancelToken;
use lorank::dtype::DType;
use lorank::matrix::MatrixView;
use lorank::spectrum::Spectrum;
use lorank::{
    Error, Result,
    eigen::{self, Accuracy},
    svd,
};
use nalgebra::DMatrix;
use proptest::prelude::*;

use crate::matrices::{Gaussian, assert_eigenvalues, bits, row_major, spectrum_of};

fn try_f64(values: &[f64], rows: usize, cols: usize) -> Result<Spectrum> {
    eigen::spectrum(
        &MatrixView::from_f64(values, rows, cols).unwrap(),
        Accuracy::Exact,
        1,
        &CancelToken::default(),
    )
}

fn try_f32(values: &[f32], rows: usize, cols: usize) -> Result<Spectrum> {
    eigen::spectrum(
        &MatrixView::from_f32(values, rows, cols).unwrap(),
        Accuracy::Exact,
        1,
        &CancelToken::default(),
    )
}

#[test]
fn tiny_and_huge_norms_keep_the_accuracy() {
    let s: Vec<f64> = (1..=40).map(f64::from).collect();
    let matrix = Gaussian::new(1).with_singular_values(90, 40, &s);
    for norm in [1e-140, 1e-30, 1e30, 1e140] {
        let expected: Vec<f64> = s.iter().map(|s| (s * norm) * (s * norm)).collect();
        assert_eigenvalues(&spectrum_of(&(&matrix * norm)), &expected, &format!("float64 at {norm:e}"));
    }
    // In float32 the entries are rounded first: the oracle is computed from the rounded entries.
    for norm in [1e-40, 1e-30, 1e30, 1e37] {
        #[expect(clippy::cast_possible_truncation, reason = "the entries of a float32 matrix")]
        let rounded: Vec<f32> = row_major(&matrix).iter().map(|x| (x * norm) as f32).collect();
        let unit = DMatrix::from_row_iterator(90, 40, rounded.iter().map(|&x| f64::from(x) / norm));
        let singular_values = unit.singular_values();
        let expected: Vec<f64> = singular_values.iter().map(|s| (s * norm) * (s * norm)).collect();
        let found = try_f32(&rounded, 90, 40).unwrap();
        assert_eigenvalues(&found, &expected, &format!("float32 at {norm:e}"));
    }
}

proptest! {
    /// Includes numbers just below a power of two, whose logarithm may be rounded to the next integer.
    #[test]
    fn powers_of_two_scale_exactly(exponent in -450i32..450, seed in any::<u64>(), peak in 0usize..4) {
        let mut matrix = Gaussian::new(seed).matrix(12, 20);
        matrix[(3, 5)] = [8.0, 8.0 * (1.0 - f64::EPSILON / 2.0), 8.0 * (1.0 + f64::EPSILON), -5.0][peak];
        let plain = spectrum_of(&matrix);
        let scaled = spectrum_of(&(matrix * 2f64.powi(exponent)));
        let expected: Vec<f64> = plain.eigenvalues().iter().map(|x| x * 2f64.powi(2 * exponent)).collect();
        prop_assert_eq!(bits(scaled.eigenvalues()), bits(&expected));
    }
}

#[test]
fn nan_and_infinity_are_errors_at_any_position() {
    for position in [0, 7, 1499, 2999] {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut values = vec![1.0; 3000];
            values[position] = bad;
            for (rows, cols) in [(1, 3000), (3000, 1), (50, 60)] {
                let error = try_f64(&values, rows, cols).unwrap_err();
                assert!(matches!(error, Error::Numerical(_)), "{error}");
                assert!(error.to_string().contains("NaN or infinite"), "{error}");
            }
        }
    }
    // The second float8 code is NaN; the format has no infinity.
    let view = MatrixView::row_major(&[0x38, 0x7f], DType::F8E4M3, 1, 2).unwrap();
    assert!(eigen::spectrum(&view, Accuracy::Exact, 1, &CancelToken::default()).is_err());
}

#[test]
fn magnitudes_with_squares_out_of_range_are_errors() {
    for size in [5e-324, 1e-200, 1e200, f64::MAX] {
        let error = try_f64(&[0.0, size, size, 0.0], 2, 2).unwrap_err();
        assert!(matches!(error, Error::Numerical(_)), "{error}");
        assert!(error.to_string().contains("rescale"), "{error}");
    }
    // Entries out of range are allowed if the largest one is in range.
    assert_eigenvalues(&try_f64(&[1.0, 0.0, 0.0, 1e-200], 2, 2).unwrap(), &[0.0, 1.0], "1 and 1e-200");
}

#[test]
fn empty_shapes_have_no_values() {
    let cancel = CancelToken::default();
    // The shapes with `usize::MAX` would not terminate if empty rows were visited.
    for (rows, cols) in [(0, 0), (0, 5), (5, 0), (0, usize::MAX), (usize::MAX, 0)] {
        for strides in [(cols, 1), (1, rows), (1, 1)] {
            let view = MatrixView::new(&[], DType::F32, (rows, cols), strides).unwrap();
            assert!(eigen::spectrum(&view, Accuracy::Exact, 2, &cancel).unwrap().eigenvalues().is_empty());
            assert!(svd::singular_values(&view).unwrap().is_empty());
        }
    }
}

#[test]
fn cancellation_before_the_start_is_an_error() {
    let cancel = CancelToken::default();
    cancel.cancel();
    let view = MatrixView::from_f64(&[1.0, 2.0], 1, 2).unwrap();
    assert!(matches!(eigen::spectrum(&view, Accuracy::Exact, 1, &cancel), Err(Error::Cancelled)));
}
