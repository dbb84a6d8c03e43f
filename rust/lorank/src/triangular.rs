//! `R` of a QR decomposition by the Cholesky factor of the Gram matrix, where that can be trusted.
//!
//! With the rows of `X (K, length)` scaled to length 1 by `D`, `D X X^T D = L L^T` and `Q^T = L^-1 D X`. An
//! error `E` of the Gram matrix leaves `Q^T Q = I - L^-1 E L^-T`. By Ostrowski's theorem every singular value
//! of the update is off by half that share of itself, `||E|| ||L^-1||^2`, at most. Row and column sums of
//! `L^-1`, or those of `L^-T L^-1`, bound the one norm, what rounding makes of sums ([`Precision::error`]) the
//! other.

use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, MatRef, Par};

use crate::Result;
use crate::cancel::CancelToken;
use crate::dense::{cholesky, product};
use crate::low_rank::{Buffers, Side, Term};
use crate::stacked::{Gram, gram_scratch};
use crate::thin::SUMMANDS;

/// The arithmetic of a Gram matrix, and of products with what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precision {
    /// float32, two sums of [`SUMMANDS`] numbers widened to float64 at a time.
    Single,
    /// float64.
    Double,
}

impl Precision {
    /// What `Q^T Q` may differ from the identity by. What is written is float32.
    const fn tolerance(self) -> f64 {
        match self {
            Self::Single => 4e-7,
            Self::Double => 1e-10,
        }
    }

    /// The norm of the error of a Gram matrix of `rank` rows of length 1. Rounding errors of sums add up like
    /// a random walk; of 16 to 128 random rows they measure half as much. Where all terms of a sum are equal,
    /// they do not average out: that adds up to 4e-7.
    fn error(self, rank: usize, length: usize) -> f64 {
        let (rank, length) = (rank as f64, length as f64);
        let sums = |summands: f64| (3.0 + rank.sqrt() / 2.5) * (summands / length).min(1.0).sqrt();
        match self {
            Self::Single => f64::from(f32::EPSILON) * sums(SUMMANDS as f64),
            Self::Double => f64::EPSILON * sums(length),
        }
    }

    /// Mean squares for which neither sums overflow nor products lose digits below the range.
    const fn range(self) -> std::ops::RangeInclusive<f64> {
        match self {
            Self::Single => 1e-28..=1e28,
            // Squares of narrow types cannot leave the range of float64.
            Self::Double => f64::MIN_POSITIVE..=f64::MAX,
        }
    }
}

/// `W X = F Q^T` for stacked factors `X (K, length)` and the terms' weights `W`.
pub(crate) struct Triangular {
    /// `F (K, K)`, lower triangular.
    pub factor: Mat<f64>,
    /// `(K, K)`, lower triangular: `Q^T` is its product with `X`.
    pub inverse: Mat<f64>,
    pub precision: Precision,
}

/// Of one side of an update; `None` if there are more rows than columns, or no bound shows `Q` to be
/// orthonormal.
pub(crate) fn triangular(
    terms: &[Term],
    side: Side,
    buffers: &mut Buffers,
    cancel: &CancelToken,
) -> Result<Option<Triangular>> {
    let Buffers { factors, scratch } = buffers;
    let stacked = side.stacked(terms, factors, cancel)?;
    let (rank, length) = (stacked.rank(), stacked.length());
    if !(1..=length).contains(&rank) {
        return Ok(None);
    }
    let weights = side.weights(terms);
    let gram = stacked.gram::<f32>(scratch.stack(gram_scratch::<f32>(rank))?, cancel)?;
    if let Some(single) = factored(&gram, &weights, length, Precision::Single) {
        return Ok(Some(single));
    }
    let gram = stacked.gram::<f64>(scratch.stack(gram_scratch::<f64>(rank))?, cancel)?;
    Ok(factored(&gram, &weights, length, Precision::Double))
}

fn factored(gram: &Gram, weights: &[f64], length: usize, precision: Precision) -> Option<Triangular> {
    let rank = weights.len();
    let at = |i: usize, j: usize| gram.values[i * gram.order + j];
    let squares: Vec<f64> = (0..rank).map(|i| at(i, i)).collect();
    let range = precision.range();
    if !squares.iter().all(|x| range.contains(&(x / length as f64))) {
        return None;
    }
    let lengths: Vec<f64> = squares.iter().map(|x| x.sqrt()).collect();
    let inverses: Vec<f64> = lengths.iter().map(|x| x.recip()).collect();
    let scaled = |i, j| at(i, j) * inverses[i] * inverses[j];
    let mut factor = Mat::from_fn(rank, rank, |i, j| if i >= j { scaled(i, j) } else { 0.0 });
    cholesky(factor.as_mut())?;
    let mut inverse = Mat::zeros(rank, rank);
    invert_lower_triangular(inverse.as_mut(), factor.as_ref(), Par::Seq);
    let is_orthonormal = |norm: f64| precision.error(rank, length) * norm <= precision.tolerance();
    // The first bound takes no product, and is enough where rows are nearly orthogonal.
    if !is_orthonormal(largest_sum(inverse.as_ref()) * largest_sum(inverse.transpose()))
        && !is_orthonormal(largest_sum(product(inverse.transpose(), inverse.as_ref()).as_ref()))
    {
        return None;
    }
    let sizes: Vec<f64> = weights.iter().zip(&lengths).map(|(weight, length)| weight * length).collect();
    for (j, column) in factor.col_iter_mut().enumerate() {
        column.iter_mut().zip(&sizes).skip(j).for_each(|(x, size)| *x *= size);
    }
    for (j, column) in inverse.col_iter_mut().enumerate() {
        column.iter_mut().skip(j).for_each(|x| *x *= inverses[j]);
    }
    Some(Triangular { factor, inverse, precision })
}

/// The largest sum of a column's absolute values.
fn largest_sum(matrix: MatRef<'_, f64>) -> f64 {
    matrix.col_iter().map(|column| column.iter().map(|x| x.abs()).sum()).fold(0.0, f64::max)
}
