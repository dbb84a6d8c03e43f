//! Tests of float32 spectra: their errors, and the bounds on these errors.

use std::sync::{Arc, Mutex};

use lorank::analysis::{Analysis, analyze};
use lorank::cancel::CancelToken;
use lorank::dtype::DType;
use lorank::eigen::{Accuracy, spectrum};
use lorank::matrix::MatrixView;
use lorank::source::StoredMatrix;
use lorank::spectrum::Spectrum;
use nalgebra::DMatrix;
use proptest::prelude::*;

use crate::matrices::{Gaussian, bits, row_major};

fn in_both(view: &MatrixView<'_>) -> [Spectrum; 2] {
    [Accuracy::Exact, Accuracy::Fast]
        .map(|accuracy| spectrum(view, accuracy, 1, &CancelToken::default()).unwrap())
}

/// Checks that the errors are within their bound. Returns the largest error as a share of the bound.
fn assert_within_bound(view: &MatrixView<'_>, label: &str) -> f64 {
    let [exact, fast] = in_both(view);
    let errors = exact.eigenvalues().iter().zip(fast.eigenvalues()).map(|(x, y)| (x - y).abs());
    let error = errors.fold(0.0, f64::max);
    assert!(error <= fast.error(), "{label}: off by {error:e}, bound {:e}", fast.error());
    error / fast.error()
}

fn check(matrix: &DMatrix<f64>, label: &str) -> f64 {
    let (rows, cols) = matrix.shape();
    let values = row_major(matrix);
    assert_within_bound(&MatrixView::from_f64(&values, rows, cols).unwrap(), label)
}

fn analyzed(matrix: &DMatrix<f64>, accuracy: Accuracy) -> Analysis {
    let (rows, cols) = matrix.shape();
    let bytes: Vec<u8> = row_major(matrix).iter().flat_map(|x| x.to_le_bytes()).collect();
    let stored = StoredMatrix::in_memory(Arc::new(bytes), DType::F64, (rows, cols), (cols, 1)).unwrap();
    let found = Mutex::new(None);
    analyze(&[stored], accuracy, 1, &CancelToken::default(), &|_, result| {
        *found.lock().unwrap() = Some(result.unwrap());
    })
    .unwrap();
    found.into_inner().unwrap().unwrap()
}

#[test]
fn eigenvalue_errors_are_within_their_bound() {
    let mut gaussian = Gaussian::new(1);
    let mut most = 0.0f64;
    for (rows, cols) in [(128, 128), (130, 700), (700, 130), (319, 319), (320, 320), (400, 600)] {
        let label = format!("{rows}x{cols}");
        most = most.max(check(&gaussian.matrix(rows, cols), &label));
        let shifted = gaussian.matrix(rows, cols).add_scalar(3.0);
        most = most.max(check(&shifted, &format!("{label} with a mean")));
        let p = rows.min(cols);
        let geometric: Vec<f64> = (0..p).map(|i| 0.9f64.powf(i as f64)).collect();
        check(&gaussian.with_singular_values(rows, cols, &geometric), &format!("{label} graded"));
        let mut clustered = vec![1.0; p];
        clustered[..5].fill(1e3);
        check(&gaussian.with_singular_values(rows, cols, &clustered), &format!("{label} clustered"));
    }
    assert!(most > 0.02, "the bound is a hundred times too wide: only {most} of it is reached");
}

#[test]
fn bound_covers_rounding_that_does_not_average_out() {
    // Sums of equal numbers are rounded in the same direction at every step.
    for (rows, cols, value) in [(128, 128, 0.1), (128, 5000, 0.3), (200, 40_000, 0.7)] {
        check(&DMatrix::from_element(rows, cols, value), &format!("{value} everywhere, {rows}x{cols}"));
    }
}

#[test]
fn bound_holds_for_every_type_and_norm() {
    let numbers = Gaussian::new(2).numbers(200 * 300);
    for norm in [1e-140, 1e-30, 1.0, 1e30, 1e140] {
        let scaled: Vec<f64> = numbers.iter().map(|x| x * norm).collect();
        assert_within_bound(&MatrixView::from_f64(&scaled, 200, 300).unwrap(), &format!("float64, {norm:e}"));
    }
    for norm in [1e-44f32, 1e-30, 1e30] {
        #[expect(clippy::cast_possible_truncation, reason = "the entries of a float32 matrix")]
        let scaled: Vec<f32> = numbers.iter().map(|x| *x as f32 * norm).collect();
        assert_within_bound(&MatrixView::from_f32(&scaled, 200, 300).unwrap(), &format!("float32, {norm:e}"));
    }
    let halves: Vec<u8> = numbers.iter().flat_map(|x| half::bf16::from_f64(*x).to_le_bytes()).collect();
    assert_within_bound(&MatrixView::row_major(&halves, DType::Bf16, 200, 300).unwrap(), "bfloat16");
}

