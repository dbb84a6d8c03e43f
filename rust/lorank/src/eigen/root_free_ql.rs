//! Eigenvalues of a symmetric tridiagonal matrix by the QL iteration without square roots (\[PARLETT\]).
//!
//! A sweep with shift `sigma` runs upwards over a block with diagonal `a_l..a_m` and squared off-diagonal
//! `b_l..b_(m-1)`. Let `d` be the determinants of the trailing blocks of `T - sigma` (`d_(m+1) = 1`,
//! `d_m = a_m - sigma`), `S` sums of squares (`S_(m+1) = 1`), and `s` the squared sines of the rotations
//! (`s_m = 0`). For `i = m - 1, ..., l`:
//!
//! ```text
//! S_(i+1) = d_(i+1)^2 + b_i S_(i+2)           d_i = (a_i - sigma) d_(i+1) - b_i d_(i+2)
//! s_i = b_i S_(i+2) / S_(i+1)                 gamma_i = d_i d_(i+1) / S_(i+1)
//! b_(i+1) = s_(i+1) S_(i+1) / S_(i+2)         a_(i+1) = gamma_(i+1) + a_i - gamma_i
//! ```
//!
//! These are the quantities of the variant of Pal, Walker and Kahan, with `gamma_i = c_i g_i`, squared
//! cosines `c_i = d_(i+1)^2 / S_(i+1)` and pivots `g_i = d_i / d_(i+1)`. In that variant every step waits for
//! the divisions of the previous one. Here a step divides once, and the next step depends only on sums and
//! products. The computed determinants are exact for entries perturbed by a few units of rounding, there is
//! no division by a pivot, and all other operations are sums of positive terms, products and quotients. The
//! error of an eigenvalue is a small multiple of `eps ||T||`.
//!
//! Long blocks are swept with eight shifts at a time, the eigenvalues of the leading block of order eight
//! ([`ql_pipeline`](crate::eigen::ql_pipeline)). This takes a third more steps, each in a quarter of the
//! time.

use crate::eigen::ql_pipeline::{LARGE, SMALL, SWEEPS, Sweeps};
use crate::eigen::tridiagonal::Tridiagonal;
use crate::exec::cancel::CancelToken;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::kernels::simd::dispatch;
use crate::{Error, Result};

/// Largest number of sweeps, or rounds of [`SWEEPS`] sweeps, until a block must have split. Two are usual.
const MOST_SWEEPS: usize = 60;

/// Least distance between the ends of a block for pipelined sweeps: the fastest from order 48 to 192.
const PIPELINED_FROM: usize = 23;

/// Largest negligible square of an off-diagonal entry. Dropping an entry changes no eigenvalue by more than
/// the entry.
const FLOOR: f64 = (f64::EPSILON / 32.0) * (f64::EPSILON / 32.0);

/// Computes the eigenvalues of a symmetric tridiagonal matrix, ascending, in about `1.2 n^2` steps of 3
/// cycles.
///
/// # Errors
/// [`Error::NoConvergence`] if the iteration does not end, as with NaN, and [`Error::Numerical`] if squares
/// of entries leave the range of float64; [`Error::Cancelled`].
pub fn tridiagonal_eigenvalues(matrix: &Tridiagonal, cancel: &CancelToken) -> Result<Vec<f64>> {
    let largest = matrix.diagonal.iter().chain(&matrix.off_diagonal).fold(0.0f64, |max, x| max.max(x.abs()));
    if largest == 0.0 && !matrix.diagonal.iter().chain(&matrix.off_diagonal).any(|x| x.is_nan()) {
        return Ok(vec![0.0; matrix.diagonal.len()]);
    }
    let exponent = binary_exponent(largest)?;
    let scale = power_of_two(-exponent);
    let mut iteration = Iteration {
        diagonal: matrix.diagonal.iter().map(|x| x * scale).collect(),
        squares: matrix.off_diagonal.iter().map(|x| (x * scale) * (x * scale)).collect(),
    };
    if matrix.diagonal.first() > matrix.diagonal.last() {
        // The iteration takes a tenth fewer steps if the smaller end comes first.
        iteration.diagonal.reverse();
        iteration.squares.reverse();
    }
    let mut eigenvalues = iteration.eigenvalues(cancel)?;
    for value in &mut eigenvalues {
        *value *= power_of_two(exponent);
    }
    eigenvalues.sort_unstable_by(f64::total_cmp);
    Ok(eigenvalues)
}

