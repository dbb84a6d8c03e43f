//! All eigenvalues of a small symmetric matrix, and the eigenvectors of selected ones.
//!
//! `A = Q T Q^T` is reduced once ([`one_stage`](crate::eigen::one_stage)). The eigenvalues of `T` take
//! `O(n^2)` operations ([`root_free_ql`](crate::eigen::root_free_ql)), as do the eigenvectors `Z` of `k` of
//! them ([`twisted`](crate::eigen::twisted)). The eigenvectors of `A` are `Q Z`, in `2 n^2 k` operations. For
//! few eigenvectors this saves most of the cost of a full decomposition. The selection may be made after the
//! eigenvalues are computed.
//!
//! Eigenvectors of close eigenvalues are made orthonormal: `Z L^-T` with `Z^T Z = L L^T`. This mixes vectors
//! by `eps ||T|| / gap`, so that residuals grow by no more than `eps ||T||`. The residuals `T z - l z` are
//! checked at the end.

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, Par};

use crate::Result;
use crate::eigen::one_stage::{Reflections, one_stage_scratch, reduce_in_one_stage};
use crate::eigen::root_free_ql::tridiagonal_eigenvalues;
use crate::eigen::tridiagonal::Tridiagonal;
use crate::eigen::twisted::tridiagonal_eigenvectors;
use crate::exec::cancel::CancelToken;
use crate::exec::memory::{collected, matrix, zero_matrix, zeros};
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::kernels::dense::{cholesky, product};
use crate::kernels::number::padded;

/// Purpose of the memory of this module.
const MEMORY: &str = "selected eigenvectors";

/// Largest inner product of unit vectors that are orthogonalised. Beyond it, eigenvalues are equal up to
/// rounding, and their vectors may coincide.
const MOST_ALIKE: f64 = 0.01;

/// Largest residual `|T z - l z|`, relative to the largest eigenvalue times the root of `n`: six times the
/// largest measured of random matrices of order 16 to 512.
const TOLERANCE: f64 = 16.0 * f64::EPSILON;

/// A symmetric matrix with its eigenvalues, and the reduction from which eigenvectors are computed.
#[derive(Clone, Debug)]
pub(crate) struct SelectedEigen {
    /// All eigenvalues, ascending.
    pub values: Vec<f64>,
    tridiagonal: Tridiagonal,
    reflections: Reflections<f64>,
}

/// Returns the memory for [`SelectedEigen::of`].
pub(crate) fn selected_eigen_scratch(n: usize) -> StackReq {
    one_stage_scratch::<f64>(n)
}

impl SelectedEigen {
    /// Computes the eigenvalues of a positive definite matrix whose largest entry is near 1, with the layout
    /// of [`reduce_in_one_stage`].
    ///
    /// # Errors
    /// The errors of [`tridiagonal_eigenvalues`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn of(a: &mut [f64], n: usize, stack: &mut MemStack) -> Result<Self> {
        let mut reflections = Reflections::new(n)?;
        let tridiagonal = reduce_in_one_stage(a, n, Some(&mut reflections), stack);
        let values = tridiagonal_eigenvalues(&tridiagonal, &CancelToken::default())?;
        Ok(Self { values, tridiagonal, reflections })
    }

    /// Returns orthonormal eigenvectors `(n, k)` of the eigenvalues with the given indices, or `None` if some
    /// eigenvalues are too close to each other.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn vectors(&self, places: impl Iterator<Item = usize>) -> Result<Option<Mat<f64>>> {
        let values = collected(places.map(|i| self.values[i]), self.values.len(), MEMORY)?;
        let Some(z) = orthonormal(tridiagonal_eigenvectors(&self.tridiagonal, &values)?)? else {
            return Ok(None);
        };
        let largest = self.values.last().copied().unwrap_or(0.0);
        let most = TOLERANCE * largest * (self.values.len() as f64).sqrt();
        let solves = |j: usize| self.residual(values[j], &z, j) <= most;
        (0..values.len()).all(solves).then(|| self.reflected(&z)).transpose()
    }

    /// Returns `Q Z`.
    fn reflected(&self, z: &Mat<f64>) -> Result<Mat<f64>> {
        let (n, k) = (z.nrows(), z.ncols());
        let width = padded::<f64>(k);
        let mut rows = zeros(n * width, MEMORY)?;
        for (i, row) in rows.chunks_exact_mut(width.max(1)).enumerate() {
            row.iter_mut().take(k).enumerate().for_each(|(j, x)| *x = z[(i, j)]);
        }
        self.reflections.apply(&mut rows, width);
        matrix(n, k, MEMORY, |i, j| rows[i * width + j])
    }

    /// Returns `|T z - l z|` for column `j` of `Z`.
    fn residual(&self, value: f64, z: &Mat<f64>, j: usize) -> f64 {
        let Tridiagonal { diagonal, off_diagonal } = &self.tridiagonal;
        let row = |i: usize| {
            let above = if i > 0 { off_diagonal[i - 1] * z[(i - 1, j)] } else { 0.0 };
            let below = off_diagonal.get(i).map_or(0.0, |b| b * z[(i + 1, j)]);
            above + (diagonal[i] - value) * z[(i, j)] + below
        };
        (0..diagonal.len()).map(|i| row(i).powi(2)).sum::<f64>().sqrt()
    }
}

