//! Reduction of a dense symmetric matrix to a band.
//!
//! `A = Q B Q^T` with `B` of half-bandwidth `w` ([`WIDTH`]), by blocked Householder reflections. A panel of
//! `w` columns is factored below its diagonal block, `P = (I - V T V^T) R`; the rest becomes
//!
//! ```text
//! Q^T A Q = A - V W^T - W V^T,   W = X - V (T^T V^T X) / 2,   X = A V T
//! ```
//!
//! `A V` and the update are `2 n^2 w` operations each and run at the speed of GEMM: `4/3 n^3` in all,
//! where the one-stage reduction does half of them at the speed of memory. The update that one panel leaves
//! and the product that the next one needs are done strip by strip in one pass over the lower triangle, so
//! that a strip, once in cache, serves both; only the next panel itself is brought up to date before. Blocks
//! on the diagonal are kept whole, as products with a triangle would take longer than the other half.

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::matmul::matmul;
use faer::linalg::{temp_mat_scratch, temp_mat_zeroed};
use faer::mat::AsMatMut;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::eigen::band_layout::{WIDTH, position};
use crate::eigen::panel_qr::{factor_panel, factor_panel_scratch};
use crate::exec::parallel::Strategy;
use crate::exec::strips::{STRIP, each_column_strip, each_row_strip};
use crate::kernels::number::{Number, padded};
use crate::kernels::simd::LINE;

/// Strips that share the sums of their products at least, and groups of such strips at most. Both depend on
/// shapes alone, and so do the bits of a result.
const SHARED: usize = 2;
const MOST_GROUPS: usize = 16;

/// Rows of a strip up to which it pays to copy what its block on the diagonal holds twice: in tall matrices every
/// column is in a page of its own.
const SHORT: usize = 1536;

/// Groups that the strips of `columns` columns are dealt to.
fn groups(columns: usize) -> usize {
    columns.div_ceil(STRIP).div_ceil(SHARED).min(MOST_GROUPS)
}

/// The memory that [`reduce_to_band`] of a matrix of order `n` needs.
#[must_use]
pub fn reduce_to_band_scratch<T: Number>(n: usize) -> StackReq {
    let updates = temp_mat_scratch::<T>(n, 3 * WIDTH);
    let reflections = StackReq::new_aligned::<T>(padded::<T>(n) * WIDTH, LINE);
    let products = temp_mat_scratch::<T>(WIDTH, n * groups(n));
    let small = temp_mat_scratch::<T>(WIDTH, WIDTH).array(3);
    StackReq::all_of(&[updates, reflections, products, small, factor_panel_scratch::<T>()])
}

/// Reduces the symmetric matrix in the lower triangle of `a`, `(n, n)`, and writes `band`, of
/// [`storage(n)`](crate::eigen::band_layout::storage) numbers. What `a` held is lost.
///
/// Under [`Strategy::Together`] this must run inside the thread pool that it may use.
pub fn reduce_to_band<T: Number>(
    mut a: MatMut<'_, T>,
    strategy: Strategy,
    band: &mut [T],
    stack: &mut MemStack,
) {
    let n = a.nrows();
    band.fill(T::default());
    complete_diagonal_blocks(a.rb_mut());
    let (mut v_w_v, stack) = temp_mat_zeroed::<T, _, _>(n, 3 * WIDTH, stack);
    let (mut v, stack) = stack.make_aligned_with(padded::<T>(n) * WIDTH, LINE, |_| T::default());
    let (mut products, stack) = temp_mat_zeroed::<T, _, _>(WIDTH, n * groups(n), stack);
    let mut updates = Updates { v_w_v: v_w_v.as_mat_mut(), strategy };
    for panel in (0..n).step_by(WIDTH) {
        reduce_panel(a.rb_mut(), panel, &mut updates, (&mut v, products.as_mat_mut()), stack);
        store_columns(a.rb(), panel, band);
    }
}

