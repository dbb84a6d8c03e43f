//! Symmetric tridiagonal matrices.

/// A symmetric tridiagonal matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Tridiagonal {
    /// The `n` diagonal entries.
    pub diagonal: Vec<f64>,
    /// The `n - 1` off-diagonal entries.
    pub off_diagonal: Vec<f64>,
}
