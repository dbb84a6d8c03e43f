//! The stacked factors of one side of an update, `X (K, length)`, and products with them.
//!
//! The `K = sum r_j` rows are those of the terms' `A` (`length = in`) or `B^T` (`length = out`). A
//! decomposition from factors needs two products: first the Gram matrix `X X^T`, later `X^T Y` or `Y^T X` for
//! a small `Y`. Each reads `X` once, in panels of columns that stay in cache.

use std::ops::Range;

use faer::dyn_stack::{DynArray, MemStack, StackReq};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};

use crate::Result;
use crate::exec::cancel::CancelToken;
use crate::exec::memory::{collected, resize};
use crate::kernels::number::Number;
use crate::kernels::simd::LINE;
use crate::kernels::thin_gram::{SUMMANDS, SumsOfRows, add_gram_of_columns, sums_of_rows};
use crate::kernels::thin_product::{HIGH, Panel, multiply, multiply_transposed};
use crate::matrix::MatrixView;

/// Purpose of the memory of this module.
const MEMORY: &str = "products of the factors of an update";

/// Size of a panel that is read once and multiplied many times, in bytes: a level-1 cache.
const PANEL: usize = 32 << 10;

/// Size of a panel of which four rows are read many times while the others are read in turn, in bytes: a part
/// of a level-2 cache.
const ROWS: usize = 64 << 10;

/// Largest number of rows that are multiplied without a copy. The strides of more rows, if they are powers of
/// two, map too many cache lines to the same sets.
const ROWS_IN_PLACE: usize = 16;

/// Matrices of equal length, stacked vertically.
pub(crate) struct Stacked<'a> {
    parts: Vec<MatrixView<'a>>,
    scale: f64,
}

/// A Gram matrix, padded with zeros, in reusable memory.
#[derive(Default)]
pub(crate) struct Gram {
    /// Lower triangle, row-major.
    pub values: Vec<f64>,
    /// `K`, rounded up to a multiple of [`Number::WIDEST`].
    pub order: usize,
}

impl<'a> Stacked<'a> {
    /// Stacks matrices of shapes `(r_j, length)`.
    pub(crate) fn new(parts: Vec<MatrixView<'a>>) -> Self {
        Self { parts, scale: 1.0 }
    }

    /// Multiplies every element by `scale`.
    pub(crate) fn scaled(self, scale: f64) -> Self {
        Self { scale, ..self }
    }

    pub(crate) fn rank(&self) -> usize {
        self.parts.iter().map(MatrixView::rows).sum()
    }

    pub(crate) fn length(&self) -> usize {
        self.parts.first().map_or(0, MatrixView::cols)
    }

    /// Computes `X X^T` in the arithmetic of `T`: see [`thin_gram`](crate::kernels::thin_gram).
    ///
    /// The stack must provide [`gram_scratch`].
    pub(crate) fn gram<T: Number>(
        &self,
        gram: &mut Gram,
        stack: &mut MemStack,
        cancel: &CancelToken,
    ) -> Result<()> {
        let order = self.rank().next_multiple_of(T::WIDEST);
        gram.order = order;
        resize(&mut gram.values, order * order, MEMORY)?;
        gram.values.fill(0.0);
        if self.parts.first().is_some_and(MatrixView::is_column_major) {
            self.gram_of_columns::<T>(gram, stack, cancel)
        } else {
            self.gram_of_rows::<T>(gram, stack, cancel)
        }
    }

    fn gram_of_columns<T: Number>(
        &self,
        Gram { values, order }: &mut Gram,
        stack: &mut MemStack,
        cancel: &CancelToken,
    ) -> Result<()> {
        let depth = panel_length::<T>(*order);
        let (mut panel, _) = zeros::<T>(*order * depth, stack);
        for columns in self.panels(depth) {
            cancel.check()?;
            add_gram_of_columns(self.columns(columns, *order, &mut panel), *order, values);
        }
        Ok(())
    }

    fn gram_of_rows<T: Number>(
        &self,
        Gram { values, order }: &mut Gram,
        stack: &mut MemStack,
        cancel: &CancelToken,
    ) -> Result<()> {
        let depth = row_length::<T>(*order);
        let (mut panel, stack) = zeros::<T>(*order * depth, stack);
        let (mut memory, _) = zeros::<f64>(sums_of_rows::<T>(*order), stack);
        let mut sums = SumsOfRows::<T>::new(*order, &mut memory);
        for columns in self.panels(depth) {
            cancel.check()?;
            sums.add(self.rows(columns, *order, &mut panel));
        }
        sums.write(values);
        Ok(())
    }

