//! Strips of a matrix: the pieces that work within a matrix is cut into.
//!
//! Their width is fixed, so that the bits of a result do not depend on the number of threads.

use faer::MatMut;
use faer::prelude::ReborrowMut;
use rayon::prelude::*;

use crate::parallel::Strategy;

/// Columns, or rows, of a strip.
pub(crate) const STRIP: usize = 128;

/// Calls `work` with every strip of columns and the index of its first column.
pub(crate) fn each_column_strip<T: Send + Sync>(
    mut matrix: MatMut<'_, T>,
    strategy: Strategy,
    work: impl Fn(usize, MatMut<'_, T>) + Send + Sync,
) {
    match strategy {
        Strategy::Together => {
            matrix.par_col_chunks_mut(STRIP).enumerate().for_each(|(i, strip)| work(i * STRIP, strip));
        }
        Strategy::Alone => {
            for first in (0..matrix.ncols()).step_by(STRIP) {
                let width = STRIP.min(matrix.ncols() - first);
                work(first, matrix.rb_mut().subcols_mut(first, width));
            }
        }
    }
}

/// Calls `work` with every strip of rows and the index of its first row.
pub(crate) fn each_row_strip<T: Send + Sync>(
    matrix: MatMut<'_, T>,
    strategy: Strategy,
    work: impl Fn(usize, MatMut<'_, T>) + Send + Sync,
) {
    each_column_strip(matrix.transpose_mut(), strategy, |first, strip| work(first, strip.transpose_mut()));
}