/// Returns `Z L^-T`, or `None` unless inner products are small.
fn orthonormal(z: Mat<f64>) -> Result<Option<Mat<f64>>> {
    let mut gram = product(z.transpose(), z.as_ref())?;
    let k = gram.nrows();
    let alike = |i: usize, j: usize| (gram[(i, j)] - f64::from(u8::from(i == j))).abs();
    let most = (0..k).flat_map(|j| (j..k).map(move |i| (i, j))).map(|(i, j)| alike(i, j)).fold(0.0, f64::max);
    if most <= 4.0 * f64::EPSILON {
        return Ok(Some(z));
    }
    if most > MOST_ALIKE || !cholesky(gram.as_mut())? {
        return Ok(None);
    }
    prepare_products([k; 3], Strategy::Alone)?;
    let mut inverse = zero_matrix(k, k, MEMORY)?;
    invert_lower_triangular(inverse.as_mut(), gram.as_ref(), Par::Seq);
    product(z.as_ref(), inverse.transpose()).map(Some)
}

#[cfg(test)]
mod tests {
    use faer::dyn_stack::MemBuffer;

    use super::*;

    /// Returns a matrix with 4 on the diagonal and decaying entries within `width` of it.
    fn banded(n: usize, width: usize) -> Mat<f64> {
        Mat::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => 4.0,
            d if d <= width => -1.0 / d as f64,
            _ => 0.0,
        })
    }

    fn eigen(a: &Mat<f64>) -> SelectedEigen {
        let (n, stride) = (a.nrows(), padded::<f64>(a.nrows()));
        let mut rows = vec![0.0; stride * stride];
        (0..n).flat_map(|i| (0..n).map(move |j| (i, j))).for_each(|(i, j)| rows[i * stride + j] = a[(i, j)]);
        let mut memory = MemBuffer::new(selected_eigen_scratch(n));
        SelectedEigen::of(&mut rows, n, MemStack::new(&mut memory)).unwrap()
    }

    fn assert_vectors(a: &Mat<f64>, places: &[usize]) {
        let n = a.nrows();
        let found = eigen(a);
        let dense = nalgebra::DMatrix::from_fn(n, n, |i, j| a[(i, j)]);
        let mut expected: Vec<f64> = dense.symmetric_eigenvalues().iter().copied().collect();
        expected.sort_by(f64::total_cmp);
        let norm = expected.iter().fold(0.0f64, |norm, x| norm.max(x.abs()));
        let tolerance = 1e-14 * n as f64 * norm;
        assert!(found.values.iter().zip(&expected).all(|(x, y)| (x - y).abs() <= tolerance));
        let vectors = found.vectors(places.iter().copied()).unwrap().unwrap();
        let scaled = Mat::from_fn(n, places.len(), |i, j| vectors[(i, j)] * found.values[places[j]]);
        assert!((a * &vectors - scaled).norm_max() <= tolerance);
        let identity = Mat::<f64>::identity(places.len(), places.len());
        assert!((vectors.transpose() * &vectors - identity).norm_max() <= 1e-14 * n as f64);
    }

    #[test]
    fn some_and_all_vectors_are_accurate() {
        for n in [1, 2, 3, 17, 64, 128] {
            for width in [1, 3] {
                let a = banded(n, width);
                assert_vectors(&a, &[n - 1]);
                assert_vectors(&a, &(0..n).step_by(3).collect::<Vec<_>>());
                assert_vectors(&a, &(0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn graded_matrices() {
        // Small eigenvalues are close to each other relative to the largest.
        let n = 40;
        let grade = |i: usize| 10f64.powf(-6.0 * i as f64 / n as f64);
        let a = banded(n, 2);
        let graded = Mat::from_fn(n, n, |i, j| {
            (a[(i, j)] + if i == j { 3.0 } else { 0.0 }) * grade(i).sqrt() * grade(j).sqrt()
        });
        assert_vectors(&graded, &(0..n).collect::<Vec<_>>());
        assert_vectors(&graded, &[0, 1, 2]);
    }

    #[test]
    fn dense_matrices_of_moderate_condition() {
        let noise = |i: usize| ((i * 7919 + i * i * 31) % 1013) as f64 / 1013.0 - 0.5;
        for n in [16, 64, 200] {
            let raw = Mat::from_fn(n, n, |i, j| noise(i * n + j));
            let q = crate::svd::dense_svd(raw.as_ref()).unwrap().u;
            for spread in [0.5, 5.9] {
                let value = |j: usize| 10f64.powf(-spread * j as f64 / n as f64);
                let a = Mat::from_fn(n, n, |i, j| q[(i, j)] * value(j)) * q.transpose();
                assert_vectors(&a, &(0..n).collect::<Vec<_>>());
                assert_vectors(&a, &(n - n / 4..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn equal_eigenvalues_are_rejected() {
        let found = eigen(&Mat::identity(5, 5));
        assert!(found.vectors([0, 1].into_iter()).unwrap().is_none());
        assert_eq!(found.vectors(std::iter::empty()).unwrap().unwrap().ncols(), 0);
    }
}
