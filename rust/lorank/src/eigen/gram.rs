//! Lower triangles of Gram matrices `G = X X^T`, where `X` is the wide orientation of `W`.
//!
//! `X (p, m)` with `p <= m` is upcast in panels of at least `p / 4` columns. `G` and a panel need memory for
//! `1.25 p^2` numbers in addition to the stored matrix. The panels take `p^2 m / 2` multiplications at the
//! speed of faer's GEMM, half as many as a full product.

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::matmul::matmul;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::join;

use crate::Result;
use crate::exec::cancel::CancelToken;
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::exec::strips::{each_column_strip, each_row_strip};
use crate::kernels::number::{Number, spaced};
use crate::kernels::thin_product::THIN;
use crate::matrix::MatrixView;
use crate::matrix::stacked::{Gram, Stacked, gram_scratch as thin_scratch};

/// Returns the number of columns of a panel. Panels are deep enough for a fast GEMM and for few passes over
/// `G`. A panel with few rows has more columns, since these fit into cache and are read in longer runs.
fn depth(p: usize, m: usize) -> usize {
    (32_768 / p.max(1)).clamp(256, 4096).max(p / 4).min(m)
}

/// Largest order of diagonal triangles, which are multiplied in steps of [`STEP`] columns. Each step also
/// computes half a square above the diagonal. faer's triangular product avoids this work, but is slower for
/// small blocks.
const TRIANGLE: usize = 64;

/// Number of columns of a step.
const STEP: usize = 16;

/// Multiple to which half an order is rounded up: the number of rows of a tile of faer's kernels, or half of
/// that number.
const KERNEL: usize = 48;

/// Largest number of pieces into which a rectangle is divided among threads.
const PIECES: usize = 4;

/// Smallest number of columns of a piece.
const PIECE: usize = 256;

/// Number of rows of a piece that are multiplied between two polls of the cancel token: a multiple of
/// [`KERNEL`]. At order 16,384 they take half a second.
const POLLED: usize = 43 * KERNEL;

/// Returns the number of elements of a panel of a `(rows, cols)` matrix.
#[must_use]
pub fn panel_size<T: Number>(rows: usize, cols: usize) -> usize {
    let (p, m) = (rows.min(cols), rows.max(cols));
    if p <= THIN {
        return 0;
    }
    let depth = depth(p, m);
    (spaced::<T>(p) * depth).max(spaced::<T>(depth) * p)
}

/// Returns the memory for [`gram`] of a `(rows, cols)` matrix.
#[must_use]
pub fn gram_scratch(rows: usize, cols: usize) -> StackReq {
    let p = rows.min(cols);
    if p <= THIN { thin_scratch::<f64>(p) } else { StackReq::EMPTY }
}

/// Writes the lower triangle of `scale^2 * X X^T` to `gram (p, p)`. The rest of `gram` is then unspecified.
/// `panel` has [`panel_size`] elements with unspecified values.
///
/// Under [`Strategy::Together`] the caller must run in the thread pool.
///
/// # Errors
/// [`crate::Error::Cancelled`] after cancellation, which is polled between blocks of every panel;
/// [`crate::Error::OutOfMemory`].
pub fn gram<T: Number>(
    view: &MatrixView<'_>,
    scale: f64,
    strategy: Strategy,
    cancel: &CancelToken,
    mut gram: MatMut<'_, T>,
    panel: &mut [T],
    stack: &mut MemStack,
) -> Result<()> {
    let wide = view.wide();
    let (p, m) = (wide.rows(), wide.cols());
    if p <= THIN {
        return thin_gram(&wide, scale, cancel, gram, stack);
    }
    prepare_products([p, p, m], strategy)?;
    let (depth, in_place) = (depth(p, m), in_place(&wide, scale));
    // The panel has the layout of the view, so that upcasting reads and writes in runs.
    let column_major = wide.is_column_major();
    let (rows, cols) = if column_major { (p, depth) } else { (depth, p) };
    let mut buffer = MatMut::from_column_major_slice_with_stride_mut(panel, rows, cols, spaced::<T>(rows));
    for first in (0..m).step_by(depth) {
        cancel.check()?;
        // The first product initialises the memory on the threads that will use it.
        let accum = if first == 0 { Accum::Replace } else { Accum::Add };
        let columns = first..m.min(first + depth);
        if let Some(x) = in_place {
            add_lower(gram.rb_mut(), x.subcols(first, columns.len()), accum, strategy, cancel);
            continue;
        }
        let panel = if column_major { buffer.rb_mut() } else { buffer.rb_mut().transpose_mut() };
        let mut panel = panel.subcols_mut(0, columns.len());
        each_row_strip(panel.rb_mut(), strategy, |first, block| {
            wide.upcast(first..first + block.nrows(), columns.clone(), scale, block);
        });
        add_lower(gram.rb_mut(), panel.rb(), accum, strategy, cancel);
    }
    cancel.check()
}