/// Writes the lower triangle of every block on the diagonal to where it belongs above.
fn complete_diagonal_blocks<T: Number>(mut a: MatMut<'_, T>) {
    let n = a.nrows();
    for j in 0..n {
        for i in j + 1..n.min((j / STRIP + 1) * STRIP) {
            a[(j, i)] = a[(i, j)];
        }
    }
}

/// Reduces the columns from `panel` on to those of a band, brings the others up to date with the panel
/// before, and notes what they owe to this one. `V` and the products with it are written to memory that all
/// panels use.
fn reduce_panel<T: Number>(
    mut a: MatMut<'_, T>,
    panel: usize,
    updates: &mut Updates<'_, T>,
    (v, products): (&mut [T], MatMut<'_, T>),
    stack: &mut MemStack,
) {
    let n = a.nrows();
    let width = WIDTH.min(n - panel);
    let own = a.rb_mut().submatrix_mut(panel, panel, n - panel, width);
    each_row_strip(own, updates.strategy, |first, strip| {
        updates.subtract(strip, panel + first, panel);
    });
    let Some(below @ 1..) = (n - panel).checked_sub(WIDTH) else { return };
    let (first, count) = (panel + WIDTH, below.min(WIDTH));
    let (done, rest) = a.split_at_col_mut(first);
    let (mut t, stack) = temp_mat_zeroed::<T, _, _>(count, count, stack);
    let mut t = t.as_mat_mut();
    let stride = padded::<T>(below);
    let v = &mut v[..stride * WIDTH];
    factor_panel(done.submatrix_mut(first, panel, below, WIDTH), v, t.rb_mut(), stack);
    let v = MatRef::from_column_major_slice_with_stride(v, below, count, stride);
    let t = t.rb();

    let products = products.subcols_mut(0, below * groups(below));
    let products = updates.update_and_multiply(rest, first, v, products);
    updates.note(products.rb(), v, t, first, stack);
}

/// What is still to be subtracted from columns to come: `V W^T + W V^T`, the product of `[V W]` and
/// `[W V]^T`, which lie side by side in `[V W V]`.
struct Updates<'a, T> {
    v_w_v: MatMut<'a, T>,
    strategy: Strategy,
}

/// Columns of the matrix from their block on the diagonal down, and the index of their first.
struct Strip<'a, T> {
    first: usize,
    columns: MatMut<'a, T>,
}

/// Strips that one thread works on, and the sums of their products.
struct Share<'a, T> {
    strips: Vec<Strip<'a, T>>,
    sums: MatMut<'a, T>,
}

