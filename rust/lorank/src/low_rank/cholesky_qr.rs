//! The factor `R` of a QR decomposition from the Cholesky factor of the Gram matrix, if that is accurate
//! enough.
//!
//! Let `D` scale the rows of `X (K, length)` to length 1. Then `D X X^T D = L L^T` and `Q^T = L^-1 D X`. An
//! error `E` of the Gram matrix gives `Q^T Q = I - L^-1 E L^-T`. By Ostrowski's theorem (\[OSTROWSKI\]) the
//! relative error of every singular value of the update is at most half of `||E|| ||L^-1||^2`.
//! [`Precision::error`] bounds `||E||`. `||L^-1||^2` is bounded by the product of the largest row and column
//! sums of absolute values of one of three matrices. They are tried in order of cost:
//!
//! - The inverse of `M`, where `M` is `L` with its off-diagonal entries replaced by minus their absolute
//!   values: no entry of `L^-1` is larger. This takes two solves and suffices if rows are nearly orthogonal.
//! - `L^-1` itself.
//! - `L^-T L^-1`, whose norm is `||L^-1||^2`: the largest column sum suffices.

use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, MatRef, Par};

use crate::exec::cancel::CancelToken;
use crate::exec::memory::zero_matrix;
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::kernels::dense::{cholesky, product};
use crate::kernels::thin_gram::SUMMANDS;
use crate::low_rank::terms::{Side, Term};
use crate::matrix::stacked::{Gram, gram_scratch};
use crate::storage::source::Parts;
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "the factors of an update";

/// The arithmetic of a Gram matrix and of the products that depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precision {
    /// float32, with two sums of [`SUMMANDS`] numbers added before widening to float64.
    Single,
    /// float64.
    Double,
}

impl Precision {
    /// Returns the largest acceptable error of `Q^T Q`. Factors are written in float32.
    const fn tolerance(self) -> f64 {
        match self {
            Self::Single => 4e-7,
            Self::Double => 1e-10,
        }
    }

    /// Returns the norm of the error of a Gram matrix of `rank` rows of length 1. Rounding errors of sums
    /// grow like a random walk; measured errors of 16 to 128 random rows are half as large. If all terms of a
    /// sum are equal, errors do not average out and reach 4e-7.
    fn error(self, rank: usize, length: usize) -> f64 {
        let (rank, length) = (rank as f64, length as f64);
        let sums = |summands: f64| (3.0 + rank.sqrt() / 2.5) * (summands / length).min(1.0).sqrt();
        match self {
            Self::Single => f64::from(f32::EPSILON) * sums(SUMMANDS as f64),
            Self::Double => f64::EPSILON * sums(length),
        }
    }

    /// Returns the range of mean squares for which sums do not overflow and products do not underflow.
    const fn range(self) -> std::ops::RangeInclusive<f64> {
        match self {
            Self::Single => 1e-28..=1e28,
            // Squares of types narrower than float64 are always in its range.
            Self::Double => f64::MIN_POSITIVE..=f64::MAX,
        }
    }
}

/// A factorization `X = F Q^T` of stacked factors `X (K, length)`, in reusable memory.
pub(crate) struct Triangular {
    /// `F (K, K)`, lower triangular.
    pub factor: Mat<f64>,
    pub precision: Precision,
}

impl Default for Triangular {
    fn default() -> Self {
        Self { factor: Mat::new(), precision: Precision::Double }
    }
}

impl Triangular {
    /// Factors one side of an update. Returns false if there are more rows than columns, or if no bound shows
    /// that `Q` is orthonormal.
    pub(crate) fn find(
        &mut self,
        terms: &[Term],
        side: Side,
        (Parts { buffers, scratch }, gram): (&mut Parts, &mut Gram),
        cancel: &CancelToken,
    ) -> Result<bool> {
        let stacked = side.stacked(terms, buffers, cancel)?;
        let (rank, length) = (stacked.rank(), stacked.length());
        if !(1..=length).contains(&rank) {
            return Ok(false);
        }
        stacked.gram::<f32>(gram, scratch.stack(gram_scratch::<f32>(rank))?, cancel)?;
        if self.factor(gram, rank, length, Precision::Single)? {
            return Ok(true);
        }
        stacked.gram::<f64>(gram, scratch.stack(gram_scratch::<f64>(rank))?, cancel)?;
        self.factor(gram, rank, length, Precision::Double)
    }

    /// Returns false if no bound shows that `Q` is orthonormal.
    fn factor(&mut self, gram: &Gram, rank: usize, length: usize, precision: Precision) -> Result<bool> {
        let squares: Vec<f64> = gram.values.iter().step_by(gram.order + 1).take(rank).copied().collect();
        let range = precision.range();
        if !squares.iter().all(|x| range.contains(&(x / length as f64))) {
            return Ok(false);
        }
        let lengths: Vec<f64> = squares.iter().map(|x| x.sqrt()).collect();
        let inverses: Vec<f64> = lengths.iter().map(|x| x.recip()).collect();
        let factor = &mut self.factor;
        factor
            .try_reserve(rank, rank)
            .map_err(|_| Error::no_memory(rank * rank * size_of::<f64>(), MEMORY))?;
        factor.resize_with(rank, rank, |_, _| 0.0);
        for (j, (column, scale)) in factor.col_iter_mut().zip(&inverses).enumerate() {
            let below = gram.values[j..].iter().step_by(gram.order).zip(&inverses).skip(j);
            for (to, (x, other)) in column.iter_mut().skip(j).zip(below) {
                *to = x * other * scale;
            }
        }
        let most = precision.tolerance() / precision.error(rank, length);
        if !cholesky(factor.as_mut())? || !is_well_conditioned(factor.as_ref(), most)? {
            return Ok(false);
        }
        for (j, column) in factor.col_iter_mut().enumerate() {
            column.iter_mut().zip(&lengths).skip(j).for_each(|(x, length)| *x *= length);
        }
        self.precision = precision;
        Ok(true)
    }
}

