//! Singular value decompositions in float64: values only, or thin.
//!
//! Matrices are scaled by a power of two so that their largest entry is near 1. Otherwise the absolute
//! thresholds of faer's divide and conquer would deflate tiny matrices to zero. If its iteration does not
//! converge, one-sided Jacobi ([`jacobi`]) is used.

mod jacobi;
pub mod qr;
mod thin_svd;

use faer::diag::DiagMut;
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, MatMut, MatRef, Par, Spec};

use crate::exec::memory::{copied, identity, matrix, resize, zero_matrix, zeros};
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::exec::scratch::Scratch;
use crate::kernels::dense::product;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::matrix::MatrixView;
use crate::svd::jacobi::jacobi_svd;
use crate::svd::qr::thin_qr;
use crate::{Error, Result};

pub use thin_svd::ThinSvd;

/// Purpose of the memory of this module.
const MEMORY: &str = "a singular value decomposition";

/// Computes the singular values of a matrix, descending. The matrix is not squared: small singular values
/// have the absolute error `eps * s_1`, where square roots of eigenvalues of `W^T W` have the error
/// `sqrt(eps) * s_1`.
///
/// # Errors
/// [`Error::Numerical`] for NaN, infinite, and extremely large or small entries; [`Error::OutOfMemory`].
///
/// # Examples
/// ```
/// use lorank::{matrix::MatrixView, svd::singular_values};
///
/// let view = MatrixView::from_f64(&[3.0, 0.0, 4.0, 5.0], 2, 2).unwrap();
/// let s = singular_values(&view).unwrap();
/// assert!((s[0] - 45f64.sqrt()).abs() < 1e-14);
/// assert!((s[1] - 5f64.sqrt()).abs() < 1e-14);
/// ```
pub fn singular_values(view: &MatrixView<'_>) -> Result<Vec<f64>> {
    let Some((matrix, unit)) = scaled(view)? else {
        return zeros(view.rows().min(view.cols()), MEMORY);
    };
    let mut values = match faer_svd(matrix.as_ref(), None, None, &mut Scratch::default())? {
        Some(values) => values,
        None => fallback(&matrix)?.singular_values,
    };
    for s in &mut values {
        *s *= unit;
    }
    Ok(values)
}

/// Computes the thin SVD of a matrix on the calling thread.
///
/// # Errors
/// [`Error::Numerical`] for NaN, infinite, and extremely large or small entries; [`Error::OutOfMemory`].
///
/// # Examples
/// ```
/// use lorank::{matrix::MatrixView, svd::thin_svd};
///
/// let view = MatrixView::from_f64(&[0.0, 2.0, 0.0, 0.0, 0.0, 1.0], 2, 3).unwrap();
/// let svd = thin_svd(&view).unwrap();
/// assert_eq!((svd.u.nrows(), svd.v.nrows()), (2, 3));
/// assert!((svd.singular_values[0] - 2.0).abs() < 1e-14);
/// ```
pub fn thin_svd(view: &MatrixView<'_>) -> Result<ThinSvd> {
    match scaled(view)? {
        Some((matrix, unit)) => decomposed(&matrix, unit),
        None => zero_svd(view.rows(), view.cols()),
    }
}

/// Computes the thin SVD of a float64 matrix.
///
/// # Errors
/// The errors of [`thin_svd`].
pub(crate) fn dense_svd(matrix: MatRef<'_, f64>) -> Result<ThinSvd> {
    if !matrix.is_all_finite() {
        return Err(Error::Numerical("holds NaN or infinite values".into()));
    }
    let largest = matrix.norm_max();
    if largest == 0.0 {
        return zero_svd(matrix.nrows(), matrix.ncols());
    }
    let exponent = binary_exponent(largest)?;
    let scale = power_of_two(-exponent);
    let scaled = self::matrix(matrix.nrows(), matrix.ncols(), MEMORY, |i, j| matrix[(i, j)] * scale)?;
    decomposed(&scaled, power_of_two(exponent))
}

/// Reusable memory for thin decompositions.
#[derive(Default)]
pub(crate) struct SvdSpace {
    u: Vec<f64>,
    v: Vec<f64>,
    scratch: Scratch,
}