/// A tridiagonal matrix with entries up to 1, which the iteration makes diagonal.
struct Iteration {
    diagonal: Vec<f64>,
    /// Squares of the off-diagonal.
    squares: Vec<f64>,
}

impl Iteration {
    fn eigenvalues(mut self, cancel: &CancelToken) -> Result<Vec<f64>> {
        let n = self.diagonal.len();
        let (mut first, mut sweeps) = (0, 0);
        while first < n {
            let last = self.block_end(first);
            match last - first {
                0 => (first, sweeps) = (first + 1, 0),
                1 => {
                    self.solve_pair(first);
                    (first, sweeps) = (first + 2, 0);
                }
                distance => {
                    if distance < PIPELINED_FROM {
                        self.sweep(first, last);
                    } else {
                        cancel.check()?;
                        self.sweep_many(first, last, cancel)?;
                    }
                    sweeps += 1;
                    if sweeps > MOST_SWEEPS {
                        return Err(Error::NoConvergence("the tridiagonal eigenvalue iteration"));
                    }
                }
            }
        }
        Ok(self.diagonal)
    }

    /// Returns the last index of the block that begins at `first`. The next off-diagonal entry is negligible.
    fn block_end(&self, first: usize) -> usize {
        const RELATIVE: f64 = f64::EPSILON * f64::EPSILON;
        let a = &self.diagonal;
        (first..self.squares.len())
            .find(|&i| self.squares[i] <= FLOOR || self.squares[i] <= RELATIVE * (a[i] * a[i + 1]).abs())
            .unwrap_or(a.len() - 1)
    }

    fn solve_pair(&mut self, first: usize) {
        let (a, b) = (self.diagonal[first], self.diagonal[first + 1]);
        let radius = (0.5 * (a - b)).hypot(self.squares[first].sqrt());
        let mean = 0.5 * (a + b);
        (self.diagonal[first], self.diagonal[first + 1]) = (mean - radius, mean + radius);
    }

    /// Returns Wilkinson's shift: the eigenvalue of the leading 2x2 block that is closer to its first entry.
    fn shift(&self, first: usize) -> f64 {
        let (a, next, root) = (self.diagonal[first], self.diagonal[first + 1], self.squares[first].sqrt());
        let ratio = (next - a) / (2.0 * root);
        a - root / (ratio + ratio.hypot(1.0).copysign(ratio))
    }

    /// Does [`SWEEPS`] pipelined sweeps, shifted by the eigenvalues of the leading block of that order.
    fn sweep_many(&mut self, first: usize, last: usize, cancel: &CancelToken) -> Result<()> {
        let leading = Iteration {
            diagonal: self.diagonal[first..first + SWEEPS].to_vec(),
            squares: self.squares[first..first + SWEEPS - 1].to_vec(),
        };
        let mut shifts = [0.0; SWEEPS];
        shifts.copy_from_slice(&leading.eigenvalues(cancel)?);
        dispatch(Sweeps {
            diagonal: &mut self.diagonal[first..=last],
            squares: &mut self.squares[first..last],
            shifts,
            negligible: FLOOR,
        });
        Ok(())
    }