/// Returns the matrix without a copy, if its elements are of type `T` and `scale` is 1.
fn in_place<'a, T: Number>(wide: &MatrixView<'a>, scale: f64) -> Option<MatRef<'a, T>> {
    let (p, m) = (wide.rows(), wide.cols());
    let is_plain = scale.to_bits() == 1f64.to_bits();
    let by_columns = wide.is_column_major();
    let (values, stride) =
        if by_columns { wide.transposed() } else { *wide }.in_place(0, 0).filter(|_| is_plain)?;
    Some(if by_columns {
        MatRef::from_column_major_slice_with_stride(values, p, m, stride)
    } else {
        // In faer 0.24 the constructor for row-major slices takes the stride of columns.
        MatRef::from_column_major_slice_with_stride(values, m, p, stride).transpose()
    })
}

/// Computes the Gram matrix of few rows by special kernels, in float64 before rounding to `T`.
fn thin_gram<T: Number>(
    wide: &MatrixView<'_>,
    scale: f64,
    cancel: &CancelToken,
    mut gram: MatMut<'_, T>,
    stack: &mut MemStack,
) -> Result<()> {
    let mut found = Gram::default();
    Stacked::new(vec![*wide]).scaled(scale).gram::<f64>(&mut found, stack, cancel)?;
    for j in 0..wide.rows() {
        for i in j..wide.rows() {
            gram[(i, j)] = T::of(found.values[i * found.order + j]);
        }
    }
    Ok(())
}

/// Computes the lower triangle of `G += X X^T` or `G = X X^T` recursively. A rectangle below the diagonal
/// takes half of the work. Above it and to its right, two triangles of half the order remain. After
/// cancellation the result is unspecified.
fn add_lower<T: Number>(
    gram: MatMut<'_, T>,
    x: MatRef<'_, T>,
    accum: Accum,
    strategy: Strategy,
    cancel: &CancelToken,
) {
    let p = gram.nrows();
    if cancel.is_cancelled() {
        return;
    }
    if p <= TRIANGLE {
        return add_triangle(gram, x, accum);
    }
    let half = (p / 2).next_multiple_of(KERNEL);
    let (above, below) = gram.split_at_row_mut(half);
    let (rectangle, last) = below.split_at_col_mut(half);
    let first = above.subcols_mut(0, half);
    let (x_first, x_last) = x.split_at_row(half);
    let width = half.div_ceil((half / PIECE).clamp(1, PIECES));
    let between = || {
        each_column_strip(rectangle, width, strategy, |start, mut strip| {
            let own = x_first.subrows(start, strip.ncols()).transpose();
            // The bits of a product do not depend on its number of rows.
            for top in (0..strip.nrows()).step_by(POLLED).take_while(|_| !cancel.is_cancelled()) {
                let count = POLLED.min(strip.nrows() - top);
                let block = strip.rb_mut().subrows_mut(top, count);
                matmul(block, accum, x_last.subrows(top, count), own, T::of(1.0), Par::Seq);
            }
        });
    };
    let first = || add_lower(first, x_first, accum, strategy, cancel);
    let last = || add_lower(last, x_last, accum, strategy, cancel);
    match strategy {
        Strategy::Together => {
            join(between, || join(first, last));
        }
        Strategy::Alone => {
            between();
            first();
            last();
        }
    }
}

