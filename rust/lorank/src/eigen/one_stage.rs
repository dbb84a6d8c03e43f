//! Reduction of a small symmetric matrix to tridiagonal form, `A = Q T Q^T`, with one pass over it per
//! reflection.
//!
//! Reflection `k` maps the part of row `k` beyond the diagonal onto its first entry, and is applied from both
//! sides:
//!
//! ```text
//! H_k = I - tau v v^T     w = tau A v - tau^2 / 2 (v^T A v) v     H_k A H_k = A - v w^T - w v^T
//! ```
//!
//! Both the update by `v w^T + w v^T` and the product with a vector read the whole matrix for few operations.
//! One pass therefore does both: it updates a row with the previous reflection and multiplies it with the
//! next `v`, which depends on a single updated row. Both triangles are stored, so that all work is on rows.
//! This takes `2 n^3` operations instead of `4/3 n^3`, and pays for matrices that fit into the level-1 or
//! level-2 cache.

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

use faer::dyn_stack::{MemStack, StackReq};
use pulp::{Simd, WithSimd};

use crate::Result;
use crate::eigen::panel_qr::{Reflection, dot, subtract};
use crate::eigen::tridiagonal::Tridiagonal;
use crate::exec::memory::with_capacity;
use crate::kernels::number::{Number, padded};
use crate::kernels::simd::{LINE, dispatch};

/// Number of rows processed together, on machines with 32 registers.
const BESIDE: usize = 4;

/// Returns the memory for [`reduce_in_one_stage`].
pub(crate) fn one_stage_scratch<T: Number>(n: usize) -> StackReq {
    StackReq::new_aligned::<T>(4 * padded::<T>(n), LINE)
}

/// `Q = H_0 H_1 ... H_(n-2)`. Reflection `H_k` leaves the first `k + 1` entries unchanged.
#[derive(Clone, Debug)]
pub(crate) struct Reflections<T> {
    order: usize,
    taus: Vec<T>,
    /// The vectors one after the other, each from its first non-zero entry on, which is 1.
    vectors: Vec<T>,
}

/// Reduces a symmetric matrix of order `n` in place. It is row-major, with rows and columns [`padded`] with
/// zeros, and is overwritten. Its entries must be far from the ends of the range of numbers. Stores the
/// reflections in `reflections`, if given.
pub(crate) fn reduce_in_one_stage<T: Number>(
    a: &mut [T],
    n: usize,
    reflections: Option<&mut Reflections<T>>,
    stack: &mut MemStack,
) -> Tridiagonal {
    let mut tridiagonal =
        Tridiagonal { diagonal: Vec::with_capacity(n), off_diagonal: Vec::with_capacity(n) };
    let (mut memory, _) = stack.make_aligned_with(4 * padded::<T>(n), LINE, |_| T::default());
    dispatch(Reduce { a, n, memory: &mut memory, tridiagonal: &mut tridiagonal, reflections });
    tridiagonal
}

impl<T: Number> Reflections<T> {
    /// Allocates memory for the reflections of a matrix of order `n`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn new(n: usize) -> Result<Self> {
        const MEMORY: &str = "the reflections of a small matrix";
        Ok(Self { order: n, taus: with_capacity(n, MEMORY)?, vectors: with_capacity(n * n / 2, MEMORY)? })
    }

    /// Replaces `Z` by `Q Z`. `Z (n, width)` is row-major, with `width` a multiple of [`Number::WIDEST`].
    pub(crate) fn apply(&self, z: &mut [T], width: usize) {
        dispatch(Apply { reflections: self, z, width });
    }
}

struct Reduce<'a, T> {
    a: &'a mut [T],
    n: usize,
    /// Memory for four vectors.
    memory: &'a mut [T],
    tridiagonal: &'a mut Tridiagonal,
    reflections: Option<&'a mut Reflections<T>>,
}

impl<T: Number> WithSimd for Reduce<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, n, memory, tridiagonal, mut reflections } = self;
        let stride = padded::<T>(n);
        let (v, others) = memory.split_at_mut(stride);
        let (w, others) = others.split_at_mut(stride);
        let (next, product) = others.split_at_mut(stride);
        for k in 0..n {
            let row = &mut a[k * stride..][..stride];
            subtract::<T, S>(simd, row, w, v[k]);
            subtract::<T, S>(simd, row, v, w[k]);
            tridiagonal.diagonal.push(row[k].to_f64());
            if k + 1 == n {
                return;
            }
            next[..k + 2].fill(T::default());
            next[k + 2..].copy_from_slice(&row[k + 2..]);
            let reflection = Reflection::of(row[k + 1], dot::<T, S>(simd, next, next));
            tridiagonal.off_diagonal.push(reflection.beta.to_f64());
            for x in &mut *next {
                *x *= reflection.scale;
            }
            next[k + 1] = T::of(1.0);
            if S::REGISTER_COUNT >= 32 {
                pass::<BESIDE, T, S>(simd, a, k, (v, w), next, product);
            } else {
                pass::<{ BESIDE / 2 }, T, S>(simd, a, k, (v, w), next, product);
            }
            product[..=k].fill(T::default());
            let tau = reflection.tau;
            let half = T::of(0.5) * tau * tau * dot::<T, S>(simd, product, next);
            for ((w, x), next) in w.iter_mut().zip(&*product).zip(&*next) {
                *w = tau * *x - half * *next;
            }
            v.copy_from_slice(next);
            if let Some(kept) = &mut reflections {
                kept.taus.push(tau);
                kept.vectors.extend_from_slice(&v[k + 1..n]);
            }
        }
    }
}

