//! From stacked factors to balanced columns: the small matrices that they are multiplied with.
//!
//! For `X_B = F_B Q_B^T` and `X_A = F_A Q_A^T` ([`triangular`](crate::low_rank::cholesky_qr)), `X_B^T = B` and `X_A = A`, an
//! update is `B W A = Q_B C Q_A^T` with the core `C = F_B^T W F_A = U S V^T` ([`core_svd`](crate::low_rank::core_svd)). The
//! columns of a kept value with the vector `v` are
//!
//! ```text
//! Q_B C v = B (W F_A v)        Q_A v = A^T (F_A^-T v)
//! ```
//!
//! so that `F_A` is all that has to be kept beside what `v` is found from.

use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, Par};

use crate::eigen::selected::SelectedEigen;
use crate::kernels::dense::{product, scale_rows};
use crate::low_rank::cholesky_qr::{Precision, Triangular};
use crate::low_rank::core_svd::Vectors;

/// What becomes the balanced columns of an update by products with its stacked factors, `(K, length)`.
#[derive(Clone, Debug)]
pub(crate) struct Basis {
    columns: Columns,
    /// In which arithmetic products with the factors of `B` and of `A` are formed.
    pub precisions: [Precision; 2],
}

#[derive(Clone, Debug)]
enum Columns {
    /// Those of all values, `(K, K)`: of `Q_B U S`, and of `Q_A V`.
    Found { b: Mat<f64>, a: Mat<f64> },
    /// The way to those of some, and the lower triangle of `F_A`, column by column.
    Sought { eigen: Box<SelectedEigen>, factor: Box<[f64]> },
}

impl Basis {
    /// Of what both sides of an update are, and the vectors of the core that they make.
    pub(crate) fn new(b: &Triangular, a: &Triangular, vectors: Vectors) -> Self {
        let columns = match vectors {
            Vectors::Found { left, right } => {
                let [b, a] = [(b, left), (a, right)].map(|(side, mut vectors)| {
                    solve_upper_triangular_in_place(side.factor.transpose(), vectors.as_mut(), Par::Seq);
                    vectors
                });
                Columns::Found { b, a }
            }
            Vectors::Sought(eigen) => {
                let columns = a.factor.col_iter().enumerate();
                Columns::Sought {
                    eigen,
                    factor: columns.flat_map(|(j, x)| x.iter().skip(j).copied()).collect(),
                }
            }
        };
        Self { columns, precisions: [b.precision, a.precision] }
    }

    /// The matrices `(K, k)` whose products with the factors are `Q_B U S` and `Q_A V`, of the values at these places;
    /// `weights` are those of the rows of `B`'s. `None` if vectors are not right, which what is asked of a core before
    /// they are left for later should rule out.
    pub(crate) fn columns(&self, places: &[usize], weights: &[f64]) -> Option<[Mat<f64>; 2]> {
        match &self.columns {
            Columns::Found { b, a } => {
                Some([b, a].map(|x| Mat::from_fn(x.nrows(), places.len(), |i, j| x[(i, places[j])])))
            }
            Columns::Sought { eigen, factor } => {
                // Eigenvalues ascend.
                let last = eigen.values.len() - 1;
                let mut right = eigen.vectors(places.iter().map(|i| last - i))?;
                let factor = unpacked(factor, eigen.values.len());
                let mut left = product(factor.as_ref(), right.as_ref());
                scale_rows(&mut left, weights);
                solve_upper_triangular_in_place(factor.transpose(), right.as_mut(), Par::Seq);
                Some([left, right])
            }
        }
    }
}

/// The lower triangular matrix of order `n` whose columns, from the diagonal on, lie one after the other.
fn unpacked(mut columns: &[f64], n: usize) -> Mat<f64> {
    let mut matrix = Mat::zeros(n, n);
    for (j, column) in matrix.col_iter_mut().enumerate() {
        let (own, others) = columns.split_at(n - j);
        column.iter_mut().skip(j).zip(own).for_each(|(to, from)| *to = *from);
        columns = others;
    }
    matrix
}
