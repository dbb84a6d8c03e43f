//! Products and factorizations of small matrices, on the calling thread.
//!
//! faer's operators and solvers use all threads of the pool. For matrices of a few dozen rows, waking the
//! threads takes longer than the work, and they are busy with other matrices.

use faer::diag::DiagMut;
use faer::dyn_stack::MemStack;
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::prelude::ReborrowMut;
use faer::{Accum, Mat, MatMut, MatRef, Par, Spec};

use crate::exec::memory::{buffer, zero_matrix, zeros};
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "products of small matrices";

/// Returns `A B`.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Result<Mat<f64>> {
    prepare_products([a.nrows(), a.ncols(), b.ncols()], Strategy::Alone)?;
    let mut out = zero_matrix(a.nrows(), b.ncols(), MEMORY)?;
    matmul(out.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    Ok(out)
}

/// Replaces `A` by `A diag(factors)`.
pub(crate) fn scale_columns(matrix: &mut Mat<f64>, factors: &[f64]) {
    for (column, factor) in matrix.col_iter_mut().zip(factors) {
        column.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Replaces `A` by `diag(factors) A`.
pub(crate) fn scale_rows(matrix: &mut Mat<f64>, factors: &[f64]) {
    for column in matrix.col_iter_mut() {
        column.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
    }
}

/// Replaces `A` by the lower triangular `L` with `A = L L^T`. Reads the lower triangle only. Returns false if
/// `A` is not positive definite.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn cholesky(mut a: MatMut<'_, f64>) -> Result<bool> {
    let n = a.nrows();
    prepare_products([n; 3], Strategy::Alone)?;
    let mut memory = buffer(cholesky_in_place_scratch::<f64>(n, Par::Seq, Spec::default()), MEMORY)?;
    let stack = MemStack::new(&mut memory);
    let (par, spec) = (Par::Seq, Spec::default());
    if cholesky_in_place(a.rb_mut(), LltRegularization::default(), par, stack, spec).is_err() {
        return Ok(false);
    }
    for (j, column) in a.col_iter_mut().enumerate() {
        column.iter_mut().take(j).for_each(|x| *x = 0.0); // faer leaves intermediate results there.
    }
    Ok(true)
}

/// Returns the eigenvalues and eigenvectors of the symmetric matrix whose lower triangle is that of `A`. The
/// eigenvalues ascend, up to the rounding of equal ones.
///
/// # Errors
/// [`Error::NoConvergence`], [`Error::OutOfMemory`].
pub(crate) fn symmetric_eigen(a: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let n = a.nrows();
    let (par, vectors) = (Par::Seq, ComputeEigenvectors::Yes);
    prepare_products([n; 3], Strategy::Alone)?;
    let mut memory = buffer(self_adjoint_evd_scratch::<f64>(n, vectors, par, Spec::default()), MEMORY)?;
    let stack = MemStack::new(&mut memory);
    let (mut values, mut u) = (zeros(n, MEMORY)?, zero_matrix(n, n, MEMORY)?);
    let diagonal = DiagMut::from_slice_mut(&mut values);
    self_adjoint_evd(a, diagonal, Some(u.as_mut()), par, stack, Spec::default())
        .map_err(|_| Error::NoConvergence("the eigenvalues of a small tridiagonal matrix"))?;
    Ok((values, u))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symmetric(n: usize) -> Mat<f64> {
        let x = Mat::from_fn(n, n + 2, |i, j| ((i * 131 + j * 37 + i * j * 7) % 101) as f64 / 101.0 - 0.5);
        product(x.as_ref(), x.transpose()).unwrap()
    }

    #[test]
    fn product_equals_its_definition() {
        for (m, k, n) in [(1, 1, 1), (3, 7, 2), (70, 33, 65), (0, 3, 2), (2, 0, 3)] {
            let a = Mat::from_fn(m, k, |i, j| (i * 3 + j) as f64);
            let b = Mat::from_fn(k, n, |i, j| (i + 5 * j) as f64);
            let expected = Mat::from_fn(m, n, |i, j| (0..k).map(|l| a[(i, l)] * b[(l, j)]).sum::<f64>());
            assert_eq!(product(a.as_ref(), b.as_ref()).unwrap(), expected);
        }
    }

    #[test]
    fn cholesky_factors_only_positive_definite_matrices() {
        for n in [1, 2, 17, 64, 130] {
            let a = symmetric(n) + Mat::<f64>::identity(n, n);
            let mut l = Mat::from_fn(n, n, |i, j| if i >= j { a[(i, j)] } else { f64::NAN });
            assert!(cholesky(l.as_mut()).unwrap());
            let error = (product(l.as_ref(), l.transpose()).unwrap() - &a).norm_max();
            assert!(error <= 1e-14 * n as f64 * a.norm_max(), "{n}: {error:e}");
            assert!(!cholesky((&a * faer::Scale(-1.0)).as_mut()).unwrap());
        }
        assert!(!cholesky(Mat::zeros(3, 3).as_mut()).unwrap());
        assert!(!cholesky(Mat::from_fn(3, 3, |_, _| f64::NAN).as_mut()).unwrap());
    }

    #[test]
    fn eigenvectors_of_the_lower_triangle() {
        for n in [1, 2, 17, 64, 130] {
            let a = symmetric(n);
            let lower = Mat::from_fn(n, n, |i, j| if i >= j { a[(i, j)] } else { f64::NAN });
            let (values, u) = symmetric_eigen(lower.as_ref()).unwrap();
            let scaled = Mat::from_fn(n, n, |i, j| u[(i, j)] * values[j]);
            let tolerance = 1e-14 * n as f64;
            assert!(
                (product(a.as_ref(), u.as_ref()).unwrap() - scaled).norm_max() <= tolerance * a.norm_max()
            );
            let identity = Mat::<f64>::identity(n, n);
            assert!((product(u.transpose(), u.as_ref()).unwrap() - identity).norm_max() <= tolerance);
        }
    }
}
