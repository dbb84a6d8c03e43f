//! Eight pipelined sweeps of the QL iteration, one in each lane of SIMD vectors.
//!
//! Within a sweep ([`root_free_ql`](crate::eigen::root_free_ql)) every step depends on the previous one. But
//! step `i` finishes entries `i + 1`, so that a second sweep with a known shift can follow closely: lane `k`
//! is [`LAG`] steps behind lane `k - 1`. The output of a lane is the input of the next lane [`LAG`]` - 1`
//! steps later. Entries pass from memory through all lanes and back:
//!
//! ```text
//! memory -> lane 0 -> lane 1 -> ... -> lane 7 -> memory
//! ```
//!
//! Entries outside of the matrix are zero. A square of zero, outside of the matrix or because a sweep has
//! made it negligible, ends the block of a lane and begins a new one.

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

use pulp::{Simd, WithSimd};

/// Number of pipelined sweeps.
pub(crate) const SWEEPS: usize = 8;

/// Number of steps between consecutive sweeps, at least 2. With 2, a step would depend on the previous one
/// again.
const LAG: usize = 3;

/// Bound beyond which quantities are rescaled. Determinants grow as powers of the norm, sums as their
/// squares; one step changes a sum by a factor far below the square of this bound.
pub(crate) const LARGE: f64 = (1u128 << 80) as f64;
pub(crate) const SMALL: f64 = 1.0 / LARGE;

/// Pipelined sweeps with given shifts over one block.
pub(crate) struct Sweeps<'a> {
    pub(crate) diagonal: &'a mut [f64],
    /// Squares of the off-diagonal entries, one fewer than the diagonal has.
    pub(crate) squares: &'a mut [f64],
    pub(crate) shifts: [f64; SWEEPS],
    /// Largest square that counts as zero.
    pub(crate) negligible: f64,
}

impl WithSimd for Sweeps<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match SWEEPS / S::F64_LANES {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            4 => self.run::<S, 4>(simd),
            _ => self.run::<S, SWEEPS>(simd),
        }
    }
}

/// One number per lane.
type Lanes<S, const VECTORS: usize> = [<S as Simd>::f64s; VECTORS];

/// The state of every sweep, with the names of [`root_free_ql`](crate::eigen::root_free_ql).
struct State<S: Simd, const VECTORS: usize> {
    d: Lanes<S, VECTORS>,
    d_below: Lanes<S, VECTORS>,
    sum_below: Lanes<S, VECTORS>,
    inverse_below: Lanes<S, VECTORS>,
    gamma: Lanes<S, VECTORS>,
    sine: Lanes<S, VECTORS>,
}

impl Sweeps<'_> {
    #[inline(always)]
    fn run<S: Simd, const VECTORS: usize>(self, simd: S) {
        const BEHIND: usize = LAG * (SWEEPS - 1);
        let Self { diagonal, squares, shifts, negligible } = self;
        let (zero, one) = ([simd.splat_f64s(0.0); VECTORS], [simd.splat_f64s(1.0); VECTORS]);
        let mut sigma = zero;
        sigma.copy_from_slice(S::as_simd_f64s(&shifts).0);
        let mut state =
            State { d: one, d_below: one, sum_below: one, inverse_below: one, gamma: zero, sine: zero };
        // Entries between two lanes, the oldest first.
        let mut passed = [(zero, zero); LAG - 1];
        let end = squares.len();
        for time in 0..end + 2 + BEHIND {
            let at = end.wrapping_sub(time);
            let given = |values: &[f64]| values.get(at).copied().unwrap_or(0.0);
            let (mut a, mut b) = passed[0];
            shift_in::<S, VECTORS>(simd, given(diagonal), &mut a);
            shift_in::<S, VECTORS>(simd, given(squares), &mut b);
            let (a, b) = step::<S, VECTORS>(simd, &mut state, (a, b), &sigma, negligible);
            passed.rotate_left(1);
            passed[LAG - 2] = (a, b);
            let done = at.wrapping_add(BEHIND + 1);
            if let Some(place) = diagonal.get_mut(done) {
                *place = last_lane::<S>(&a);
            }
            if let Some(place) = squares.get_mut(done) {
                *place = last_lane::<S>(&b);
            }
        }
    }
}

