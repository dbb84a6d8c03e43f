//! Products `G V = X (X^T V)` with the Gram matrix of a wide `X (p, m)`, without forming it, in float32.
//!
//! `V (p, VECTORS)` is row-major. `X` is divided into panels of [`BLOCK`] columns. Each is used twice while
//! it is in cache: for `U = X_b^T V`, then for `sum += X_b U`. Panels have the layout of `X`, row-major or
//! column-major, so that filling them reads and writes in runs.

use std::ops::Range;

use faer::MatMut;
use rayon::prelude::*;

use crate::Result;
use crate::exec::cancel::CancelToken;
use crate::exec::memory::zeros;
use crate::exec::parallel::Strategy;
use crate::kernels::thin_product::{Panel, add_outer_products, add_row_products};
use crate::matrix::MatrixView;

/// Purpose of the memory of this module.
const MEMORY: &str = "an estimate of a spectrum";

/// Number of vectors: the elements of one AVX-512 register of float32.
pub(crate) const VECTORS: usize = 16;

/// Number of columns of a panel.
const BLOCK: usize = 64;

/// Number of rows of a panel that are processed at a time: with their columns they fill half a level-1 cache.
const ROWS: usize = 64;

/// Number of groups of panels, each with separate sums. It is constant, so that the bits of a result do not
/// depend on the number of threads.
const PIECES: usize = 8;

/// A matrix in panels, and memory for the sums over each group of panels.
pub(crate) struct GramProduct {
    cancel: CancelToken,
    panels: Vec<f32>,
    by_columns: bool,
    /// Number of rows, padded.
    height: usize,
    strategy: Strategy,
    pieces: Vec<Piece>,
}

/// Panels that one thread multiplies, and the sums over them.
struct Piece {
    panels: Range<usize>,
    inner: Vec<f32>,
    sums: Vec<f32>,
}

impl GramProduct {
    /// Prepares products with the Gram matrix of `scale X`.
    ///
    /// Under [`Strategy::Together`] the caller must run in the thread pool. After cancellation all products
    /// are unspecified.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn new(
        x: &MatrixView<'_>,
        scale: f64,
        strategy: Strategy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let (height, count) = (padded(x.rows()), x.cols().div_ceil(BLOCK));
        let mut panels = zeros(height * BLOCK * count, MEMORY)?;
        let fill = |(index, panel): (usize, &mut [f32])| {
            if cancel.is_cancelled() {
                return;
            }
            let columns = index * BLOCK..x.cols().min((index + 1) * BLOCK);
            let (rows, width) = (x.rows(), columns.len());
            // In faer 0.24 the constructor for row-major slices takes the stride of columns.
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
            .map(|first| {
                let (inner, sums) = (zeros(BLOCK * VECTORS, MEMORY)?, zeros(height * VECTORS, MEMORY)?);
                Ok(Piece { panels: first..count.min(first + length), inner, sums })
            })
            .collect::<Result<_>>()?;
        let cancel = cancel.clone();
        Ok(Self { cancel, panels, by_columns: x.is_column_major(), height, strategy, pieces })
    }

    /// Returns the number of rows of `V`: those of `X`, and zeros.
    pub(crate) const fn height(&self) -> usize {
        self.height
    }

    /// Computes `U = G V`. Both matrices are row-major, `(height, VECTORS)`.
    pub(crate) fn apply(&mut self, v: &[f32], u: &mut [f32]) {
        let Self { cancel, panels, by_columns, height, strategy, pieces } = self;
        let work = |piece: &mut Piece| {
            piece.sums.fill(0.0);
            for panel in panels[piece.panels.start * *height * BLOCK..piece.panels.end * *height * BLOCK]
                .chunks_exact(*height * BLOCK)
                .take_while(|_| !cancel.is_cancelled())
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

/// Adds the products of a row-major panel, whose rows have [`BLOCK`] elements.
fn by_rows_of(panel: &[f32], v: &[f32], Piece { inner, sums, .. }: &mut Piece) {
    for (rows, v) in panel.chunks(ROWS * BLOCK).zip(v.chunks(ROWS * VECTORS)) {
        add_outer_products(Panel { values: rows, stride: BLOCK, cols: BLOCK }, v, inner);
    }
    add_row_products(Panel { values: panel, stride: BLOCK, cols: BLOCK }, inner, sums);
}

/// Adds the products of a column-major panel, whose columns have `height` elements.
fn by_columns_of(panel: &[f32], height: usize, v: &[f32], Piece { inner, sums, .. }: &mut Piece) {
    for first in (0..height).step_by(ROWS) {
        let cols = ROWS.min(height - first);
        let rows = Panel { values: &panel[first..], stride: height, cols };
        add_row_products(rows, &v[first * VECTORS..][..cols * VECTORS], inner);
    }
    add_outer_products(Panel { values: panel, stride: height, cols: height }, inner, sums);
}

/// Rounds up to an odd number of cache lines, so that columns do not compete for the same cache sets.
fn padded(rows: usize) -> usize {
    const LINE: usize = 16;
    let lines = rows.div_ceil(LINE);
    (lines + usize::from(lines.is_multiple_of(2))) * LINE
}
