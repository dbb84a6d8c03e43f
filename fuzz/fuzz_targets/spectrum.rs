//! Compares the spectra of matrices of arbitrary bits with nalgebra's singular values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lorank::cancel::CancelToken;
use lorank::eigen::{Accuracy, spectrum};
use lorank::matrix::MatrixView;
use lorank::metrics::SpectralMetrics;
use lorank_fuzz::Bits;

fuzz_target!(|matrix: Bits| {
    let values = matrix.values();
    let view = MatrixView::row_major(&matrix.bytes, matrix.dtype, matrix.rows, matrix.cols).unwrap();
    let largest = values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let is_finite = values.iter().all(|x| x.is_finite());
    let is_moderate = is_finite && (largest == 0.0 || (1e-130..1e130).contains(&largest));
    let found = spectrum(&view, Accuracy::Exact, 1, &CancelToken::default());
    let found = match found {
        Ok(found) => found,
        Err(error) => return assert!(!is_moderate, "{error}"),
    };
    assert!(is_finite);
    let eigenvalues = found.eigenvalues();
    assert_eq!(eigenvalues.len(), matrix.rows.min(matrix.cols));
    assert!(eigenvalues.is_sorted() && eigenvalues.iter().all(|x| *x >= 0.0 && x.is_finite()));
    if largest > 0.0 && is_moderate {
        let mut expected: Vec<f64> = (matrix.dense() / largest).singular_values().iter().copied().collect();
        expected.sort_by(f64::total_cmp);
        let unit = expected.last().unwrap().powi(2);
        for (mine, theirs) in eigenvalues.iter().zip(&expected) {
            let mine = (mine.sqrt() / largest).powi(2);
            assert!((mine - theirs * theirs).abs() <= 1e-13 * unit, "{mine:e} {:e}", theirs * theirs);
        }
    }
    let metrics = SpectralMetrics::new(&found, (matrix.rows, matrix.cols));
    assert!(metrics.is_ok() || matrix.rows * matrix.cols == 0);
});
