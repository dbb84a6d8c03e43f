//! Products `G V = X (X^T V)` with the Gram matrix of a wide `X (p, m)` that is never formed, in float32.
//!
//! A few vectors `V (p, VECTORS)`, row-major, make two products of every element of `X`, which is laid out in
//! panels of [`BLOCK`] columns: `U = X_b^T V` runs over a panel once, `sum += X_b U` once more, while the
//! panel is in cache. Panels lie as `X` does, row by row or column by column, so that laying them out reads
//! and writes in runs.

use std::ops::Range;

use faer::MatMut;
use rayon::prelude::*;

use crate::exec::parallel::Strategy;
use crate::kernels::thin_product::{Panel, add_outer_products, add_row_products};
use crate::matrix::MatrixView;

/// Vectors that are multiplied at a time: a vector register of float32.
pub(crate) const VECTORS: usize = 16;

/// Columns of a panel.
const BLOCK: usize = 64;

/// Rows, of a panel's, that are passed over at a time: with their columns they fill half a level-1 cache.
const ROWS: usize = 64;

/// Pieces that columns are cut into, each with sums of its own: fixed, so that the bits of a result do not
/// depend on the number of threads.
const PIECES: usize = 8;

/// A matrix in panels, and room for the sums over each piece of them.
pub(crate) struct GramProduct {
    panels: Vec<f32>,
    by_columns: bool,
    /// Rows, padded.
    height: usize,
    strategy: Strategy,
    pieces: Vec<Piece>,
}

/// Panels that one thread multiplies with, and the sums over them.
struct Piece {
    panels: Range<usize>,
    inner: Vec<f32>,
    sums: Vec<f32>,
}

impl GramProduct {
    /// Of `scale X`.
    ///
    /// Under [`Strategy::Together`] this must run inside the thread pool that it may use.
    pub(crate) fn new(x: &MatrixView<'_>, scale: f64, strategy: Strategy) -> Self {
        let (height, count) = (padded(x.rows()), x.cols().div_ceil(BLOCK));
        let mut panels = vec![0.0; height * BLOCK * count];
        let fill = |(index, panel): (usize, &mut [f32])| {
            let columns = index * BLOCK..x.cols().min((index + 1) * BLOCK);
            let (rows, width) = (x.rows(), columns.len());
            // faer 0.24's constructor for rows with a stride takes it for that of columns.
            let out = if x.is_column_major() {
                MatMut::from_column_major_slice_with_stride_mut(panel, rows, width, height)
            } else {
                MatMut::from_column_major_slice_with_stride_mut(panel, width, rows, BLOCK).transpose_mut()
            };
            x.upcast(0..rows, columns, scale, out);
        };
        match strategy {
            Strategy::Together => panels.par_chunks_mut(height * BLOCK).enumerate().for_each(fill),
            Strategy::Alone => panels.chunks_mut(height * BLOCK).enumerate().for_each(fill),
        }
        let length = count.div_ceil(PIECES).max(1);
        let pieces = (0..count)
            .step_by(length)
            .map(|first| Piece {
                panels: first..count.min(first + length),
                inner: vec![0.0; BLOCK * VECTORS],
                sums: vec![0.0; height * VECTORS],
            })
            .collect();
        Self { panels, by_columns: x.is_column_major(), height, strategy, pieces }
    }

    /// Rows of `V`: those of `X` and some that are zero.
    pub(crate) const fn height(&self) -> usize {
        self.height
    }

    /// `U = G V`, both `(height, VECTORS)`, row-major.
    pub(crate) fn apply(&mut self, v: &[f32], u: &mut [f32]) {
        let Self { panels, by_columns, height, strategy, pieces } = self;
        let work = |piece: &mut Piece| {
            piece.sums.fill(0.0);
            for panel in panels[piece.panels.start * *height * BLOCK..piece.panels.end * *height * BLOCK]
                .chunks_exact(*height * BLOCK)
            {
                piece.inner.fill(0.0);
                if *by_columns {
                    by_columns_of(panel, *height, v, piece);
                } else {
                    by_rows_of(panel, v, piece);
                }
            }
        };
        match strategy {
            Strategy::Together => pieces.par_iter_mut().with_max_len(1).for_each(work),
            Strategy::Alone => pieces.iter_mut().for_each(work),
        }
        u.fill(0.0);
        for piece in pieces {
            u.iter_mut().zip(&piece.sums).for_each(|(x, sum)| *x += sum);
        }
    }
}

/// Rows one after the other, [`BLOCK`] numbers each.
fn by_rows_of(panel: &[f32], v: &[f32], Piece { inner, sums, .. }: &mut Piece) {
    for (rows, v) in panel.chunks(ROWS * BLOCK).zip(v.chunks(ROWS * VECTORS)) {
        add_outer_products(Panel { values: rows, stride: BLOCK, cols: BLOCK }, v, inner);
    }
    add_row_products(Panel { values: panel, stride: BLOCK, cols: BLOCK }, inner, sums);
}

/// Columns one after the other, `height` numbers each.
fn by_columns_of(panel: &[f32], height: usize, v: &[f32], Piece { inner, sums, .. }: &mut Piece) {
    for first in (0..height).step_by(ROWS) {
        let cols = ROWS.min(height - first);
        let rows = Panel { values: &panel[first..], stride: height, cols };
        add_row_products(rows, &v[first * VECTORS..][..cols * VECTORS], inner);
    }
    add_outer_products(Panel { values: panel, stride: height, cols: height }, inner, sums);
}

/// A multiple of what kernels take at a time, and an odd one of a cache line: columns do not compete for the
/// same places of a cache.
fn padded(rows: usize) -> usize {
    const LINE: usize = 16;
    let lines = rows.div_ceil(LINE);
    (lines + usize::from(lines.is_multiple_of(2))) * LINE
}
