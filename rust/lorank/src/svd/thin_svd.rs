//! The result of a thin singular value decomposition.

use faer::Mat;

/// A thin singular value decomposition `A = U diag(s) V^T`.
#[derive(Clone, Debug)]
pub struct ThinSvd {
    /// `(m, k)`, orthonormal columns.
    pub u: Mat<f64>,
    /// The `k = min(m, n)` singular values, descending.
    pub singular_values: Vec<f64>,
    /// `(n, k)`, orthonormal columns.
    pub v: Mat<f64>,
}