/// Moves every number to the next lane, and `x` to the first.
#[inline(always)]
fn shift_in<S: Simd, const VECTORS: usize>(simd: S, x: f64, lanes: &mut Lanes<S, VECTORS>) {
    let first = simd.mask_between_m64s(0, 1).mask();
    let mut carried = simd.splat_f64s(x);
    for vector in lanes {
        let rotated = simd.rotate_right_f64s(*vector, 1);
        *vector = simd.select_f64s(first, carried, rotated);
        carried = rotated;
    }
}

#[inline(always)]
fn last_lane<S: Simd>(lanes: &[S::f64s]) -> f64 {
    pulp::bytemuck::cast_slice::<S::f64s, f64>(lanes)[SWEEPS - 1]
}

/// Does one step of every sweep, from entries `(a_i, b_i)` to `(a_(i+1), b_(i+1))`.
#[inline(always)]
fn step<S: Simd, const VECTORS: usize>(
    simd: S,
    state: &mut State<S, VECTORS>,
    (mut a, mut b): (Lanes<S, VECTORS>, Lanes<S, VECTORS>),
    sigma: &Lanes<S, VECTORS>,
    negligible: f64,
) -> (Lanes<S, VECTORS>, Lanes<S, VECTORS>) {
    let one = simd.splat_f64s(1.0);
    let (small, large) = (simd.splat_f64s(SMALL), simd.splat_f64s(LARGE));
    let negligible = simd.splat_f64s(negligible);
    for v in 0..VECTORS {
        let State { d, d_below, sum_below, inverse_below, gamma, sine } = state;
        let weighted = simd.mul_f64s(b[v], sum_below[v]);
        let sum = simd.mul_add_e_f64s(d[v], d[v], weighted);
        let inverse = simd.div_f64s(one, sum);
        let shifted = simd.sub_f64s(a[v], sigma[v]);
        let next = simd.negate_mul_add_e_f64s(b[v], d_below[v], simd.mul_f64s(shifted, d[v]));
        let next_gamma = simd.mul_f64s(next, simd.mul_f64s(d[v], inverse));
        let is_split = simd.less_than_or_equal_f64s(b[v], negligible);
        let is_usual = simd.and_m64s(simd.less_than_f64s(small, sum), simd.less_than_f64s(sum, large));
        let odd = simd.or_m64s(is_split, simd.not_m64s(is_usual));
        let before = (gamma[v], a[v]);
        b[v] = simd.mul_f64s(sine[v], simd.mul_f64s(sum, inverse_below[v]));
        (d_below[v], d[v]) = (d[v], next);
        (sum_below[v], inverse_below[v], gamma[v]) = (sum, inverse, next_gamma);
        sine[v] = simd.mul_f64s(weighted, inverse);
        if simd.first_true_m64s(odd) < S::F64_LANES {
            // Sums out of range are rescaled by a power of two; negligible squares begin a new block.
            let zero = simd.splat_f64s(0.0);
            let unit = simd.select_f64s(simd.less_than_f64s(large, sum), small, one);
            let unit = simd.select_f64s(simd.less_than_f64s(sum, small), large, unit);
            let sum = simd.mul_f64s(sum, simd.mul_f64s(unit, unit));
            let pick = |new, old| simd.select_f64s(is_split, new, old);
            d[v] = pick(shifted, simd.mul_f64s(d[v], unit));
            d_below[v] = pick(one, simd.mul_f64s(d_below[v], unit));
            sum_below[v] = pick(one, sum);
            inverse_below[v] = simd.div_f64s(one, sum_below[v]);
            gamma[v] = pick(shifted, gamma[v]);
            sine[v] = pick(zero, sine[v]);
        }
        a[v] = simd.add_f64s(before.0, simd.sub_f64s(before.1, gamma[v]));
    }
    (a, b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::dispatch;
    use crate::kernels::simd::tests::on_every_path;

    /// Does one sweep by plane rotations of the dense matrix: the QL step `T - sigma = Q L`, `L Q + sigma`.
    fn reference(diagonal: &[f64], squares: &[f64], sigma: f64) -> (Vec<f64>, Vec<f64>) {
        let n = diagonal.len();
        let mut t = nalgebra::DMatrix::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => diagonal[i] - sigma,
            1 => squares[i.min(j)].sqrt(),
            _ => 0.0,
        });
        let mut rotations = Vec::new();
        for i in (0..n - 1).rev() {
            // Rotate rows i and i + 1 to clear entry (i, i + 1).
            let (x, y) = (t[(i + 1, i + 1)], t[(i, i + 1)]);
            let (c, s) = (x / x.hypot(y), y / x.hypot(y));
            for j in 0..n {
                let (upper, lower) = (t[(i, j)], t[(i + 1, j)]);
                (t[(i, j)], t[(i + 1, j)]) = (c * upper - s * lower, s * upper + c * lower);
            }
            rotations.push((i, c, s));
        }
        for (i, c, s) in rotations {
            for j in 0..n {
                let (left, right) = (t[(j, i)], t[(j, i + 1)]);
                (t[(j, i)], t[(j, i + 1)]) = (c * left - s * right, s * left + c * right);
            }
        }
        let diagonal = (0..n).map(|i| t[(i, i)] + sigma).collect();
        (diagonal, (1..n).map(|i| t[(i, i - 1)] * t[(i - 1, i)]).collect())
    }

    /// Returns pseudo-random entries near 1.
    fn entries(n: usize, seed: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 131 + i * i * 7 + seed) % 97) as f64 / 97.0 + 0.1).collect()
    }

    fn swept(mut diagonal: Vec<f64>, mut squares: Vec<f64>, shifts: [f64; SWEEPS]) -> (Vec<f64>, Vec<f64>) {
        dispatch(Sweeps { diagonal: &mut diagonal, squares: &mut squares, shifts, negligible: 1e-40 });
        (diagonal, squares)
    }

    fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (x, y)) in found.iter().zip(expected).enumerate() {
            assert!((x - y).abs() <= tolerance, "entry {i}: {x} {y}");
        }
    }

    #[test]
    fn pipelined_sweeps_equal_consecutive_sweeps() {
        // Shifts outside of the spectrum, so that rounding errors do not grow on either side.
        let shifts = [-2.0, 4.5, -3.0, 5.0, -2.5, 6.0, -4.0, 7.0];
        for n in [2, 3, 8, 9, 24, 25, 60] {
            let (diagonal, squares) = (entries(n, 3), entries(n - 1, 50));
            let mut expected = (diagonal.clone(), squares.clone());
            for sigma in shifts {
                expected = reference(&expected.0, &expected.1, sigma);
            }
            on_every_path(|_| {
                let (a, b) = swept(diagonal.clone(), squares.clone(), shifts);
                assert_close(&a, &expected.0, 1e-12);
                assert_close(&b, &expected.1, 1e-12);
            });
        }
    }

    #[test]
    fn blocks_are_swept_independently() {
        let shifts = [-2.0, 4.5, -3.0, 5.0, -2.5, 6.0, -4.0, 7.0];
        let (diagonal, mut squares) = (entries(40, 3), entries(39, 50));
        for split in [0, 10, 11, 30, 38] {
            squares[split] = 0.0;
        }
        on_every_path(|_| {
            let (a, b) = swept(diagonal.clone(), squares.clone(), shifts);
            for block in [0..1, 1..11, 11..12, 12..31, 31..39, 39..40] {
                let inner = block.start..block.end - 1;
                let alone = swept(diagonal[block.clone()].to_vec(), squares[inner.clone()].to_vec(), shifts);
                assert_close(&a[block], &alone.0, 1e-14);
                assert_close(&b[inner], &alone.1, 1e-14);
            }
            assert!([0, 10, 11, 30, 38].iter().all(|split| b[*split] == 0.0));
        });
    }

    /// Exact shifts make determinants zero; sums over thousands of steps leave the range of numbers.
    #[test]
    fn exact_shifts_and_long_blocks() {
        for (n, off_diagonal) in [(3usize, 1.0), (30, 1.0), (3000, 1.0), (3000, 1e-3), (3000, 1e-16)] {
            on_every_path(|_| {
                let (a, b) = swept(vec![0.0; n], vec![off_diagonal * off_diagonal; n - 1], [0.0; SWEEPS]);
                assert!(a.iter().chain(&b).all(|x| x.is_finite()), "order {n}, {off_diagonal}");
                // Trace and Frobenius norm are invariants.
                assert!(a.iter().sum::<f64>().abs() <= 1e-12 * n as f64 * off_diagonal);
                let squares = a.iter().map(|x| x * x).sum::<f64>() + 2.0 * b.iter().sum::<f64>();
                let expected = 2.0 * (n as f64 - 1.0) * off_diagonal * off_diagonal;
                assert!((squares / expected - 1.0).abs() < 1e-11, "order {n}, {off_diagonal}: {squares}");
            });
        }
    }
}