impl SvdSpace {
    /// Computes the singular values, descending, and the singular vectors `(m, k)` and `(n, k)` of a finite
    /// matrix whose largest entry is near 1. The vectors are stored in this memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::NoConvergence`].
    pub(crate) fn decompose(
        &mut self,
        matrix: MatRef<'_, f64>,
    ) -> Result<(Vec<f64>, MatRef<'_, f64>, MatRef<'_, f64>)> {
        let (m, n) = (matrix.nrows(), matrix.ncols());
        let k = m.min(n);
        resize(&mut self.u, m * k, MEMORY)?;
        resize(&mut self.v, n * k, MEMORY)?;
        let u = MatMut::from_column_major_slice_mut(&mut self.u, m, k);
        let v = MatMut::from_column_major_slice_mut(&mut self.v, n, k);
        let converged = faer_svd(matrix, Some(u), Some(v), &mut self.scratch)?;
        let values = if let Some(values) = converged {
            values
        } else {
            let found = fallback(&copied(matrix, MEMORY)?)?;
            MatMut::from_column_major_slice_mut(&mut self.u, m, k).copy_from(&found.u);
            MatMut::from_column_major_slice_mut(&mut self.v, n, k).copy_from(&found.v);
            found.singular_values
        };
        let vectors = |x, rows| MatRef::from_column_major_slice(x, rows, k);
        Ok((values, vectors(&self.u, m), vectors(&self.v, n)))
    }
}

fn zero_svd(m: usize, n: usize) -> Result<ThinSvd> {
    let k = m.min(n);
    let singular_values = zeros(k, MEMORY)?;
    Ok(ThinSvd { u: identity(m, k, MEMORY)?, singular_values, v: identity(n, k, MEMORY)? })
}

/// Computes the thin SVD of `unit` times a matrix.
fn decomposed(matrix: &Mat<f64>, unit: f64) -> Result<ThinSvd> {
    let (m, n) = (matrix.nrows(), matrix.ncols());
    let k = m.min(n);
    let (mut u, mut v) = (zero_matrix(m, k, MEMORY)?, zero_matrix(n, k, MEMORY)?);
    let vectors = (Some(u.as_mut()), Some(v.as_mut()));
    let mut decomposition = match faer_svd(matrix.as_ref(), vectors.0, vectors.1, &mut Scratch::default())? {
        Some(singular_values) => ThinSvd { u, singular_values, v },
        None => fallback(matrix)?,
    };
    for s in &mut decomposition.singular_values {
        *s *= unit;
    }
    Ok(decomposition)
}

/// Returns the matrix in float64 divided by a power of two, and that power, or `None` for a zero matrix.
fn scaled(view: &MatrixView<'_>) -> Result<Option<(Mat<f64>, f64)>> {
    let largest = view.max_abs()?;
    if largest == 0.0 {
        return Ok(None);
    }
    let exponent = binary_exponent(largest)?;
    let mut matrix = zero_matrix(view.rows(), view.cols(), MEMORY)?;
    view.upcast(0..view.rows(), 0..view.cols(), power_of_two(-exponent), matrix.as_mut());
    Ok(Some((matrix, power_of_two(exponent))))
}

/// Decomposes by faer. Returns `None` if the iteration does not converge.
fn faer_svd(
    a: MatRef<'_, f64>,
    u: Option<MatMut<'_, f64>>,
    v: Option<MatMut<'_, f64>>,
    scratch: &mut Scratch,
) -> Result<Option<Vec<f64>>> {
    let (m, n) = (a.nrows(), a.ncols());
    let vectors = if u.is_some() { ComputeSvdVectors::Thin } else { ComputeSvdVectors::No };
    prepare_products([m, n, m.min(n)], Strategy::Alone)?;
    let par = Par::Seq;
    let stack = scratch.stack(svd_scratch::<f64>(m, n, vectors, vectors, par, Spec::default()))?;
    let mut values = zeros(m.min(n), MEMORY)?;
    let diagonal = DiagMut::from_slice_mut(&mut values);
    let converged = svd(a, diagonal, u, v, par, stack, Spec::default()).is_ok();
    Ok(converged.then_some(values))
}

