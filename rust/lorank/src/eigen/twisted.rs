//! Eigenvectors of a symmetric tridiagonal matrix for known eigenvalues, by twisted factorizations
//! (\[TWISTED\]).
//!
//! For an eigenvalue `l` of `T` with diagonal `a` and off-diagonal `b`, `T - l` is eliminated from above,
//! with pivots `p`, and from below, with pivots `q`:
//!
//! ```text
//! p_1 = a_1 - l      p_(i+1) = (a_(i+1) - l) + b_i up_i      up_i = -b_i / p_i
//! q_n = a_n - l      q_i = (a_i - l) + b_i down_i            down_i = -b_i / q_(i+1)
//! ```
//!
//! Both eliminations meet in row `r`, with pivot `g_r = p_r + q_r - (a_r - l)`. The vector with `z_r = 1`,
//! `z_i = up_i z_(i+1)` above and `z_(i+1) = down_i z_i` below solves all equations but that of row `r`,
//! whose residual is `g_r`. With the `r` of the smallest `|g|`, `|(T - l) z|` is at most the root of `n`
//! times the error of `l`. An entry takes two divisions, and there is no iteration.
//!
//! Vectors of eigenvalues with distance `gap` are orthogonal up to `eps ||T|| / gap`. Vectors of eigenvalues
//! that are equal up to rounding may coincide: the caller must check this.

use faer::{ColMut, Mat};

use crate::Result;
use crate::eigen::tridiagonal::Tridiagonal;
use crate::exec::memory::{zero_matrix, zeros};

/// Number of eigenvalues processed together, whose chains of divisions are independent.
const LANES: usize = 8;

/// Replacement of a zero pivot, for matrices with entries near 1 or smaller. Its inverse and the square of
/// that are representable.
const SMALLEST: f64 = 1e-150;

type Lanes = [f64; LANES];

/// Purpose of the memory of this module.
const MEMORY: &str = "selected eigenvectors";

/// Returns a unit vector for each eigenvalue, `(n, k)`, of a matrix whose largest entry is near 1.
///
/// # Errors
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub(crate) fn tridiagonal_eigenvectors(matrix: &Tridiagonal, eigenvalues: &[f64]) -> Result<Mat<f64>> {
    let n = matrix.diagonal.len();
    let mut vectors = zero_matrix(n, eigenvalues.len(), MEMORY)?;
    let mut elimination = Elimination::new(n)?;
    for (batch, values) in eigenvalues.chunks(LANES).enumerate() {
        let mut shifts = [values[0]; LANES];
        shifts[..values.len()].copy_from_slice(values);
        elimination.run(matrix, &shifts);
        for lane in 0..values.len() {
            elimination.vector(lane, vectors.col_mut(batch * LANES + lane));
        }
    }
    Ok(vectors)
}

/// The results of elimination from both ends, for [`LANES`] eigenvalues.
struct Elimination {
    up: Vec<Lanes>,
    down: Vec<Lanes>,
    /// Pivots from above; later the pivots `g` of the rows where both eliminations meet.
    pivots: Vec<Lanes>,
}

impl Elimination {
    fn new(n: usize) -> Result<Self> {
        let zeros = || zeros(n, MEMORY);
        Ok(Self { up: zeros()?, down: zeros()?, pivots: zeros()? })
    }

    fn run(&mut self, Tridiagonal { diagonal, off_diagonal }: &Tridiagonal, shifts: &Lanes) {
        let n = diagonal.len();
        let shifted = |i: usize, lane: usize| diagonal[i] - shifts[lane];
        let ratio = |b: f64, pivot: f64| -b / if pivot.abs() < SMALLEST { SMALLEST } else { pivot };
        for i in 0..n {
            for lane in 0..LANES {
                let above = if i == 0 { 0.0 } else { off_diagonal[i - 1] * self.up[i - 1][lane] };
                self.pivots[i][lane] = shifted(i, lane) + above;
                self.up[i][lane] = if i + 1 < n { ratio(off_diagonal[i], self.pivots[i][lane]) } else { 0.0 };
            }
        }
        // The pivot from below is `a - l` plus a term, which is also added to the pivot from above.
        let mut below = [0.0; LANES];
        for i in (0..n).rev() {
            for (lane, below) in below.iter_mut().enumerate() {
                self.pivots[i][lane] += *below;
                if i > 0 {
                    let down = ratio(off_diagonal[i - 1], shifted(i, lane) + *below);
                    self.down[i - 1][lane] = down;
                    *below = off_diagonal[i - 1] * down;
                }
            }
        }
    }