impl<T: Number> Updates<'_, T> {
    /// Brings a block up to date whose first entry is `(row, col)`.
    fn subtract(&self, block: MatMut<'_, T>, row: usize, col: usize) {
        let left = self.v_w_v.rb().subcols(0, 2 * WIDTH).subrows(row, block.nrows());
        let right = self.v_w_v.rb().subcols(WIDTH, 2 * WIDTH).subrows(col, block.ncols());
        matmul(block, Accum::Add, left, right.transpose(), -T::of(1.0), Par::Seq);
    }

    /// Brings a strip up to date, whose block on the diagonal begins at `start`. In a short one that block is much
    /// of it, and a quarter of the block, above the diagonal, is copied from below.
    fn subtract_symmetric(&self, strip: MatMut<'_, T>, start: usize) {
        let half = strip.ncols() / 2;
        if strip.nrows() > SHORT {
            return self.subtract(strip, start, start);
        }
        let (above, mut below) = strip.split_at_row_mut(half);
        let (own, right) = above.split_at_col_mut(half);
        self.subtract(own, start, start);
        self.subtract(below.rb_mut(), start + half, start);
        copy_transposed(below.rb().submatrix(0, 0, right.ncols(), half), right);
    }

    /// Brings the columns from `first` on up to date, and returns `V^T A` of what they are then, in the memory of
    /// `products`.
    fn update_and_multiply<'p>(
        &self,
        rest: MatMut<'_, T>,
        first: usize,
        v: MatRef<'_, T>,
        mut products: MatMut<'p, T>,
    ) -> MatMut<'p, T> {
        let (below, count) = (v.nrows(), groups(v.nrows()));
        let mut dealt: Vec<Share<'_, T>> = Vec::with_capacity(count);
        let mut rest_of_sums = products.rb_mut();
        for _ in 0..count {
            let (sums, others) = rest_of_sums.split_at_col_mut(below);
            dealt.push(Share { strips: Vec::new(), sums });
            rest_of_sums = others;
        }
        for (i, strip) in strips(rest, first).into_iter().enumerate() {
            dealt[i % count].strips.push(strip);
        }
        let work = |Share { strips, mut sums }: Share<'_, T>| {
            for (k, Strip { first: start, mut columns }) in strips.into_iter().enumerate() {
                self.subtract_symmetric(columns.rb_mut(), start);
                // The first is the longest: what it has nothing to do with, the others have not either.
                let accum = if k == 0 { Accum::Replace } else { Accum::Add };
                if k == 0 {
                    sums.rb_mut().subcols_mut(0, start - first).fill(T::default());
                }
                add_products(columns.rb(), v, start - first, accum, sums.rb_mut());
            }
        };
        match self.strategy {
            Strategy::Together => dealt.into_par_iter().with_max_len(1).for_each(work),
            Strategy::Alone => dealt.into_iter().for_each(work),
        }
        let (mut total, others) = products.split_at_col_mut(below);
        let others = others.rb();
        each_column_strip(total.rb_mut(), STRIP, self.strategy, |start, mut strip| {
            for group in 1..count {
                strip += others.subcols((group - 1) * below + start, strip.ncols());
            }
        });
        total.subrows_mut(0, v.ncols())
    }

    /// Replaces what is due by the updates of a panel: its `V`, and `W` from `V^T A`, given as `products`.
    fn note(
        &mut self,
        products: MatRef<'_, T>,
        v: MatRef<'_, T>,
        t: MatRef<'_, T>,
        first: usize,
        stack: &mut MemStack,
    ) {
        let (count, rows) = products.shape();
        if count < WIDTH {
            self.v_w_v.fill(T::default()); // What the other columns held is done.
        }
        let (v_place, others) = self.v_w_v.rb_mut().subrows_mut(first, rows).split_at_col_mut(WIDTH);
        let (w, v_again) = others.split_at_col_mut(WIDTH);
        v_place.subcols_mut(0, count).copy_from(v);
        v_again.subcols_mut(0, count).copy_from(v);
        let mut w = w.subcols_mut(0, count);
        each_row_strip(w.rb_mut(), self.strategy, |start, strip| {
            let own = products.subcols(start, strip.nrows()).transpose();
            matmul(strip, Accum::Replace, own, t, T::of(1.0), Par::Seq);
        });
        let (mut inner, stack) = temp_mat_zeroed::<T, _, _>(count, count, stack);
        let (mut half, _) = temp_mat_zeroed::<T, _, _>(count, count, stack);
        let (mut inner, mut half) = (inner.as_mat_mut(), half.as_mat_mut());
        matmul(inner.rb_mut(), Accum::Replace, v.transpose(), w.rb(), T::of(1.0), Par::Seq);
        matmul(half.rb_mut(), Accum::Replace, t.transpose(), inner.rb(), T::of(0.5), Par::Seq);
        let half = half.rb();
        each_row_strip(w, self.strategy, |start, strip| {
            let own = v.subrows(start, strip.nrows());
            matmul(strip, Accum::Add, own, half, T::of(-1.0), Par::Seq);
        });
    }
}