/// Computes `A -= v w^T + w v^T` and then `A next`, for the rows from `k + 1` on and the columns from `k` on.
/// Other entries of the product are unspecified.
#[inline(always)]
fn pass<const ROWS: usize, T: Number, S: Simd>(
    simd: S,
    a: &mut [T],
    k: usize,
    (v, w): (&[T], &[T]),
    next: &[T],
    product: &mut [T],
) {
    let stride = next.len();
    let (top, first) = ((k + 1) / ROWS * ROWS, k / T::WIDEST * T::WIDEST);
    let [v_beyond, w_beyond, next] = [&v[first..], &w[first..], &next[first..]].map(T::vectors::<S>);
    let factors = v[top..].chunks_exact(ROWS).zip(w[top..].chunks_exact(ROWS));
    let tiles = a[top * stride..].chunks_exact_mut(ROWS * stride);
    for ((rows, (v, w)), product) in tiles.zip(factors).zip(product[top..].chunks_exact_mut(ROWS)) {
        let mut lines: [&mut [T::Vector<S>]; ROWS] = std::array::from_fn(|_| &mut [][..]);
        for (line, row) in lines.iter_mut().zip(rows.chunks_exact_mut(stride)) {
            *line = T::vectors_mut::<S>(&mut row[first..]);
        }
        let sums = pass_tile::<ROWS, T, S>(simd, lines, (v, w_beyond), (w, v_beyond), next);
        for (product, sum) in product.iter_mut().zip(sums) {
            *product = T::sum(simd, sum);
        }
    }
}

/// Does a [`pass`] over some rows. Subtracts two vectors times a factor per row, and returns the products as
/// one sum per lane.
#[inline(always)]
fn pass_tile<const ROWS: usize, T: Number, S: Simd>(
    simd: S,
    mut rows: [&mut [T::Vector<S>]; ROWS],
    (factors, vector): (&[T], &[T::Vector<S>]),
    (other_factors, other): (&[T], &[T::Vector<S>]),
    next: &[T::Vector<S>],
) -> [T::Vector<S>; ROWS] {
    let count = next.len();
    // Equal lengths remove bounds checks from the loop.
    let (vector, other) = (&vector[..count], &other[..count]);
    for row in &mut rows {
        let whole = std::mem::take(row);
        *row = &mut whole[..count];
    }
    let zero = T::splat(simd, T::default());
    let (mut one_by, mut other_by, mut sums) = ([zero; ROWS], [zero; ROWS], [zero; ROWS]);
    for i in 0..ROWS {
        one_by[i] = T::splat(simd, -factors[i]);
        other_by[i] = T::splat(simd, -other_factors[i]);
    }
    for j in 0..count {
        for i in 0..ROWS {
            let x = T::mul_add(simd, one_by[i], vector[j], rows[i][j]);
            let x = T::mul_add(simd, other_by[i], other[j], x);
            rows[i][j] = x;
            sums[i] = T::mul_add(simd, x, next[j], sums[i]);
        }
    }
    sums
}

struct Apply<'a, T> {
    reflections: &'a Reflections<T>,
    z: &'a mut [T],
    width: usize,
}

impl<T: Number> WithSimd for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let lanes = T::lanes::<S>();
        let mut first = 0;
        while first < self.width {
            // Several vectors of columns at a time, as consecutive additions to one sum would wait for each
            // other.
            first += match (self.width - first) / lanes {
                4.. => self.columns::<4, S>(simd, first),
                2..4 => self.columns::<2, S>(simd, first),
                _ => self.columns::<1, S>(simd, first),
            } * lanes;
        }
    }
}