#[test]
fn small_and_zero_matrices_are_exact() {
    let numbers = Gaussian::new(3).numbers(127 * 300);
    let [exact, fast] = in_both(&MatrixView::from_f64(&numbers, 127, 300).unwrap());
    assert_eq!(bits(exact.eigenvalues()), bits(fast.eigenvalues()));
    let [_, zero] = in_both(&MatrixView::from_f64(&vec![0.0; 200 * 200], 200, 200).unwrap());
    assert!(zero.nonzero().is_empty() && zero.num_unresolved() == 0);
}

#[test]
fn unresolved_spectra_are_analysed_in_float64() {
    let mut gaussian = Gaussian::new(4);
    let flat = gaussian.matrix(200, 300);
    assert_eq!(analyzed(&flat, Accuracy::Fast).accuracy, Accuracy::Fast);
    // A third of the eigenvalues is zero, the median is far below the largest, and many eigenvalues are near
    // the edge.
    let deficient = gaussian.matrix(300, 200) * gaussian.matrix(200, 300);
    let mut top = vec![1.0; 200];
    top[0] = 300.0;
    let peaked = gaussian.with_singular_values(200, 300, &top);
    for matrix in [deficient, peaked, DMatrix::from_element(200, 200, 0.3)] {
        let (fast, exact) = (analyzed(&matrix, Accuracy::Fast), analyzed(&matrix, Accuracy::Exact));
        assert_eq!(fast.accuracy, Accuracy::Exact);
        assert_eq!(format!("{:?}", fast.metrics), format!("{:?}", exact.metrics));
    }
}

#[test]
fn error_covers_unresolved_eigenvalues() {
    // Square matrices have such eigenvalues. The error of the exponent includes them.
    let matrix = Gaussian::new(5).matrix(400, 400);
    let (fast, exact) =
        (analyzed(&matrix, Accuracy::Fast).metrics, analyzed(&matrix, Accuracy::Exact).metrics);
    assert_eq!((fast.num_nonzero, exact.num_nonzero), (400, 400));
    let mut deficient = matrix;
    let last = deficient.column(399).into_owned();
    for column in 396..399 {
        deficient.set_column(column, &last);
    }
    let (fast, exact) = (analyzed(&deficient, Accuracy::Fast), analyzed(&deficient, Accuracy::Exact));
    assert_eq!(fast.accuracy, Accuracy::Fast);
    assert_eq!((fast.metrics.num_nonzero, exact.metrics.num_nonzero), (400, 397));
    assert!(fast.metrics.num_unresolved >= 3);
    let off = (fast.metrics.alpha_hill - exact.metrics.alpha_hill).abs();
    assert!(off > 1e-5 && off <= fast.metrics.alpha_hill_error, "{off} {}", fast.metrics.alpha_hill_error);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Checks for any decay that errors of exponents and spikes are within their bounds.
    #[test]
    fn exponents_and_spikes_are_within_their_bounds(
        seed in any::<u64>(), cols in 128usize..200, decay in 0.0f64..8.0, spike in 1.0f64..1e3,
    ) {
        let mut s: Vec<f64> = (0..128).map(|i| (-decay * f64::from(i) / 128.0).exp()).collect();
        s[0] *= spike;
        let matrix = Gaussian::new(seed).with_singular_values(128, cols, &s);
        let (fast, exact) = (analyzed(&matrix, Accuracy::Fast), analyzed(&matrix, Accuracy::Exact));
        let (fast, exact) = (fast.metrics, exact.metrics);
        let off = (fast.alpha_hill - exact.alpha_hill).abs();
        prop_assert!(off <= fast.alpha_hill_error && off < 1e-3, "{off} {}", fast.alpha_hill_error);
        prop_assert!(fast.mp_spikes.abs_diff(exact.mp_spikes) <= fast.mp_spikes_error);
        prop_assert!(fast.mp_spikes_error <= 1);
    }
}
