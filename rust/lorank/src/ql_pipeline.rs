//! Eight sweeps of the QL iteration at a time, one behind the other, in the lanes of vectors.
//!
//! A sweep ([`root_free_ql`](crate::root_free_ql)) is a chain in which a step waits for the one before. But step
//! `i` of a sweep leaves entries `i + 1` as they are for good, so that a second sweep, whose shift is known,
//! can follow: lane `k` is [`LAG`] steps behind lane `k - 1`. What a lane leaves at one time is what the next
//! lane needs [`LAG`]` - 1` times later, and entries travel from the memory through all lanes and back:
//!
//! ```text
//! memory -> lane 0 -> lane 1 -> ... -> lane 7 -> memory
//! ```
//!
//! Around the matrix the lanes find zeros. A lane that meets a square of zero, there or because a sweep made it
//! negligible, leaves the block that it was in and begins another.

// Measured: left to the compiler's judgement, every vector instruction becomes a call, 20 times slower.
#![allow(clippy::inline_always)]

use pulp::{Simd, WithSimd};

/// Sweeps at a time.
pub(crate) const SWEEPS: usize = 8;

/// Steps that a sweep is behind the one before, 2 at least. With 2, a step would wait for the one before again.
const LAG: usize = 3;

/// Determinants grow as powers of the norm, sums as their squares; a step moves a sum by far less than the
/// square of this.
pub(crate) const LARGE: f64 = (1u128 << 80) as f64;
pub(crate) const SMALL: f64 = 1.0 / LARGE;

/// Sweeps with given shifts over one block.
pub(crate) struct Sweeps<'a> {
    pub(crate) diagonal: &'a mut [f64],
    /// Squares of the off-diagonal: one less.
    pub(crate) squares: &'a mut [f64],
    pub(crate) shifts: [f64; SWEEPS],
    /// A square that counts as zero.
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

/// A number for each lane.
type Lanes<S, const VECTORS: usize> = [<S as Simd>::f64s; VECTORS];

/// Where each sweep has got to: the names of [`root_free_ql`](crate::root_free_ql).
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
        // Entries on their way from lane to lane, the oldest first.
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

/// Moves every number one lane on; `x` comes first.
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

/// One step of each sweep, from entries `(a_i, b_i)` to `(a_(i+1), b_(i+1))`.
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
            // A power of two for sums that leave the range; a new block.
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