    /// Writes `X^T Y` for `Y (K, k)` to all of `out`: `(length, k)` float32 numbers, row-major and
    /// little-endian.
    pub(crate) fn transposed_times<T: Number>(
        &self,
        y: MatRef<'_, f64>,
        out: &mut [u8],
        stack: &mut MemStack,
        cancel: &CancelToken,
    ) -> Result<()> {
        let (order, k) = (self.rank().next_multiple_of(T::WIDEST), y.ncols());
        let width = k.next_multiple_of(T::WIDEST / 2);
        let y: Vec<T> = padded(order, width, |i, j| if i < y.nrows() && j < k { y[(i, j)] } else { 0.0 })?;
        let depth = panel_length::<T>(order);
        let (mut panel, stack) = zeros::<T>(depth * order, stack);
        let (mut product, _) = zeros::<T>(depth * width, stack);
        let out = out.as_chunks_mut::<PLACE>().0;
        for columns in self.panels(depth) {
            cancel.check()?;
            let lines = &mut out[columns.start * k..columns.end * k];
            let height = columns.len().next_multiple_of(HIGH);
            let left = self.columns(columns, order, &mut panel);
            let right = Panel { values: &y, stride: width, cols: width };
            multiply(left, right, &mut product[..height * width]);
            write_rows(&product, width, k, lines);
        }
        Ok(())
    }

    /// Writes `Y^T X` for `Y (K, k)` to all of `out`: `(k, length)` float32 numbers, row-major and
    /// little-endian.
    pub(crate) fn times<T: Number>(
        &self,
        y: MatRef<'_, f64>,
        out: &mut [u8],
        stack: &mut MemStack,
        cancel: &CancelToken,
    ) -> Result<()> {
        let (order, k, length) = (self.rank(), y.ncols(), self.length());
        let y: Vec<T> = padded(order, k, |i, j| y[(i, j)])?;
        let out = out.as_chunks_mut::<PLACE>().0;
        let depth = panel_length::<T>(order);
        // Rows that begin an odd number of cache lines apart do not compete for the same cache sets.
        let stride = depth + T::WIDEST;
        let (mut panel, stack) = zeros::<T>(order * stride, stack);
        let (mut product, _) = zeros::<T>(k * stride, stack);
        for columns in self.panels(depth) {
            cancel.check()?;
            let (first, count) = (columns.start, columns.len());
            let right = match self.in_place(false, first) {
                Some((values, stride)) if count.is_multiple_of(T::WIDEST) => {
                    Panel { values, stride, cols: count }
                }
                _ => {
                    self.fill_rows(columns, stride, &mut panel);
                    Panel { values: &panel, stride, cols: count.next_multiple_of(T::WIDEST) }
                }
            };
            multiply_transposed(Panel { values: &y, stride: k, cols: k }, right, (&mut product, stride));
            for (i, line) in product.chunks_exact(stride).enumerate() {
                write(&line[..count], &mut out[i * length + first..][..count]);
            }
        }
        Ok(())
    }

    fn panels(&self, depth: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let length = self.length();
        (0..length).step_by(depth).map(move |first| first..length.min(first + depth))
    }

    /// Returns columns, column-major and padded to `order` elements each. Their number is padded to a
    /// multiple of [`HIGH`]. They are copied to `panel` unless they have this layout in memory.
    fn columns<'b, T: Number>(&'b self, columns: Range<usize>, order: usize, panel: &'b mut [T]) -> &'b [T] {
        let (rank, count) = (self.rank(), columns.len());
        if let Some((values, stride)) = self.in_place(true, columns.start)
            && stride == order
            && rank == order
            && count.is_multiple_of(HIGH)
        {
            return &values[..order * count];
        }
        let panel = &mut panel[..order * count.next_multiple_of(HIGH)];
        panel[order * count..].fill(T::default());
        self.fill(columns, MatMut::from_column_major_slice_with_stride_mut(panel, rank, count, order));
        panel
    }

    /// Returns `order` rows, padded to a multiple of [`Number::WIDEST`] each. They are copied to `panel`
    /// unless they have this layout in memory.
    fn rows<'b, T: Number>(
        &'b self,
        columns: Range<usize>,
        order: usize,
        panel: &'b mut [T],
    ) -> Panel<'b, T> {
        let count = columns.len();
        if let Some((values, stride)) = self.in_place(false, columns.start)
            && self.rank() == order
            && order <= ROWS_IN_PLACE
            && count.is_multiple_of(T::WIDEST)
        {
            return Panel { values, stride, cols: count };
        }
        let stride = count.next_multiple_of(T::WIDEST);
        self.fill_rows(columns, stride, &mut panel[..order * stride]);
        Panel { values: panel, stride, cols: stride }
    }

    /// Returns the elements from a column on without a copy, and the distance between columns, or rows.
    fn in_place<T: Number>(&self, by_columns: bool, column: usize) -> Option<(&'a [T], usize)> {
        match self.parts[..] {
            [part] if self.scale.to_bits() == 1f64.to_bits() => {
                if by_columns {
                    part.transposed().in_place(column, 0)
                } else {
                    part.in_place(0, column)
                }
            }
            _ => None,
        }
    }

    /// Copies rows to `panel`, `stride` elements apart, and zeros the gaps.
    fn fill_rows<T: Number>(&self, columns: Range<usize>, stride: usize, panel: &mut [T]) {
        let (rank, count) = (self.rank(), columns.len());
        for row in panel.chunks_exact_mut(stride) {
            row[count..].fill(T::default());
        }
        // In faer 0.24 the constructor for row-major slices takes the stride of columns.
        let rows = MatMut::from_column_major_slice_with_stride_mut(panel, count, rank, stride);
        self.fill(columns, rows.transpose_mut());
    }

    fn fill<T: Number>(&self, columns: Range<usize>, mut panel: MatMut<'_, T>) {
        let mut first = 0;
        for part in &self.parts {
            let rows = panel.rb_mut().subrows_mut(first, part.rows());
            part.upcast(0..part.rows(), columns.clone(), self.scale, rows);
            first += part.rows();
        }
    }
}

