//! Division of a matrix into strips of rows or columns.
//!
//! The width of the strips depends on the shape alone, so that the bits of a result do not depend on the
//! number of threads.

use faer::MatMut;
use faer::prelude::ReborrowMut;
use rayon::prelude::*;

use crate::exec::parallel::Strategy;

/// Number of columns, or rows, of a strip.
pub(crate) const STRIP: usize = 128;

/// Calls `work` with every strip of `width` columns and the index of its first column.
pub(crate) fn each_column_strip<T: Send + Sync>(
    mut matrix: MatMut<'_, T>,
    width: usize,
    strategy: Strategy,
    work: impl Fn(usize, MatMut<'_, T>) + Send + Sync,
) {
    match strategy {
        Strategy::Together => {
            matrix.par_col_chunks_mut(width).enumerate().for_each(|(i, strip)| work(i * width, strip));
        }
        Strategy::Alone => {
            for first in (0..matrix.ncols()).step_by(width) {
                let count = width.min(matrix.ncols() - first);
                work(first, matrix.rb_mut().subcols_mut(first, count));
            }
        }
    }
}

/// Calls `work` with every strip of [`STRIP`] rows and the index of its first row.
pub(crate) fn each_row_strip<T: Send + Sync>(
    matrix: MatMut<'_, T>,
    strategy: Strategy,
    work: impl Fn(usize, MatMut<'_, T>) + Send + Sync,
) {
    each_column_strip(matrix.transpose_mut(), STRIP, strategy, |first, strip| {
        work(first, strip.transpose_mut());
    });
}
