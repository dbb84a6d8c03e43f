//! The thin singular value decomposition as a value.

use faer::Mat;

/// `A = U diag(s) V^T`.
#[derive(Clone, Debug)]
pub struct ThinSvd {
    /// `(m, k)`, orthonormal columns.
    pub u: Mat<f64>,
    /// The `k = min(m, n)` singular values, descending.
    pub singular_values: Vec<f64>,
    /// `(n, k)`, orthonormal columns.
    pub v: Mat<f64>,
}
