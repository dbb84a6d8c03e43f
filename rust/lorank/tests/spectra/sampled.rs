//! Tests of estimated spectra: the coverage of the error bars, and exceptional matrices.

use lorank::cancel::CancelToken;
use lorank::eigen::{Accuracy, spectrum};
use lorank::hill::{Convention, alpha_hill};
use lorank::marchenko_pastur::{Scale, marchenko_pastur};
use lorank::matrix::MatrixView;
use lorank::parallel::{Strategy, pool};
use lorank::sampled::{SampledSpectrum, sampled_spectrum};
use lorank::spectrum::Spectrum;
use lorank::{Error, dtype::DType};
use nalgebra::DMatrix;

use crate::matrices::{Gaussian, bits, row_major, spectrum_of};

fn sample(matrix: &DMatrix<f64>) -> SampledSpectrum {
    let values = row_major(matrix);
    let view = MatrixView::from_f64(&values, matrix.nrows(), matrix.ncols()).unwrap();
    sampled_spectrum(&view, Strategy::Alone, &CancelToken::default()).unwrap()
}

fn exponent(spectrum: &Spectrum) -> f64 {
    alpha_hill(spectrum, Convention::Median)
}

#[test]
fn error_bars_cover_the_true_values() {
    let mut gaussian = Gaussian::new(1);
    let (mut count, mut exponents, mut spikes) = (0, 0, 0);
    let mut bars = Vec::new();
    for (rows, cols) in [(150, 150), (200, 500), (600, 180)] {
        let p = rows.min(cols);
        for decay in [0.0, 1.0, 2.0, 4.0] {
            for outliers in [0, 1, 6] {
                let values: Vec<f64> = (0..p)
                    .map(|i| (-decay * i as f64 / p as f64).exp() * if i < outliers { 10.0 } else { 1.0 })
                    .collect();
                let mut matrix = gaussian.with_singular_values(rows, cols, &values);
                matrix += gaussian.matrix(rows, cols) * (0.5 / (rows.max(cols) as f64).sqrt());
                let (exact, found) = (spectrum_of(&matrix), sample(&matrix));
                let above = |spectrum: &Spectrum| {
                    marchenko_pastur(spectrum, (rows, cols), Scale::Mean).unwrap().spikes as f64
                };
                let bar = found.error(exponent);
                bars.push(bar / exponent(&exact));
                count += 1;
                exponents += usize::from((exponent(&exact) - exponent(&found.spectrum)).abs() <= bar);
                let off = (above(&exact) - above(&found.spectrum)).abs();
                spikes += usize::from(off <= found.error(above).ceil() + 1.0);
                assert!((found.spectrum.sum() / exact.sum() - 1.0).abs() < 1e-10);
                assert!((found.spectrum.largest() / exact.largest() - 1.0).abs() < 0.02);
            }
        }
    }
    assert!(10 * exponents >= 9 * count, "{exponents} of {count}");
    assert!(10 * spikes >= 9 * count, "{spikes} of {count}");
    bars.sort_by(f64::total_cmp);
    assert!(bars[count / 2] < 0.1, "the error bars are too wide: {}", bars[count / 2]);
}

#[test]
fn iteration_ends_early_for_few_distinct_values() {
    let mut gaussian = Gaussian::new(2);
    // Two values in equal parts: the exponent is determined by their ratio.
    let halves: Vec<f64> = (0..160).map(|i| if i % 2 == 0 { 1.0 } else { 3.0 }).collect();
    let found = sample(&gaussian.with_singular_values(160, 200, &halves)).spectrum;
    assert!((found.largest() - 9.0).abs() < 1e-4 && (found.eigenvalues()[0] - 1.0).abs() < 1e-4);
    for matrix in [DMatrix::identity(150, 150), DMatrix::from_element(150, 180, 0.3)] {
        let (exact, found) = (spectrum_of(&matrix), sample(&matrix).spectrum);
        assert!((found.largest() / exact.largest() - 1.0).abs() < 1e-5);
        assert_eq!(found.eigenvalues().len(), 150);
    }
    let zero = sample(&DMatrix::zeros(130, 140));
    assert!(zero.spectrum.nonzero().is_empty());
    assert!(zero.error(Spectrum::sum) == 0.0);
}

#[test]
fn estimate_is_independent_of_layout_and_threads() {
    let numbers = Gaussian::new(3).numbers(300 * 1500);
    let view = MatrixView::from_f64(&numbers, 300, 1500).unwrap();
    let with = |view: &MatrixView<'_>, threads, strategy| {
        let run = || sampled_spectrum(view, strategy, &CancelToken::default()).unwrap().spectrum;
        bits(pool(threads).unwrap().install(run).eigenvalues())
    };
    let alone = with(&view, 1, Strategy::Alone);
    for threads in [1, 2, 5] {
        assert_eq!(with(&view, threads, Strategy::Together), alone);
        assert_eq!(with(&view.transposed(), threads, Strategy::Together), alone);
    }
}

#[test]
fn only_large_matrices_are_estimated() {
    let bytes: Vec<u8> =
        Gaussian::new(4).numbers(2048 * 2048).iter().map(|x| x.to_le_bytes()[3] & 0xbf).collect();
    let view = MatrixView::row_major(&bytes, DType::F8E4M3, 2048, 2048).unwrap();
    let cancel = CancelToken::default();
    let estimate = spectrum(&view, Accuracy::Sampled, 2, &cancel).unwrap();
    let fast = spectrum(&view, Accuracy::Fast, 2, &cancel).unwrap();
    assert_ne!(bits(estimate.eigenvalues()), bits(fast.eigenvalues()));
    let off = (exponent(&estimate) - exponent(&fast)).abs();
    assert!(off < 0.02 * exponent(&fast), "{off}");
    assert_eq!(Accuracy::Sampled.for_shape(2047, 5000), Accuracy::Fast);
    assert_eq!(Accuracy::Sampled.for_shape(5000, 100), Accuracy::Exact);
    // Embeddings are too long for the bounds of float32.
    assert_eq!(Accuracy::Fast.for_shape(30_522, 384), Accuracy::Exact);
    cancel.cancel();
    assert!(matches!(spectrum(&view, Accuracy::Sampled, 2, &cancel), Err(Error::Cancelled)));
}

#[test]
fn nan_is_an_error() {
    let mut values = vec![1.0; 200 * 200];
    values[777] = f64::NAN;
    let view = MatrixView::from_f64(&values, 200, 200).unwrap();
    let found = sampled_spectrum(&view, Strategy::Alone, &CancelToken::default());
    assert!(matches!(found, Err(Error::Numerical(_))));
}
