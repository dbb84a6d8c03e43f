//! One-sided Jacobi SVD (\[HESTENES\]): slow and simple, but it converges where faster iterations do not.
//!
//! Columns of `A (m, n)`, `m >= n`, are rotated in pairs until all are orthogonal. The norms of the columns
//! are then the singular values. A sweep takes `4 m n^2` operations.

use faer::{Mat, MatMut};

use crate::exec::memory::{collected, copied, identity, matrix};
use crate::svd::thin_svd::ThinSvd;
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "a singular value decomposition";

/// Largest number of sweeps. Ten suffice for any finite matrix.
const MAX_SWEEPS: usize = 60;

/// Returns the thin SVD of `a (m, n)`, `m >= n`.
///
/// # Errors
/// [`Error::NoConvergence`] after [`MAX_SWEEPS`], which no finite matrix is known to need.
pub(crate) fn jacobi_svd(a: &Mat<f64>) -> Result<ThinSvd> {
    debug_assert!(a.nrows() >= a.ncols(), "tall or square");
    let n = a.ncols();
    // The directions of columns below rounding error are arbitrary: these columns are skipped, and replaced
    // in `sorted`.
    let negligible = f64::EPSILON * a.norm_l2();
    let mut rotated = copied(a.as_ref(), MEMORY)?;
    let mut v = identity(n, n, MEMORY)?;
    for _ in 0..MAX_SWEEPS {
        let mut orthogonal = true;
        for p in 0..n {
            for q in p + 1..n {
                if let Some(rotation) = orthogonalising_rotation(&rotated, p, q, negligible) {
                    rotate(rotated.as_mut(), p, q, rotation);
                    rotate(v.as_mut(), p, q, rotation);
                    orthogonal = false;
                }
            }
        }
        if orthogonal {
            return sorted(&rotated, &v, negligible);
        }
    }
    Err(Error::NoConvergence("the singular value iteration"))
}

/// Returns the cosine and sine of the rotation that makes columns `p` and `q` orthogonal, or `None` if they
/// are.
fn orthogonalising_rotation(a: &Mat<f64>, p: usize, q: usize, negligible: f64) -> Option<(f64, f64)> {
    let (x, y) = (a.col(p), a.col(q));
    let (xx, yy, xy) = (x.squared_norm_l2(), y.squared_norm_l2(), x.transpose() * y);
    let tolerance = a.nrows() as f64 * f64::EPSILON;
    if xx.min(yy).sqrt() <= negligible || xy.abs() <= tolerance * (xx * yy).sqrt() {
        return None;
    }
    let zeta = (yy - xx) / (2.0 * xy);
    let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
    let cosine = tangent.hypot(1.0).recip();
    Some((cosine, cosine * tangent))
}

fn rotate(mut a: MatMut<'_, f64>, p: usize, q: usize, (cosine, sine): (f64, f64)) {
    for i in 0..a.nrows() {
        let (x, y) = (a[(i, p)], a[(i, q)]);
        a[(i, p)] = cosine * x - sine * y;
        a[(i, q)] = sine * x + cosine * y;
    }
}

/// Sorts columns by descending norm, and completes the directions of zero singular values to a basis.
fn sorted(rotated: &Mat<f64>, v: &Mat<f64>, negligible: f64) -> Result<ThinSvd> {
    let (m, n) = (rotated.nrows(), rotated.ncols());
    let norms = collected((0..n).map(|j| rotated.col(j).norm_l2()), n, MEMORY)?;
    let mut order = collected(0..n, n, MEMORY)?;
    order.sort_by(|&a, &b| norms[b].total_cmp(&norms[a]));
    let directions = matrix(m, n, MEMORY, |i, j| {
        let norm = norms[order[j]];
        if norm > negligible { rotated[(i, order[j])] / norm } else { 0.0 }
    })?;
    // The QR decomposition of orthonormal columns returns them up to sign, and replaces zero columns by a
    // basis.
    let qr = crate::svd::qr::thin_qr(directions.as_ref())?;
    Ok(ThinSvd {
        u: matrix(m, n, MEMORY, |i, j| qr.q[(i, j)] * if qr.r[(j, j)] < 0.0 { -1.0 } else { 1.0 })?,
        singular_values: collected(order.iter().map(|&j| norms[j]), n, MEMORY)?,
        v: matrix(n, n, MEMORY, |i, j| v[(i, order[j])])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that factors are orthonormal, that values descend, and that the product is the matrix. The
    /// tests of `svd/mod.rs` compare with an oracle.
    fn check(a: &Mat<f64>) -> Vec<f64> {
        let (m, n) = (a.nrows(), a.ncols());
        let ThinSvd { u, singular_values: s, v } = jacobi_svd(a).unwrap();
        let tolerance = 1e-14 * (m + n) as f64;
        assert!((u.transpose() * &u - Mat::<f64>::identity(n, n)).norm_max() < tolerance);
        assert!((v.transpose() * &v - Mat::<f64>::identity(n, n)).norm_max() < tolerance);
        assert!(s.is_sorted_by(|a, b| a >= b));
        let product = Mat::from_fn(m, n, |i, j| u[(i, j)] * s[j]) * v.transpose();
        assert!((product - a).norm_max() <= tolerance * s[0].max(f64::MIN_POSITIVE));
        s
    }

    #[test]
    fn values_of_a_diagonal_matrix_are_sorted() {
        let a = Mat::from_fn(5, 3, |i, j| if i == j { [2.0, -7.0, 0.5][i] } else { 0.0 });
        for (x, expected) in check(&a).into_iter().zip([7.0, 2.0, 0.5]) {
            assert!((x - expected).abs() < 1e-15);
        }
    }

    #[test]
    fn two_by_two_by_hand() {
        // A^T A = [[25, 20], [20, 25]]: eigenvalues 45 and 5.
        let s = check(&Mat::from_fn(2, 2, |i, j| [[3.0, 0.0], [4.0, 5.0]][i][j]));
        assert!((s[0] - 45f64.sqrt()).abs() < 1e-14 && (s[1] - 5f64.sqrt()).abs() < 1e-14);
    }

    #[test]
    fn deficient_parallel_and_graded_columns() {
        assert!(check(&Mat::zeros(4, 4)).iter().all(|&s| s == 0.0));
        let equal = check(&Mat::from_fn(30, 8, |_, _| 1.0));
        assert!((equal[0] - 240f64.sqrt()).abs() < 1e-13 && equal[1] < 1e-13);
        check(&Mat::from_fn(20, 6, |i, j| if j < 3 { (i * j) as f64 } else { (i * (j - 3)) as f64 * -2.0 }));
        // One-sided Jacobi preserves the relative accuracy of column-scaled matrices.
        let graded =
            Mat::from_fn(6, 6, |i, j| if i == j { 10f64.powi(-2 * i32::try_from(i).unwrap()) } else { 0.0 });
        for (k, s) in (0..).zip(check(&graded)) {
            assert!((s / 10f64.powi(-2 * k) - 1.0).abs() < 1e-14);
        }
        check(&Mat::from_fn(12, 12, |i, j| 1.0 / (i + j + 1) as f64)); // Hilbert
    }
}
