//! Tests that the bits of a spectrum do not depend on the number of threads.

use lorank::cancel::CancelToken;
use lorank::dtype::DType;
use lorank::eigen::{Accuracy, spectrum, spectrum_in_pool};
use lorank::matrix::MatrixView;
use lorank::parallel::{Strategy, pool};
use lorank::spectrum::Spectrum;
use lorank::workspace::Scratch;
use lorank::{Error, Result};

use crate::matrices::{Gaussian, bits, codes};

fn in_pool(
    view: &MatrixView<'_>,
    accuracy: Accuracy,
    threads: usize,
    strategy: Strategy,
) -> Result<Spectrum> {
    pool(threads).unwrap().install(|| {
        spectrum_in_pool(view, accuracy, strategy, &CancelToken::default(), &mut Scratch::default())
    })
}

fn assert_independent_of_threads(view: &MatrixView<'_>) {
    for accuracy in [Accuracy::Exact, Accuracy::Fast] {
        let alone = in_pool(view, accuracy, 1, Strategy::Alone).unwrap();
        for threads in [1, 2, 3, 5] {
            let found = in_pool(view, accuracy, threads, Strategy::Together).unwrap();
            assert_eq!(bits(found.eigenvalues()), bits(alone.eigenvalues()), "{threads} threads");
        }
    }
}

#[test]
fn bits_of_a_parallel_reduction_are_equal() {
    let numbers = Gaussian::new(1).numbers(1100 * 1100);
    assert_independent_of_threads(&MatrixView::from_f64(&numbers, 1100, 1100).unwrap());
}

#[test]
fn bits_of_tall_and_wide_matrices_are_equal() {
    let numbers = Gaussian::new(2).numbers(3000 * 300);
    let view = MatrixView::from_f64(&numbers, 3000, 300).unwrap();
    assert_independent_of_threads(&view);
    assert_independent_of_threads(&view.transposed());
}

#[test]
fn bits_of_shapes_smaller_than_one_strip_are_equal() {
    let numbers = Gaussian::new(3).numbers(1000);
    for (rows, cols) in [(1, 1), (1, 1000), (1000, 1), (2, 500), (25, 40)] {
        assert_independent_of_threads(&MatrixView::from_f64(&numbers, rows, cols).unwrap());
    }
}

#[test]
fn bits_of_the_public_entry_point_are_equal() {
    for (rows, cols) in [(22_300, 600), (500, 400), (300, 300)] {
        let bytes = codes(&Gaussian::new(4).numbers(rows * cols));
        let view = MatrixView::row_major(&bytes, DType::F8E4M3, rows, cols).unwrap();
        let cancel = CancelToken::default();
        let one = spectrum(&view, Accuracy::Exact, 1, &cancel).unwrap();
        let three = spectrum(&view, Accuracy::Exact, 3, &cancel).unwrap();
        assert_eq!(bits(one.eigenvalues()), bits(three.eigenvalues()));

        cancel.cancel();
        assert!(matches!(spectrum(&view, Accuracy::Exact, 3, &cancel), Err(Error::Cancelled)));
    }
    assert_eq!(Strategy::for_shape(111_200, 600), Strategy::Together);
    assert_eq!(Strategy::for_single(500, 400), Strategy::Together);
    assert_eq!(Strategy::for_shape(500, 400), Strategy::Alone);
    assert_eq!(Strategy::for_single(300, 300), Strategy::Alone);
}