/// Returns true if a bound shows that `||L^-1||^2` is at most `most`.
fn is_well_conditioned(factor: MatRef<'_, f64>, most: f64) -> Result<bool> {
    let product_of = |(columns, rows): (f64, f64)| columns * rows;
    if product_of(largest_sums_at_most(factor)) <= most {
        return Ok(true);
    }
    let n = factor.nrows();
    prepare_products([n; 3], Strategy::Alone)?;
    let mut inverse = zero_matrix(n, n, MEMORY)?;
    invert_lower_triangular(inverse.as_mut(), factor, Par::Seq);
    Ok(product_of(largest_sums(inverse.as_ref())) <= most
        || largest_sums(product(inverse.transpose(), inverse.as_ref())?.as_ref()).0 <= most)
}

/// Returns bounds on the largest sums of absolute values of a column and of a row of `L^-1`: the largest
/// entries of `1^T M^-1` and of `M^-1 1`.
fn largest_sums_at_most(factor: MatRef<'_, f64>) -> (f64, f64) {
    let n = factor.nrows();
    let (mut columns, mut rows) = (vec![0.0; n], vec![1.0; n]);
    for (j, column) in factor.col_iter().enumerate() {
        let (done, below) = rows.split_at_mut(j + 1);
        done[j] /= column[j];
        for (row, x) in below.iter_mut().zip(column.iter().skip(j + 1)) {
            *row += x.abs() * done[j];
        }
    }
    for (j, column) in factor.col_iter().enumerate().rev() {
        let below = column.iter().zip(&columns).skip(j + 1);
        columns[j] = (1.0 + below.map(|(x, sum)| x.abs() * sum).sum::<f64>()) / column[j];
    }
    let [columns, rows] = [columns, rows].map(|sums| sums.into_iter().fold(0.0, f64::max));
    (columns, rows)
}

/// Returns the largest sums of absolute values of a column and of a row.
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

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use proptest::prelude::*;

    use super::*;

    /// Returns a lower triangular matrix with ones on the diagonal.
    fn lower(n: usize, below: impl Fn(usize, usize) -> f64) -> Mat<f64> {
        Mat::from_fn(n, n, |i, j| match i.cmp(&j) {
            Ordering::Less => 0.0,
            Ordering::Equal => 1.0,
            Ordering::Greater => below(i, j),
        })
    }

    /// Returns a unit lower triangular matrix with pseudo-random entries up to `size`.
    fn noise(n: usize, size: f64, seed: usize) -> Mat<f64> {
        let mix = |i: usize| ((i * 7919 + seed * 131 + i * i * 3) % 1013) as f64 / 506.5 - 1.0;
        lower(n, |i, j| size * mix(i * n + j))
    }

    /// Returns `||L^-1||^2`, computed by another library.
    fn square_of_norm(factor: &Mat<f64>) -> f64 {
        let n = factor.nrows();
        let values = nalgebra::DMatrix::from_fn(n, n, |i, j| factor[(i, j)]).singular_values();
        values.min().powi(-2)
    }

    #[test]
    fn sums_of_an_inverse_with_equal_signs_are_exact() {
        // `L = M`, and the bound is tight: the corner of the inverse is 2^(n-1).
        let n = 6;
        let factor = lower(n, |_, _| -1.0);
        assert_eq!(largest_sums_at_most(factor.as_ref()), (32.0, 32.0));
        let mut inverse = Mat::zeros(n, n);
        invert_lower_triangular(inverse.as_mut(), factor.as_ref(), Par::Seq);
        assert_eq!(largest_sums(inverse.as_ref()), (32.0, 32.0));
    }

    #[test]
    fn smallest_bound_decides() {
        let n = 24;
        for size in [0.0, 0.02, 0.1, 0.2, 0.3] {
            let factor = noise(n, size, 5);
            let mut inverse = Mat::zeros(n, n);
            invert_lower_triangular(inverse.as_mut(), factor.as_ref(), Par::Seq);
            let bounds = [
                largest_sums_at_most(factor.as_ref()),
                largest_sums(inverse.as_ref()),
                (largest_sums(product(inverse.transpose(), inverse.as_ref()).unwrap().as_ref()).0, 1.0),
            ]
            .map(|(columns, rows)| columns * rows);
            let least = square_of_norm(&factor);
            assert!(bounds.iter().all(|bound| *bound >= least * (1.0 - 1e-13)), "{size}: {bounds:?} {least}");
            for bound in bounds {
                assert!(is_well_conditioned(factor.as_ref(), bound * (1.0 + 1e-13)).unwrap());
            }
            let smallest = bounds.iter().fold(f64::INFINITY, |least, bound| least.min(*bound));
            assert!(!is_well_conditioned(factor.as_ref(), smallest * (1.0 - 1e-13)).unwrap());
        }
    }

    proptest! {
        #[test]
        fn no_bound_is_too_small(n in 1usize..20, size in 0.0f64..2.0, seed in any::<u16>(), share in 0.1f64..3.0) {
            let factor = noise(n, size, usize::from(seed));
            let square = square_of_norm(&factor);
            let (columns, rows) = largest_sums_at_most(factor.as_ref());
            prop_assert!(columns * rows >= square * (1.0 - 1e-9));
            // The check must not accept an ill-conditioned factor.
            if is_well_conditioned(factor.as_ref(), share * square).unwrap() {
                prop_assert!(share >= 1.0 - 1e-9);
            }
        }
    }
}