    fn vector(&self, lane: usize, mut z: ColMut<'_, f64>) {
        let n = self.pivots.len();
        let size = |i: &usize| self.pivots[*i][lane].abs();
        let twist = (0..n).min_by(|i, j| size(i).total_cmp(&size(j))).unwrap_or(0);
        z[twist] = 1.0;
        for i in (0..twist).rev() {
            z[i] = self.up[i][lane] * z[i + 1];
        }
        for i in twist..n - 1 {
            z[i + 1] = self.down[i][lane] * z[i];
        }
        let inverse = z.norm_l2().recip();
        z.iter_mut().for_each(|x| *x *= inverse);
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    fn residual(matrix: &Tridiagonal, value: f64, z: &[f64]) -> f64 {
        let Tridiagonal { diagonal, off_diagonal } = matrix;
        let row = |i: usize| {
            let above = if i > 0 { off_diagonal[i - 1] * z[i - 1] } else { 0.0 };
            let below = off_diagonal.get(i).map_or(0.0, |b| b * z[i + 1]);
            (above + (diagonal[i] - value) * z[i] + below).powi(2)
        };
        (0..z.len()).map(row).sum::<f64>().sqrt()
    }

    fn column(vectors: &Mat<f64>, j: usize) -> Vec<f64> {
        vectors.col(j).iter().copied().collect()
    }

    #[test]
    fn eigenvectors_of_second_differences_equal_the_formula() {
        for n in [1usize, 2, 3, 8, 9, 64, 300] {
            let step = PI / (n + 1) as f64;
            let matrix = Tridiagonal { diagonal: vec![2.0; n], off_diagonal: vec![-1.0; n - 1] };
            let values: Vec<f64> = (1..=n).map(|k| 2.0 - 2.0 * (k as f64 * step).cos()).collect();
            let vectors = tridiagonal_eigenvectors(&matrix, &values).unwrap();
            for k in 0..n {
                let expected: Vec<f64> = (1..=n)
                    .map(|i| (i as f64 * (k + 1) as f64 * step).sin() * (2.0 * step / PI).sqrt())
                    .collect();
                let found = column(&vectors, k);
                let dot: f64 = found.iter().zip(&expected).map(|(x, y)| x * y).sum();
                // Neighbouring eigenvalues are `1 / n^2` apart.
                let close = 1e-15 * (n * n) as f64;
                let error = found.iter().zip(&expected).map(|(x, y)| (x * dot.signum() - y).abs());
                assert!(error.fold(0.0, f64::max) <= close, "{n}: {k}");
            }
        }
    }

    #[test]
    fn zero_pivots_and_split_blocks() {
        let cases = [
            // The first pivot for the eigenvalue 0 vanishes.
            (vec![0.0, 0.0, 0.0], vec![1.0, 1.0], vec![-(2f64.sqrt()), 0.0, 2f64.sqrt()]),
            // Two blocks, the second of which has the eigenvalues 1 and 3.
            (vec![5.0, 2.0, 2.0], vec![0.0, 1.0], vec![1.0, 3.0, 5.0]),
            (vec![0.0; 4], vec![0.0; 3], vec![0.0; 4]),
            (vec![1.0, 1e-8, 1e-16], vec![1e-9, 1e-13], vec![1.0]),
        ];
        for (diagonal, off_diagonal, values) in cases {
            let matrix = Tridiagonal { diagonal, off_diagonal };
            let vectors = tridiagonal_eigenvectors(&matrix, &values).unwrap();
            for (j, &value) in values.iter().enumerate() {
                let z = column(&vectors, j);
                assert!((z.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-14, "{z:?}");
                assert!(residual(&matrix, value, &z) < 1e-15, "{value}: {z:?}");
            }
        }
    }

    #[test]
    fn nan_is_propagated() {
        let matrix = Tridiagonal { diagonal: vec![f64::NAN; 3], off_diagonal: vec![1.0; 2] };
        let vectors = tridiagonal_eigenvectors(&matrix, &[1.0]).unwrap();
        assert!(vectors.col(0).iter().any(|x| x.is_nan()));
    }
}
