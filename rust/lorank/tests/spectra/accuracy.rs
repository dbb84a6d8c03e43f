//! Tests of eigenvalues of `W^T W` against singular values of nalgebra and against closed forms.

use std::f64::consts::PI;

use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;

use crate::matrices::{Gaussian, assert_eigenvalues, assert_matches_nalgebra, assert_within, spectrum_of};

fn check(matrix: &DMatrix<f64>, label: &str) {
    assert_matches_nalgebra(&spectrum_of(matrix), matrix, label);
}

#[test]
fn matrices_of_every_shape() {
    let mut gaussian = Gaussian::new(1);
    // Lengths on both sides of the panel size of the Gram matrix (256) and of faer's block sizes.
    for (rows, cols) in [
        (1, 1),
        (1, 900),
        (900, 1),
        (2, 2),
        (2, 700),
        (3, 2),
        (31, 33),
        (64, 64),
        (255, 40),
        (40, 257),
        (513, 100),
        (200, 200),
        (130, 600),
    ] {
        check(&gaussian.matrix(rows, cols), &format!("gaussian {rows}x{cols}"));
        check(&DMatrix::from_element(rows, cols, -0.3), &format!("equal {rows}x{cols}"));
    }
}

#[test]
fn zero_matrices_have_zero_spectra() {
    for (rows, cols) in [(1, 1), (1, 5), (5, 1), (40, 40), (300, 7)] {
        let found = spectrum_of(&DMatrix::zeros(rows, cols));
        assert_eq!(found.eigenvalues().len(), rows.min(cols));
        assert!(found.eigenvalues().iter().all(|x| x.to_bits() == 0));
        assert!(found.nonzero().is_empty());
    }
}

#[test]
fn multiples_of_the_identity() {
    for (order, unit) in [(1, 3.0), (2, 0.1), (50, -7.0), (300, 1e-3)] {
        let label = format!("{unit} I, order {order}");
        let expected = vec![unit * unit; order];
        assert_eigenvalues(
            &spectrum_of(&DMatrix::from_diagonal_element(order, order, unit)),
            &expected,
            &label,
        );
        let padded = DMatrix::from_diagonal_element(order, order + 3, unit);
        assert_eigenvalues(&spectrum_of(&padded), &expected, &label);
    }
}

#[test]
fn orthonormal_columns() {
    let mut gaussian = Gaussian::new(2);
    for (rows, cols) in [(5, 5), (120, 120), (700, 90)] {
        let q = gaussian.orthonormal(rows, cols);
        assert_eigenvalues(&spectrum_of(&q), &vec![1.0; cols], "orthonormal columns");
        assert_eigenvalues(&spectrum_of(&q.transpose()), &vec![1.0; cols], "orthonormal rows");
    }
}

#[test]
fn rank_deficient_matrices_have_exact_zeros() {
    let mut gaussian = Gaussian::new(3);
    for (rows, cols, rank) in [(20, 20, 1), (100, 60, 7), (60, 100, 59), (400, 120, 30)] {
        let product = gaussian.matrix(rows, rank) * gaussian.matrix(rank, cols);
        check(&product, &format!("{rows}x{cols} of rank {rank}"));
        assert_eq!(spectrum_of(&product).nonzero().len(), rank);
    }
    // A zero row and a zero column between others.
    let mut holes = gaussian.matrix(30, 50);
    holes.row_mut(4).fill(0.0);
    holes.column_mut(9).fill(0.0);
    check(&holes, "zero row and column");
    assert_eq!(spectrum_of(&holes).nonzero().len(), 29);
}