/// Computes `G += X X^T` or `G = X X^T` for a small order. Writes some entries above the diagonal, too.
fn add_triangle<T: Number>(mut gram: MatMut<'_, T>, x: MatRef<'_, T>, accum: Accum) {
    let p = gram.nrows();
    for first in (0..p).step_by(STEP) {
        let width = STEP.min(p - first);
        let strip = gram.rb_mut().submatrix_mut(first, first, p - first, width);
        let own = x.subrows(first, width).transpose();
        matmul(strip, accum, x.subrows(first, p - first), own, T::of(1.0), Par::Seq);
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;
    use crate::exec::parallel;
    use crate::exec::scratch::Scratch;

    /// Computes the Gram matrix in memory filled with NaN, to check that all of the triangle is written.
    fn gram_of(view: &MatrixView<'_>, strategy: Strategy, cancel: &CancelToken) -> Result<Mat<f64>> {
        let p = view.rows().min(view.cols());
        let mut out = Mat::from_fn(p, p, |_, _| f64::NAN);
        let mut scratch = Scratch::default();
        let (rows, cols) = (view.rows(), view.cols());
        let size = panel_size::<f64>(rows, cols);
        let (panel, stack) = scratch.numbers::<f64>(size, gram_scratch(rows, cols))?;
        panel.fill(f64::NAN);
        gram(view, 1.0, strategy, cancel, out.as_mut(), panel, stack)?;
        Ok(out)
    }

    #[test]
    fn both_strategies_equal_the_plain_product() {
        let cancel = CancelToken::default();
        for (rows, cols) in
            [(1, 1), (1, 700), (700, 1), (3, 600), (600, 3), (300, 290), (257, 513), (1100, 1030)]
        {
            let values: Vec<f64> = (0..rows * cols).map(|i| ((i * 7919) % 1013) as f64 - 506.0).collect();
            let view = MatrixView::from_f64(&values, rows, cols).unwrap();
            let dense = Mat::from_fn(rows, cols, |i, j| values[i * cols + j]);
            let wide = if rows <= cols { dense } else { dense.transpose().to_owned() };
            let expected = &wide * wide.transpose();
            let pool = parallel::pool(3).unwrap();
            for strategy in [Strategy::Alone, Strategy::Together] {
                // Sums of such small integers are exact in any order.
                let gram = pool.install(|| gram_of(&view, strategy, &cancel)).unwrap();
                for j in 0..gram.ncols() {
                    for i in j..gram.nrows() {
                        assert_eq!(
                            gram[(i, j)].to_bits(),
                            expected[(i, j)].to_bits(),
                            "{rows}x{cols} {strategy:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn thin_matrices_equal_the_plain_product_for_every_number_of_rows() {
        let cancel = CancelToken::default();
        for p in 1..=2 * THIN {
            for m in [p + 1, 511, 1200] {
                let values: Vec<f64> = (0..p * m).map(|i| ((i * 7919) % 1013) as f64 - 506.0).collect();
                let dense = Mat::from_fn(p, m, |i, j| values[i * m + j]);
                let expected = &dense * dense.transpose();
                let rows = MatrixView::from_f64(&values, p, m).unwrap();
                let turned: Vec<f64> = (0..p * m).map(|n| values[n % p * m + n / p]).collect();
                let columns = MatrixView::from_f64(&turned, m, p).unwrap();
                for view in [rows, columns] {
                    let gram = gram_of(&view, Strategy::Alone, &cancel).unwrap();
                    for j in 0..p {
                        for i in j..p {
                            assert_eq!(gram[(i, j)].to_bits(), expected[(i, j)].to_bits(), "{p}x{m}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn cancellation_is_an_error() {
        let cancel = CancelToken::default();
        cancel.cancel();
        let view = MatrixView::from_f32(&[1.0], 1, 1).unwrap();
        assert!(gram_of(&view, Strategy::Alone, &cancel).is_err());
    }
}