    fn sweep(&mut self, first: usize, last: usize) {
        let sigma = self.shift(first);
        let (a, b) = (&mut self.diagonal[first..=last], &mut self.squares[first..last]);
        let end = b.len();
        let (mut d, mut d_below) = (a[end] - sigma, 1.0);
        let (mut sum_below, mut inverse_below) = (1.0, 1.0);
        let (mut gamma, mut sine) = (d, 0.0);
        for i in (0..end).rev() {
            let weighted = b[i] * sum_below;
            let sum = d * d + weighted;
            if i + 1 < end {
                b[i + 1] = sine * (sum * inverse_below);
            }
            let inverse = 1.0 / sum;
            sine = weighted * inverse;
            (d, d_below) = ((a[i] - sigma) * d - b[i] * d_below, d);
            let next = d * d_below * inverse;
            a[i + 1] = gamma + (a[i] - next);
            (gamma, sum_below, inverse_below) = (next, sum, inverse);
            if !(SMALL..LARGE).contains(&sum) {
                let unit = if sum < SMALL { LARGE } else { SMALL };
                (d, d_below) = (d * unit, d_below * unit);
                sum_below *= unit * unit;
                inverse_below = 1.0 / sum_below;
            }
        }
        b[0] = sine * (d * d * inverse_below);
        a[0] = sigma + gamma;
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use proptest::prelude::*;

    use super::*;
    use crate::kernels::simd::tests::on_every_path;

    fn eigenvalues(diagonal: Vec<f64>, off_diagonal: Vec<f64>) -> Vec<f64> {
        tridiagonal_eigenvalues(&Tridiagonal { diagonal, off_diagonal }, &CancelToken::default()).unwrap()
    }

    /// Returns the number of eigenvalues below `x`, from the signs of the pivots of `T - x`.
    fn count_below(diagonal: &[f64], off_diagonal: &[f64], x: f64) -> usize {
        let (mut pivot, mut count) = (1.0f64, 0);
        for (i, a) in diagonal.iter().enumerate() {
            let b = if i == 0 { 0.0 } else { off_diagonal[i - 1] };
            pivot = (a - x) - b * b / pivot;
            if pivot == 0.0 {
                pivot = -1e-300;
            }
            count += usize::from(pivot < 0.0);
        }
        count
    }

    /// Checks by Sturm counts that every value lies within `tolerance` of the eigenvalue of its index.
    fn assert_counts(diagonal: &[f64], off_diagonal: &[f64], found: &[f64], tolerance: f64) {
        for (k, x) in found.iter().enumerate() {
            assert!(count_below(diagonal, off_diagonal, x + tolerance) > k, "value {k}: {x}");
            assert!(count_below(diagonal, off_diagonal, x - tolerance) <= k, "value {k}: {x}");
        }
    }

    #[test]
    fn wilkinson_21() {
        // Diagonal 10, 9, ..., 0, ..., 9, 10: pairs of eigenvalues that agree to 14 digits.
        let found = eigenvalues((-10..=10).map(|i| f64::from(i).abs()).collect(), vec![1.0; 20]);
        for (x, expected) in found.iter().rev().zip([
            10.746_194_182_903_393,
            10.746_194_182_903_322,
            9.210_678_647_361_332,
            9.210_678_647_304_919,
            8.038_941_122_829_024,
            8.038_941_115_814_274,
        ]) {
            assert!((x - expected).abs() < 1e-13, "{x} {expected}");
        }
        assert!((found[0] + 1.125_441_522_119_984).abs() < 1e-13, "{}", found[0]);
    }

    #[test]
    fn eigenvalues_of_second_differences_equal_the_formula() {
        for n in [1, 2, 3, 10, 257, 1500] {
            let found = eigenvalues(vec![2.0; n], vec![-1.0; n - 1]);
            for (k, x) in (1..).zip(&found) {
                let expected = 2.0 - 2.0 * (f64::from(k) * PI / (n as f64 + 1.0)).cos();
                assert!((x - expected).abs() <= 4.0 * n as f64 * f64::EPSILON * 4.0, "n = {n}, k = {k}");
            }
        }
    }

    /// Tests a matrix whose determinants cover thousands of binary orders of magnitude.
    #[test]
    fn clement() {
        for n in [2usize, 3, 64, 577, 2000] {
            let off_diagonal = (1..n).map(|k| ((k * (n - k)) as f64).sqrt()).collect();
            let found = eigenvalues(vec![0.0; n], off_diagonal);
            for (k, x) in found.iter().enumerate() {
                let expected = 2.0 * k as f64 - (n as f64 - 1.0);
                assert!(
                    (x - expected).abs() <= 4.0 * (n as f64).powf(1.5) * f64::EPSILON,
                    "n = {n}, k = {k}: {x}"
                );
            }
        }
    }

    #[test]
    fn eigenvalues_of_diagonal_and_empty_matrices_are_exact() {
        assert!(eigenvalues(vec![], vec![]).is_empty());
        let found = eigenvalues(vec![3.0, -1.0, 2.0], vec![0.0, 0.0]);
        assert_eq!(
            found.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            [-1.0f64, 2.0, 3.0].map(f64::to_bits)
        );
        assert_eq!(eigenvalues(vec![0.0; 3], vec![0.0; 2]), [0.0; 3]);
    }

    #[test]
    fn nan_does_not_converge() {
        for diagonal in [vec![f64::NAN, 1.0, 2.0], vec![1.0, 2.0, f64::NAN], vec![f64::NAN, 0.0, 0.0]] {
            for off_diagonal in [vec![1.0, 1.0], vec![0.0, 0.0]] {
                let matrix = Tridiagonal { diagonal: diagonal.clone(), off_diagonal };
                let found = tridiagonal_eigenvalues(&matrix, &CancelToken::default());
                assert!(found.map_or(true, |values| values.iter().any(|x| x.is_nan())));
            }
        }
    }

    #[test]
    fn clustered_and_graded_matrices() {
        let ones = |n: usize| vec![1.0; n];
        let graded = |n: i32, ratio: f64| (0..n).map(|i| ratio.powi(i)).collect::<Vec<_>>();
        for (diagonal, off_diagonal) in [
            (ones(200), vec![1e-9; 199]),
            (ones(200), vec![1e-17; 199]),
            (vec![0.0; 101], ones(100)),
            (graded(60, 0.5), graded(59, 0.5)),
            (graded(60, 2.0), graded(59, 1.9)),
            (graded(100, 1e-4), vec![0.0; 99]),
            (
                (0..300).map(|i| f64::from(i % 7)).collect(),
                (0..299).map(|i| f64::from(i % 5) * 1e-3).collect(),
            ),
        ] {
            let norm = diagonal.iter().chain(&off_diagonal).fold(0.0f64, |max, x| max.max(x.abs()));
            on_every_path(|_| {
                let found = eigenvalues(diagonal.clone(), off_diagonal.clone());
                assert_counts(&diagonal, &off_diagonal, &found, 64.0 * f64::EPSILON * norm);
            });
        }
    }

    proptest! {
        #[test]
        fn every_value_is_an_eigenvalue(
            entries in prop::collection::vec((-1.0f64..1.0, prop_oneof![Just(0.0), -1.0f64..1.0, -1e-8f64..1e-8]), 1..200),
            exponent in -400i32..400,
        ) {
            let (diagonal, mut off_diagonal): (Vec<f64>, Vec<f64>) = entries.into_iter().unzip();
            off_diagonal.pop();
            let scaled = |values: &[f64]| values.iter().map(|x| x * power_of_two(exponent)).collect::<Vec<_>>();
            let found = eigenvalues(scaled(&diagonal), scaled(&off_diagonal));
            let found: Vec<f64> = found.iter().map(|x| x * power_of_two(-exponent)).collect();
            assert_counts(&diagonal, &off_diagonal, &found, 1e-14 * (diagonal.len() as f64).sqrt() * 3.0);
        }
    }
}