/// In runs of eight, as many as a cache line has: columns may begin in one set of the cache, all of them.
fn copy_transposed<T: Number>(from: MatRef<'_, T>, mut to: MatMut<'_, T>) {
    let (rows, cols) = to.shape();
    for first in (0..cols).step_by(8) {
        for i in 0..rows {
            for j in first..cols.min(first + 8) {
                to[(i, j)] = from[(j, i)];
            }
        }
    }
}

/// The columns from `first` on in strips whose diagonal blocks are kept whole.
fn strips<T: Number>(rest: MatMut<'_, T>, first: usize) -> Vec<Strip<'_, T>> {
    let n = rest.nrows();
    let mut strips = Vec::new();
    let (mut rest, mut start) = (rest, first);
    while start < n {
        let width = ((start / STRIP + 1) * STRIP).min(n) - start;
        let (strip, others) = rest.split_at_col_mut(width);
        strips.push(Strip { first: start, columns: strip.subrows_mut(start, n - start) });
        (rest, start) = (others, start + width);
    }
    strips
}

/// What a strip of `A` has to do with `V^T A`: its own columns, and by symmetry the rows below its diagonal block, as
/// columns. `start` is the row of `V` that the strip begins with.
fn add_products<T: Number>(
    strip: MatRef<'_, T>,
    v: MatRef<'_, T>,
    start: usize,
    accum: Accum,
    mut sums: MatMut<'_, T>,
) {
    let (count, width, below) = (v.ncols(), strip.ncols(), strip.nrows() - strip.ncols());
    let mut add = |first: usize, left: MatRef<'_, T>, right: MatRef<'_, T>| {
        let target = sums.rb_mut().submatrix_mut(0, first, count, right.ncols());
        matmul(target, accum, left, right, T::of(1.0), Par::Seq);
    };
    add(start, v.subrows(start, strip.nrows()).transpose(), strip);
    let own = v.subrows(start, width).transpose();
    add(start + width, own, strip.subrows(width, below).transpose());
}

/// Stores a panel's reduced columns, both triangles of them.
fn store_columns<T: Number>(a: MatRef<'_, T>, panel: usize, band: &mut [T]) {
    let n = a.nrows();
    for j in panel..n.min(panel + WIDTH) {
        for i in j..n.min(j + WIDTH + 1) {
            let value = a[(i, j)];
            band[position(i, j)] = value;
            if i - j < WIDTH {
                band[position(j, i)] = value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use proptest::prelude::{ProptestConfig, proptest};

    use super::*;
    use crate::eigen::band_layout::storage;
    use crate::exec::parallel;
    use crate::exec::scratch::Scratch;

    /// Symmetric, dense, from a small linear congruence; NaN above the diagonal, which must not be read.
    fn symmetric<T: Number>(n: usize, seed: usize) -> Mat<T> {
        Mat::from_fn(n, n, |i, j| {
            let value = ((i * 131 + j * 31 + i * j * 7 + seed) % 97) as f64 / 97.0 - 0.4;
            T::of(if i < j { f64::NAN } else { value })
        })
    }

    fn reduced<T: Number>(mut a: Mat<T>, strategy: Strategy) -> Vec<T> {
        let n = a.nrows();
        // Memory that holds NaN, to show that all of it is written.
        let mut band = vec![T::of(f64::NAN); storage(n)];
        let mut scratch = Scratch::default();
        let stack = scratch.stack(reduce_to_band_scratch::<T>(n)).unwrap();
        reduce_to_band(a.as_mut(), strategy, &mut band, stack);
        band
    }

    fn eigenvalues(n: usize, at: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        let matrix = nalgebra::DMatrix::from_fn(n, n, |i, j| at(i.max(j), i.min(j)));
        let mut values: Vec<f64> = matrix.symmetric_eigenvalues().iter().copied().collect();
        values.sort_by(f64::total_cmp);
        values
    }

    fn assert_similar<T: Number>(n: usize, seed: usize, epsilon: f64) {
        let a = symmetric::<T>(n, seed);
        let band = reduced(a.clone(), Strategy::Alone);
        let expected = eigenvalues(n, |i, j| a[(i, j)].to_f64());
        let found = eigenvalues(n, |i, j| if i - j <= WIDTH { band[position(i, j)].to_f64() } else { 0.0 });
        let norm = expected.iter().fold(0.0f64, |norm, x| norm.max(x.abs()));
        for (x, y) in found.iter().zip(&expected) {
            assert!((x - y).abs() <= 8.0 * (n as f64).sqrt() * epsilon * norm, "order {n}: {x} {y}");
        }
        for j in 0..n {
            for i in j..n.min(j + WIDTH) {
                assert_eq!(band[position(i, j)].to_f64().to_bits(), band[position(j, i)].to_f64().to_bits());
            }
            let bulge = &band[position(j + WIDTH + 1, j)..position(j, j) + 2 * WIDTH];
            assert!(bulge.iter().all(|x| *x == T::default()), "room for bulges is empty");
        }
    }

    #[test]
    fn eigenvalues_survive_around_every_edge() {
        for n in [1, 2, 31, 32, 33, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 160, 161, 200, 290] {
            assert_similar::<f64>(n, n, f64::EPSILON);
            assert_similar::<f32>(n, n, f64::from(f32::EPSILON));
        }
    }

    #[test]
    fn strategies_agree_to_the_bit_on_any_number_of_threads() {
        let n = 300;
        let alone = reduced(symmetric::<f64>(n, 5), Strategy::Alone);
        for threads in [1, 3] {
            let pool = parallel::pool(threads).unwrap();
            let together = pool.install(|| reduced(symmetric::<f64>(n, 5), Strategy::Together));
            assert!(alone.iter().zip(&together).all(|(x, y)| x.to_bits() == y.to_bits()));
        }
    }

    /// Trace and Frobenius norm are invariants of the similarity.
    #[test]
    fn strips_that_are_not_short() {
        let n = SHORT + 2 * STRIP + 5;
        let a = symmetric::<f64>(n, 3);
        let band = reduced(a.clone(), Strategy::Alone);
        let twice = |i: usize, j: usize| if i == j { 1.0 } else { 2.0 };
        let sums = |width: usize, at: &dyn Fn(usize, usize) -> f64| {
            let trace: f64 = (0..n).map(|i| at(i, i)).sum();
            let lower = (0..n).flat_map(|j| (j..n.min(j + width + 1)).map(move |i| (i, j)));
            (trace, lower.map(|(i, j)| twice(i, j) * at(i, j).powi(2)).sum::<f64>())
        };
        let (trace, squares) = sums(n, &|i, j| a[(i, j)]);
        let (found_trace, found_squares) = sums(WIDTH, &|i, j| band[position(i, j)]);
        assert!((found_trace - trace).abs() < 1e-13 * squares.sqrt() * (n as f64).sqrt());
        // A sum of more than a million squares, one after the other.
        assert!((found_squares / squares - 1.0).abs() < 1e-11);
    }

    #[test]
    fn low_rank_and_zero() {
        for n in [40, 129, 200] {
            let zero = reduced(Mat::<f64>::zeros(n, n), Strategy::Alone);
            assert!(zero.iter().all(|x| *x == 0.0));
            // All ones: one eigenvalue n, the others 0.
            let band = reduced(Mat::<f64>::from_fn(n, n, |_, _| 1.0), Strategy::Alone);
            let found = eigenvalues(n, |i, j| if i - j <= WIDTH { band[position(i, j)] } else { 0.0 });
            assert!((found[n - 1] - n as f64).abs() < 1e-12 * n as f64);
            assert!(found[..n - 1].iter().all(|x| x.abs() < 1e-12 * n as f64));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_order(n in 1usize..260, seed in 0usize..97) {
            assert_similar::<f64>(n, seed, f64::EPSILON);
        }
    }
}
