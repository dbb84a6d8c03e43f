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
use crate::low_rank::{Side, Term};
use crate::source::Buffer;
use crate::stacked::{Gram, gram_scratch};
use crate::thin::SUMMANDS;
use crate::workspace::Scratch;

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

/// `W X = F Q^T` for stacked factors `X (K, length)` and the terms' weights `W`, in memory that one side after the
/// other uses.
pub(crate) struct Triangular {
    /// `F (K, K)`, lower triangular.
    pub factor: Mat<f64>,
    /// `(K, K)`, lower triangular: `Q^T` is its product with `X`.
    pub inverse: Mat<f64>,
    pub precision: Precision,
}

impl Default for Triangular {
    fn default() -> Self {
        Self { factor: Mat::new(), inverse: Mat::new(), precision: Precision::Double }
    }
}

impl Triangular {
    /// Finds those of one side of an update; `false` if there are more rows than columns, or no bound shows `Q` to be
    /// orthonormal.
    pub(crate) fn find(
        &mut self,
        terms: &[Term],
        side: Side,
        (factors, gram, scratch): (&mut Vec<Buffer>, &mut Gram, &mut Scratch),
        cancel: &CancelToken,
    ) -> Result<bool> {
        let stacked = side.stacked(terms, factors, cancel)?;
        let (rank, length) = (stacked.rank(), stacked.length());
        if !(1..=length).contains(&rank) {
            return Ok(false);
        }
        let weights = side.weights(terms);
        stacked.gram::<f32>(gram, scratch.stack(gram_scratch::<f32>(rank))?, cancel)?;
        if self.factor(gram, &weights, length, Precision::Single).is_some() {
            return Ok(true);
        }
        stacked.gram::<f64>(gram, scratch.stack(gram_scratch::<f64>(rank))?, cancel)?;
        Ok(self.factor(gram, &weights, length, Precision::Double).is_some())
    }

    fn factor(&mut self, gram: &Gram, weights: &[f64], length: usize, precision: Precision) -> Option<()> {
        let rank = weights.len();
        let squares: Vec<f64> = gram.values.iter().step_by(gram.order + 1).take(rank).copied().collect();
        let range = precision.range();
        if !squares.iter().all(|x| range.contains(&(x / length as f64))) {
            return None;
        }
        let lengths: Vec<f64> = squares.iter().map(|x| x.sqrt()).collect();
        let inverses: Vec<f64> = lengths.iter().map(|x| x.recip()).collect();
        let Self { factor, inverse, .. } = self;
        for matrix in [&mut *factor, &mut *inverse] {
            matrix.resize_with(rank, rank, |_, _| 0.0);
            matrix.fill(0.0);
        }
        for (j, (column, scale)) in factor.col_iter_mut().zip(&inverses).enumerate() {
            let below = gram.values[j..].iter().step_by(gram.order).zip(&inverses).skip(j);
            for (to, (x, other)) in column.iter_mut().skip(j).zip(below) {
                *to = x * other * scale;
            }
        }
        cholesky(factor.as_mut())?;
        invert_lower_triangular(inverse.as_mut(), factor.as_ref(), Par::Seq);
        let is_orthonormal = |norm: f64| precision.error(rank, length) * norm <= precision.tolerance();
        // The first bound takes no product, and is enough where rows are nearly orthogonal.
        let (columns, rows) = largest_sums(inverse.as_ref());
        if !is_orthonormal(columns * rows) {
            let (columns, _) = largest_sums(product(inverse.transpose(), inverse.as_ref()).as_ref());
            is_orthonormal(columns).then_some(())?;
        }
        for (j, column) in factor.col_iter_mut().enumerate() {
            let sizes = weights.iter().zip(&lengths).skip(j);
            column.iter_mut().skip(j).zip(sizes).for_each(|(x, (weight, length))| *x *= weight * length);
        }
        for (j, (column, scale)) in inverse.col_iter_mut().zip(&inverses).enumerate() {
            column.iter_mut().skip(j).for_each(|x| *x *= scale);
        }
        self.precision = precision;
        Some(())
    }
}

/// The largest sums of absolute values of a column, and of a row.
fn largest_sums(matrix: MatRef<'_, f64>) -> (f64, f64) {
    let mut rows = vec![0.0; matrix.nrows()];
    let mut largest = 0.0f64;
    for column in matrix.col_iter() {
        let mut sum = 0.0;
        for (x, row) in column.iter().zip(&mut rows) {
            sum += x.abs();
            *row += x.abs();
        }
        largest = largest.max(sum);
    }
    (largest, rows.into_iter().fold(0.0, f64::max))
}