/// Returns the memory for the Gram matrix of `rank` rows.
pub(crate) fn gram_scratch<T: Number>(rank: usize) -> StackReq {
    let order = rank.next_multiple_of(T::WIDEST);
    let columns = request::<T>(order * panel_length::<T>(order));
    let rows = request::<T>(order * row_length::<T>(order));
    columns.or(rows.and(request::<f64>(sums_of_rows::<T>(order))))
}

/// Returns the memory for the product of `rank` rows with `k` vectors.
pub(crate) fn product_scratch<T: Number>(rank: usize, k: usize) -> StackReq {
    let order = rank.next_multiple_of(T::WIDEST);
    let width = k.next_multiple_of(T::WIDEST / 2);
    // Rows have gaps between them.
    let stride = panel_length::<T>(rank) + T::WIDEST;
    request::<T>(order * stride).and(request::<T>(width * stride))
}

fn request<T: Number>(count: usize) -> StackReq {
    StackReq::new_aligned::<T>(count, LINE)
}

fn zeros<T: Number>(count: usize, stack: &mut MemStack) -> (DynArray<'_, T>, &mut MemStack) {
    stack.make_aligned_with(count, LINE, |_| T::default())
}

/// Returns the number of columns of a panel of `order` rows: a multiple of [`SUMMANDS`].
fn panel_length<T: Number>(order: usize) -> usize {
    (PANEL / size_of::<T>() / order.max(1)).clamp(SUMMANDS, 16 * SUMMANDS) / SUMMANDS * SUMMANDS
}

/// Returns the number of columns of a panel whose rows are multiplied with each other: a multiple of
/// [`SUMMANDS`] vectors.
fn row_length<T: Number>(order: usize) -> usize {
    let unit = SUMMANDS * T::WIDEST;
    (ROWS / size_of::<T>() / order.max(1)).clamp(unit, 16 * unit) / unit * unit
}

fn padded<T: Number>(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Result<Vec<T>> {
    let count = rows * cols;
    collected((0..count).map(|n| T::of(value(n / cols, n % cols))), count, MEMORY)
}

/// Size of a float32 number in bytes.
const PLACE: usize = size_of::<f32>();

type Bytes = [u8; PLACE];

/// Writes the first `k` elements of every row of `width` elements, until `places` is full.
///
/// Small values of `k` are compile-time constants: otherwise the loop would take longer than the product.
fn write_rows<T: Number>(values: &[T], width: usize, k: usize, places: &mut [Bytes]) {
    match k {
        1 => write_rows_of::<1, T>(values, width, places),
        2 => write_rows_of::<2, T>(values, width, places),
        3 => write_rows_of::<3, T>(values, width, places),
        4 => write_rows_of::<4, T>(values, width, places),
        5 => write_rows_of::<5, T>(values, width, places),
        6 => write_rows_of::<6, T>(values, width, places),
        7 => write_rows_of::<7, T>(values, width, places),
        8 => write_rows_of::<8, T>(values, width, places),
        _ => {
            for (row, places) in values.chunks_exact(width).zip(places.chunks_exact_mut(k)) {
                write(&row[..k], places);
            }
        }
    }
}

fn write_rows_of<const K: usize, T: Number>(values: &[T], width: usize, places: &mut [Bytes]) {
    let (places, _) = places.as_chunks_mut::<K>();
    for (row, places) in values.chunks_exact(width).zip(places) {
        if let Some(row) = row.first_chunk::<K>() {
            *places = row.map(|x| x.to_f32().to_le_bytes());
        }
    }
}

fn write<T: Number>(values: &[T], places: &mut [Bytes]) {
    for (place, x) in places.iter_mut().zip(values) {
        *place = x.to_f32().to_le_bytes();
    }
}
