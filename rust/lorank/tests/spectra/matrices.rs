//! Seeded matrices with known properties, and checks of their spectra.

use lorank::cancel::CancelToken;
use lorank::eigen::{self, Accuracy};
use lorank::matrix::MatrixView;
use lorank::spectrum::Spectrum;
use nalgebra::DMatrix;

/// A generator of standard normal numbers: Box-Muller over splitmix64.
pub struct Gaussian(u64);

impl Gaussian {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns a uniform number in (0, 1].
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    pub fn number(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub fn numbers(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.number()).collect()
    }

    pub fn matrix(&mut self, rows: usize, cols: usize) -> DMatrix<f64> {
        DMatrix::from_fn(rows, cols, |_, _| self.number())
    }

    /// Returns a matrix `(rows, cols)` with orthonormal columns.
    pub fn orthonormal(&mut self, rows: usize, cols: usize) -> DMatrix<f64> {
        self.matrix(rows, cols).qr().q()
    }

    /// Returns `U diag(s) V^T` with random bases.
    pub fn with_singular_values(&mut self, rows: usize, cols: usize, s: &[f64]) -> DMatrix<f64> {
        let scaled = self.orthonormal(rows, s.len()) * DMatrix::from_diagonal(&s.to_vec().into());
        scaled * self.orthonormal(cols, s.len()).transpose()
    }
}

/// Returns float8 codes of magnitude below 2 (in either format), from a few low bits of each number.
pub fn codes(numbers: &[f64]) -> Vec<u8> {
    numbers.iter().map(|x| x.to_le_bytes()[2] & 0xbf).collect()
}

/// Returns the values in row-major order, for [`MatrixView`].
pub fn row_major(matrix: &DMatrix<f64>) -> Vec<f64> {
    matrix.transpose().as_slice().to_vec()
}

pub fn spectrum_of(matrix: &DMatrix<f64>) -> Spectrum {
    let values = row_major(matrix);
    let view = MatrixView::from_f64(&values, matrix.nrows(), matrix.ncols()).unwrap();
    eigen::spectrum(&view, Accuracy::Exact, 1, &CancelToken::default()).unwrap()
}

pub fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Checks every eigenvalue to within `8 p eps lambda_max`. The expected values may be in any order.
pub fn assert_eigenvalues(found: &Spectrum, expected: &[f64], label: &str) {
    assert_within(found, expected, 8.0 * expected.len() as f64, label);
}

/// Checks every eigenvalue against singular values of nalgebra. The error of the oracle grows with the longer
/// side, too.
pub fn assert_matches_nalgebra(found: &Spectrum, matrix: &DMatrix<f64>, label: &str) {
    let singular_values = matrix.clone().singular_values();
    let expected: Vec<f64> = singular_values.iter().map(|s| s * s).collect();
    let (p, q) = (matrix.nrows().min(matrix.ncols()), matrix.nrows().max(matrix.ncols()));
    assert_within(found, &expected, 8.0 * (p as f64).max((q as f64).sqrt()), label);
}

/// Checks every eigenvalue to within a multiple of `eps lambda_max`.
pub fn assert_within(found: &Spectrum, expected: &[f64], multiple_of_eps: f64, label: &str) {
    let mut expected = expected.to_vec();
    expected.sort_by(f64::total_cmp);
    let largest = expected.last().copied().unwrap_or(0.0);
    let bound = multiple_of_eps * f64::EPSILON * largest;
    assert_eq!(found.eigenvalues().len(), expected.len(), "{label}");
    for (i, (x, y)) in found.eigenvalues().iter().zip(&expected).enumerate() {
        assert!((x - y).abs() <= bound, "{label}: eigenvalue {i} is {x:e}, not {y:e}; bound {bound:e}");
    }
}
