//! The small matrices that turn stacked factors into balanced columns.
//!
//! Let `X_B = F_B Q_B^T` and `X_A = F_A Q_A^T` ([`cholesky_qr`](crate::low_rank::cholesky_qr)), with
//! `X_B^T = B` and `X_A = A`. The update is `B W A = Q_B C Q_A^T` with the core `C = F_B^T W F_A = U S V^T`
//! ([`core_svd`](crate::low_rank::core_svd)). The columns of a kept value with right singular vector `v` are
//!
//! ```text
//! Q_B C v = B (W F_A v)        Q_A v = A^T (F_A^-T v)
//! ```
//!
//! Therefore only `F_A`, and the data from which `v` is computed, must be stored.

use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, Par};

use crate::Result;
use crate::eigen::selected::SelectedEigen;
use crate::exec::memory::{collected, matrix, zero_matrix};
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::kernels::dense::{product, scale_rows};
use crate::low_rank::cholesky_qr::{Precision, Triangular};
use crate::low_rank::core_svd::Vectors;

/// Purpose of the memory of this module.
const MEMORY: &str = "the columns of a truncated update";

/// Matrices whose products with the stacked factors `(K, length)` are the balanced columns of an update.
#[derive(Clone, Debug)]
pub(crate) struct Basis {
    columns: Columns,
    /// Arithmetic of the products with the factors of `B` and of `A`.
    pub precisions: [Precision; 2],
}

#[derive(Clone, Debug)]
enum Columns {
    /// The matrices of all values, `(K, K)`, for `Q_B U S` and `Q_A V`.
    All { b: Mat<f64>, a: Mat<f64> },
    /// The data from which vectors are computed on demand, and the lower triangle of `F_A`, column by column.
    OnDemand { eigen: Box<SelectedEigen>, factor: Box<[f64]> },
}

impl Basis {
    /// Creates the basis from the triangular factors of both sides and the vectors of the core.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn new(b: &Triangular, a: &Triangular, vectors: Vectors) -> Result<Self> {
        let rank = a.factor.nrows();
        prepare_products([rank; 3], Strategy::Alone)?;
        let columns = match vectors {
            Vectors::All { left, right } => {
                let [b, a] = [(b, left), (a, right)].map(|(side, mut vectors)| {
                    solve_upper_triangular_in_place(side.factor.transpose(), vectors.as_mut(), Par::Seq);
                    vectors
                });
                Columns::All { b, a }
            }
            Vectors::OnDemand(eigen) => {
                let columns = a.factor.col_iter().enumerate();
                let entries = columns.flat_map(|(j, x)| x.iter().skip(j).copied());
                let factor = collected(entries, rank * (rank + 1) / 2, MEMORY)?.into_boxed_slice();
                Columns::OnDemand { eigen, factor }
            }
        };
        Ok(Self { columns, precisions: [b.precision, a.precision] })
    }

    /// Returns the matrices `(K, k)` whose products with the factors are `Q_B U S` and `Q_A V`, for the
    /// values with the given indices. `weights` contains the weight of every row of `B^T`. Returns `None` if
    /// vectors are inaccurate, which the checks of the core should exclude.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn columns(&self, places: &[usize], weights: &[f64]) -> Result<Option<[Mat<f64>; 2]>> {
        match &self.columns {
            Columns::All { b, a } => {
                let chosen = |x: &Mat<f64>| matrix(x.nrows(), places.len(), MEMORY, |i, j| x[(i, places[j])]);
                Ok(Some([chosen(b)?, chosen(a)?]))
            }
            Columns::OnDemand { eigen, factor } => {
                // Eigenvalues ascend.
                let last = eigen.values.len() - 1;
                let Some(mut right) = eigen.vectors(places.iter().map(|i| last - i))? else {
                    return Ok(None);
                };
                let factor = unpacked(factor, eigen.values.len())?;
                let mut left = product(factor.as_ref(), right.as_ref())?;
                scale_rows(&mut left, weights);
                solve_upper_triangular_in_place(factor.transpose(), right.as_mut(), Par::Seq);
                Ok(Some([left, right]))
            }
        }
    }
}

/// Returns the lower triangular matrix of order `n` from its columns, each from the diagonal on.
fn unpacked(mut columns: &[f64], n: usize) -> Result<Mat<f64>> {
    let mut matrix = zero_matrix(n, n, MEMORY)?;
    for (j, column) in matrix.col_iter_mut().enumerate() {
        let (own, others) = columns.split_at(n - j);
        column.iter_mut().skip(j).zip(own).for_each(|(to, from)| *to = *from);
        columns = others;
    }
    Ok(matrix)
}
