//! The updates that the panels of a band reduction leave for the columns after them.

use faer::dyn_stack::MemStack;
use faer::linalg::matmul::matmul;
use faer::linalg::temp_mat_zeroed;
use faer::mat::AsMatMut;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::eigen::band_layout::WIDTH;
use crate::exec::parallel::Strategy;
use crate::exec::strips::{STRIP, each_column_strip, each_row_strip};
use crate::kernels::number::Number;

/// Strips that share the sums of their products at least, and groups of such strips at most. Both depend on
/// shapes alone, and so do the bits of a result.
const SHARED: usize = 2;
const MOST_GROUPS: usize = 16;

/// Rows of a strip up to which it pays to copy what its block on the diagonal holds twice: in tall matrices every
/// column is in a page of its own.
pub(super) const SHORT: usize = 1536;

/// Groups that the strips of `columns` columns are dealt to.
pub(super) fn groups(columns: usize) -> usize {
    columns.div_ceil(STRIP).div_ceil(SHARED).min(MOST_GROUPS)
}

/// What is still to be subtracted from columns to come: `V W^T + W V^T`, the product of `[V W]` and
/// `[W V]^T`, which lie side by side in `[V W V]`.
pub(super) struct Updates<'a, T> {
    pub v_w_v: MatMut<'a, T>,
    pub strategy: Strategy,
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
    pub(super) fn subtract(&self, block: MatMut<'_, T>, row: usize, col: usize) {
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
    pub(super) fn update_and_multiply<'p>(
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
    pub(super) fn note(
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
