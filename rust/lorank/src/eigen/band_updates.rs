//! Pending updates of the columns after a panel of a band reduction.

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

/// Least number of strips per group, and largest number of groups. The strips of a group share the sums of
/// their products. The groups depend on shapes alone, and so do the bits of a result.
const SHARED: usize = 2;
const MOST_GROUPS: usize = 16;

/// Largest number of rows of a strip for which copying the upper triangle of its diagonal block pays. In a
/// taller matrix every column lies in a page of its own.
pub(super) const SHORT: usize = 1536;

/// Returns the number of groups of the strips of `columns` columns.
pub(super) fn groups(columns: usize) -> usize {
    columns.div_ceil(STRIP).div_ceil(SHARED).min(MOST_GROUPS)
}

/// The pending update `V W^T + W V^T`, to be subtracted from the columns after a panel. It is the product of
/// `[V W]` and `[W V]^T`, which are adjacent in the stored `[V W V]`.
pub(super) struct Updates<'a, T> {
    pub v_w_v: MatMut<'a, T>,
    pub strategy: Strategy,
}

/// Columns of the matrix from their diagonal block down, and the index of the first column.
struct Strip<'a, T> {
    first: usize,
    columns: MatMut<'a, T>,
}

/// The strips of one group, and the sums of their products.
struct Share<'a, T> {
    strips: Vec<Strip<'a, T>>,
    sums: MatMut<'a, T>,
}

impl<T: Number> Updates<'_, T> {
    /// Subtracts the update from a block whose first entry is `(row, col)`.
    pub(super) fn subtract(&self, block: MatMut<'_, T>, row: usize, col: usize) {
        let left = self.v_w_v.rb().subcols(0, 2 * WIDTH).subrows(row, block.nrows());
        let right = self.v_w_v.rb().subcols(WIDTH, 2 * WIDTH).subrows(col, block.ncols());
        matmul(block, Accum::Add, left, right.transpose(), -T::of(1.0), Par::Seq);
    }

    /// Subtracts the update from a strip whose diagonal block begins at `start`. In a short strip, where the
    /// diagonal block is a large part, the quarter of the block above the diagonal is copied from below.
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

    /// Subtracts the update from the columns from `first` on, and returns `V^T A` with the updated `A`, in
    /// the memory of `products`.
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
                // The first strip of a group is the longest: the others contribute to parts of its range.
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

    /// Replaces the update by that of a panel, from its `V` and `products`, which is `V^T A`.
    pub(super) fn replace(
        &mut self,
        products: MatRef<'_, T>,
        v: MatRef<'_, T>,
        t: MatRef<'_, T>,
        first: usize,
        stack: &mut MemStack,
    ) {
        let (count, rows) = products.shape();
        if count < WIDTH {
            self.v_w_v.fill(T::default()); // The old V and W of the other columns.
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

/// Copies in runs of eight, which share a cache line, as all columns may map to the same cache set.
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

/// Divides the columns from `first` on into strips with whole diagonal blocks.
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

/// Adds the contribution of a strip of `A` to `V^T A`: from its own columns, and by symmetry from the rows
/// below its diagonal block, as columns. `start` is the first row of the strip in `V`.
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