impl<T: Number> Apply<'_, T> {
    /// Applies all reflections to the columns of `VECTORS` vectors, and returns `VECTORS`.
    #[inline(always)]
    fn columns<const VECTORS: usize, S: Simd>(&mut self, simd: S, first: usize) -> usize {
        let Self { reflections: Reflections { order, taus, vectors }, z, width } = self;
        let beyond = first + VECTORS * T::lanes::<S>();
        let mut end = vectors.len();
        for (k, tau) in taus.iter().enumerate().rev() {
            let v = &vectors[end - (*order - 1 - k)..end];
            end -= v.len();
            let rows = &mut z[(k + 1) * *width..*order * *width];
            let mut sums = [T::splat(simd, T::default()); VECTORS];
            for (row, x) in rows.chunks_exact(*width).zip(v) {
                let x = T::splat(simd, *x);
                for (sum, place) in sums.iter_mut().zip(T::vectors::<S>(&row[first..beyond])) {
                    *sum = T::mul_add(simd, x, *place, *sum);
                }
            }
            let factor = T::splat(simd, -*tau);
            for sum in &mut sums {
                *sum = T::times(simd, *sum, factor);
            }
            for (row, x) in rows.chunks_exact_mut(*width).zip(v) {
                let x = T::splat(simd, *x);
                for (place, sum) in T::vectors_mut::<S>(&mut row[first..beyond]).iter_mut().zip(&sums) {
                    *place = T::mul_add(simd, x, *sum, *place);
                }
            }
        }
        VECTORS
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use faer::dyn_stack::MemBuffer;
    use proptest::prelude::{ProptestConfig, proptest};

    use super::*;
    use crate::kernels::simd::tests::on_every_path;

    fn dense(i: usize, j: usize) -> f64 {
        ((i * 131 + j * 31 + i * j * 7) % 97) as f64 / 97.0 - 0.4
    }

    /// Checks that `Q` is orthogonal and that `Q T Q^T` is the matrix.
    fn assert_reduced<T: Number>(n: usize, at: impl Fn(usize, usize) -> f64) {
        let a = Mat::from_fn(n, n, |i, j| T::of(at(i.max(j), i.min(j))).to_f64());
        let stride = padded::<T>(n);
        on_every_path(|path| {
            let mut rows = vec![T::default(); stride * stride];
            for i in 0..n {
                (0..n).for_each(|j| rows[i * stride + j] = T::of(a[(i, j)]));
            }
            let mut memory = MemBuffer::new(one_stage_scratch::<T>(n));
            let (stack, mut reflections) = (MemStack::new(&mut memory), Reflections::new(n).unwrap());
            let t = reduce_in_one_stage(&mut rows, n, Some(&mut reflections), stack);
            assert_eq!((t.diagonal.len(), t.off_diagonal.len()), (n, n.saturating_sub(1)));
            let mut q = vec![T::default(); n * stride];
            (0..n).for_each(|i| q[i * stride + i] = T::of(1.0));
            reflections.apply(&mut q, stride);
            let q = Mat::from_fn(n, n, |i, j| q[i * stride + j].to_f64());
            let t = Mat::from_fn(n, n, |i, j| match i.abs_diff(j) {
                0 => t.diagonal[i],
                1 => t.off_diagonal[i.min(j)],
                _ => 0.0,
            });
            let allowed = (16.0 + n as f64) * T::EPSILON;
            let off = (q.transpose() * &q - Mat::<f64>::identity(n, n)).norm_max();
            assert!(off <= allowed, "order {n}, {path:?}: Q^T Q is off by {off:e}");
            let off = (&q * t * q.transpose() - &a).norm_max();
            assert!(off <= allowed * a.norm_l2().max(1e-100), "order {n}, {path:?}: off by {off:e}");
        });
    }

    fn assert_both(n: usize, at: impl Fn(usize, usize) -> f64) {
        assert_reduced::<f64>(n, &at);
        assert_reduced::<f32>(n, &at);
    }

    #[test]
    fn matrices_of_every_order() {
        for n in (0..40).chain([63, 64, 65, 100]) {
            assert_both(n, dense);
        }
    }

    #[test]
    fn rows_without_entries_to_reflect() {
        for n in [1, 2, 3, 8, 21, 64] {
            assert_both(n, |_, _| 0.0);
            assert_both(n, |_, _| 1.0);
            assert_both(n, |i, j| if i == j { 2.0 - i as f64 } else { 0.0 });
            assert_both(n, |i, j| if i - j < 2 { dense(i, j) } else { 0.0 });
            assert_both(n, |i, j| if (i < n / 2) == (j < n / 2) { dense(i, j) } else { 0.0 });
            assert_both(n, |i, j| dense(i, j) * 0.5f64.powi(i32::try_from(i + j).unwrap()));
            assert_both(n, |i, j| dense(i, j) * if j % 2 == 0 { 1.0 } else { 1e-200 });
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_matrix(n in 1usize..130, seed in 0usize..97) {
            assert_both(n, |i, j| dense(i + seed, j + 3 * seed));
        }
    }
}