#[test]
fn graded_and_clustered_spectra() {
    let mut gaussian = Gaussian::new(4);
    let decades: Vec<f64> = (0..9).map(|k| 10f64.powi(-k)).collect();
    let clustered: Vec<f64> = (0..60)
        .map(|k| if k < 30 { 1.0 + f64::from(k) * 1e-13 } else { 0.5 + f64::from(k) * 1e-10 })
        .collect();
    let one_large: Vec<f64> = (0..40).map(|k| if k == 0 { 1e5 } else { 1.0 + f64::from(k) / 40.0 }).collect();
    for s in [decades, clustered, one_large] {
        let p = s.len();
        let squares: Vec<f64> = s.iter().map(|s| s * s).collect();
        for (rows, cols) in [(p, p), (p + 300, p), (p, 5 * p)] {
            // The bases are orthonormal up to rounding, so that s is exact up to rounding.
            let matrix = gaussian.with_singular_values(rows, cols, &s);
            assert_eigenvalues(&spectrum_of(&matrix), &squares, &format!("{rows}x{cols}, s_1 = {}", s[0]));
        }
    }
}

#[test]
fn small_eigenvalues_keep_nine_digits() {
    // The documented accuracy: nine digits down to 1e-6 lambda_max.
    let s: Vec<f64> = (0..50).map(|k| 10f64.powf(-3.0 * f64::from(k) / 49.0)).collect();
    let found = spectrum_of(&Gaussian::new(5).with_singular_values(200, 50, &s));
    for (x, s) in found.eigenvalues().iter().rev().zip(&s) {
        assert!((x / (s * s) - 1.0).abs() < 1e-9, "{x:e} {:e}", s * s);
    }
}

/// Returns the `(n + 1, n)` difference matrix times a reflection, and the eigenvalues of `W^T W`. The product
/// is dense, and `W^T W` is similar to the second-difference matrix, whose eigenvalues have a closed form.
fn reflected_differences(n: usize, gaussian: &mut Gaussian) -> (DMatrix<f64>, Vec<f64>) {
    let differences = DMatrix::from_fn(n + 1, n, |i, j| match i.wrapping_sub(j) {
        0 => 1.0,
        1 => -1.0,
        _ => 0.0,
    });
    let v = DVector::from_vec(gaussian.numbers(n)).normalize();
    let matrix = &differences - (&differences * &v) * (v.transpose() * 2.0);
    let expected = (1..=n).map(|k| 2.0 - 2.0 * (k as f64 * PI / (n as f64 + 1.0)).cos()).collect();
    (matrix, expected)
}

#[test]
fn closed_form_at_any_order() {
    let mut gaussian = Gaussian::new(6);
    for n in [1, 2, 17, 300, 1100] {
        let (matrix, expected) = reflected_differences(n, &mut gaussian);
        assert_eigenvalues(&spectrum_of(&matrix), &expected, &format!("differences of order {n}"));
    }
}

fn any_matrix() -> impl Strategy<Value = DMatrix<f64>> {
    let entry = prop_oneof![3 => -1.0f64..1.0, 1 => Just(0.0), 1 => (-4i32..4).prop_map(f64::from)];
    (1usize..40, 1usize..40).prop_flat_map(move |(rows, cols)| {
        prop::collection::vec(entry.clone(), rows * cols)
            .prop_map(move |values| DMatrix::from_row_slice(rows, cols, &values))
    })
}

proptest! {
    #[test]
    fn equals_squared_singular_values(matrix in any_matrix()) {
        check(&matrix, "any matrix");
    }

    #[test]
    fn sums_to_the_squared_frobenius_norm(matrix in any_matrix()) {
        let (found, squares) = (spectrum_of(&matrix).sum(), matrix.norm_squared());
        let p = matrix.nrows().min(matrix.ncols()) as f64;
        prop_assert!((found - squares).abs() <= 8.0 * p * f64::EPSILON * squares);
    }

    #[test]
    fn orthogonal_factors_change_nothing(matrix in any_matrix(), seed in any::<u64>()) {
        let mut gaussian = Gaussian::new(seed);
        let (rows, cols) = matrix.shape();
        let rotated = gaussian.orthonormal(rows, rows) * &matrix * gaussian.orthonormal(cols, cols);
        // The factors are orthonormal, and the products exact, up to a multiple of the longer side.
        let tolerance = 8.0 * rows.max(cols) as f64;
        assert_within(&spectrum_of(&rotated), spectrum_of(&matrix).eigenvalues(), tolerance, "rotated");
    }
}