/// Decomposes the triangular factor of the tall orientation by Jacobi iteration.
fn fallback(a: &Mat<f64>) -> Result<ThinSvd> {
    if a.nrows() < a.ncols() {
        let ThinSvd { u, singular_values, v } = fallback(&copied(a.transpose(), MEMORY)?)?;
        return Ok(ThinSvd { u: v, singular_values, v: u });
    }
    let qr = thin_qr(a.as_ref())?;
    let core = jacobi_svd(&qr.r)?;
    Ok(ThinSvd { u: product(qr.q.as_ref(), core.u.as_ref())?, ..core })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy as _, *};

    fn view(values: &[f64], m: usize, n: usize) -> MatrixView<'_> {
        MatrixView::from_f64(values, m, n).unwrap()
    }

    fn oracle(values: &[f64], m: usize, n: usize) -> Vec<f64> {
        let dense = nalgebra::DMatrix::from_row_slice(m, n, values);
        let mut s: Vec<f64> = dense.singular_values().iter().copied().collect();
        s.sort_by(|a, b| b.total_cmp(a));
        s
    }

    fn assert_decomposes(d: &ThinSvd, values: &[f64], m: usize, n: usize) {
        let k = m.min(n);
        let s = &d.singular_values;
        let tolerance = 1e-14 * (m + n) as f64;
        for (mine, theirs) in s.iter().zip(oracle(values, m, n)) {
            assert!((mine - theirs).abs() <= tolerance * s[0], "{mine} {theirs}");
        }
        let identity = Mat::<f64>::identity(k, k);
        assert!((d.u.transpose() * &d.u - &identity).norm_max() < tolerance);
        assert!((d.v.transpose() * &d.v - &identity).norm_max() < tolerance);
        let product = Mat::from_fn(m, k, |i, j| d.u[(i, j)] * s[j]) * d.v.transpose();
        let dense = Mat::from_fn(m, n, |i, j| values[i * n + j]);
        assert!((product - dense).norm_max() <= tolerance * s[0].max(f64::MIN_POSITIVE));
    }

    fn check(values: &[f64], m: usize, n: usize) {
        let a = view(values, m, n);
        assert_decomposes(&thin_svd(&a).unwrap(), values, m, n);
        let fast: Vec<f64> = singular_values(&a).unwrap();
        for (mine, theirs) in fast.iter().zip(oracle(values, m, n)) {
            assert!((mine - theirs).abs() <= 1e-13 * fast[0]);
        }
        // The fallback is tested for every matrix.
        if let Some((matrix, unit)) = scaled(&a).unwrap() {
            let mut jacobi = fallback(&matrix).unwrap();
            jacobi.singular_values.iter_mut().for_each(|s| *s *= unit);
            assert_decomposes(&jacobi, values, m, n);
        }
    }

    #[test]
    fn memory_is_reused_for_other_shapes() {
        let mut space = SvdSpace::default();
        for (m, n) in [(9, 4), (4, 9), (2, 2), (1, 12), (12, 1), (9, 4)] {
            for zero in [false, true] {
                let of = |i: usize| if zero { 0.0 } else { (i * 37 % 11) as f64 / 8.0 - 0.5 };
                let values: Vec<f64> = (0..m * n).map(of).collect();
                let (s, u, v) = space.decompose(MatRef::from_row_major_slice(&values, m, n)).unwrap();
                let found = ThinSvd { u: u.to_owned(), singular_values: s, v: v.to_owned() };
                assert_decomposes(&found, &values, m, n);
            }
        }
    }

    #[test]
    fn extreme_shapes_and_norms() {
        for (m, n) in [(1, 1), (1, 9), (9, 1), (6, 6), (40, 7), (7, 40)] {
            check(&vec![0.0; m * n], m, n);
            check(&vec![-3.0; m * n], m, n);
            for norm in [1e-30, 1e30] {
                let values: Vec<f64> = (0..m * n).map(|i| norm * ((i * 37 % 11) as f64 - 5.0)).collect();
                check(&values, m, n);
            }
        }
    }

    proptest! {
        #[test]
        fn any_matrix((m, n, values) in (1usize..16, 1usize..16).prop_flat_map(|(m, n)| {
            (Just(m), Just(n), prop::collection::vec(prop_oneof![Just(0.0), -1.0f64..1.0], m * n))
        })) {
            check(&values, m, n);
        }
    }
}
