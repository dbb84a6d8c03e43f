//! Views of stored matrices: borrowed bytes, an element type, a shape and strides.

use std::ops::Range;

use faer::MatMut;
use faer::prelude::ReborrowMut;

use crate::exec::cancel::CancelToken;
use crate::exec::memory::zeros;
use crate::kernels::number::Number;
use crate::matrix::dtype::DType;
use crate::{Error, Result};

/// Largest number of elements of a view that has more elements than its bytes hold, as a stride of 0 allows.
/// Without this limit, a few bytes could claim to be a matrix that takes years to read.
pub const MOST_REPEATED: usize = 1 << 28;

/// Number of bytes or elements that are read between two polls of the cancel token.
const POLLED: usize = 1 << 24;

/// A borrowed `(rows, cols)` matrix over little-endian bytes, with strides in elements.
///
/// Construction neither copies nor aligns anything. Elements are decoded block by block as they are needed.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    bytes: &'a [u8],
    dtype: DType,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// Creates a view with explicit strides. Elements may share memory: a stride of 0 repeats rows or columns.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if an element would lie outside `bytes`, or if the view has more elements than
    /// `bytes` holds and more than [`MOST_REPEATED`].
    pub fn new(
        bytes: &'a [u8],
        dtype: DType,
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> Result<Self> {
        let span = if rows == 0 || cols == 0 {
            Some(0)
        } else {
            let last_row = (rows - 1).checked_mul(row_stride);
            let last_col = (cols - 1).checked_mul(col_stride);
            last_row
                .zip(last_col)
                .and_then(|(r, c)| r.checked_add(c)?.checked_add(1)?.checked_mul(dtype.size()))
        };
        let held = bytes.len() / dtype.size();
        match span {
            Some(span) if span <= bytes.len() => match rows.checked_mul(cols) {
                Some(count) if count <= held.max(MOST_REPEATED) => {
                    Ok(Self { bytes, dtype, rows, cols, row_stride, col_stride })
                }
                _ => Err(Error::InvalidInput(format!(
                    "a {rows}x{cols} matrix repeats the {held} elements in memory: its strides are \
                     ({row_stride}, {col_stride})"
                ))),
            },
            _ => Err(Error::InvalidInput(format!(
                "a {rows}x{cols} matrix with strides ({row_stride}, {col_stride}) of {} does not fit in {} bytes",
                dtype.name(),
                bytes.len()
            ))),
        }
    }

    /// Creates a contiguous row-major view.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if `bytes` is too short.
    pub fn row_major(bytes: &'a [u8], dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        Self::new(bytes, dtype, (rows, cols), (cols, 1))
    }

    /// Creates a contiguous row-major view of float32 values.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there are fewer than `rows * cols` values.
    ///
    /// # Examples
    /// ```
    /// use lorank::matrix::MatrixView;
    ///
    /// let view = MatrixView::from_f32(&[1.0, -2.0, 3.0, 4.0, 5.0, -6.0], 2, 3).unwrap();
    /// assert_eq!(view.max_abs().unwrap(), 6.0);
    /// assert_eq!(view.transposed().to_row_major(), [1.0, 4.0, -2.0, 5.0, 3.0, -6.0]);
    /// ```
    pub fn from_f32(values: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        // SAFETY: an initialised f32 is four valid bytes, and the slice has the lifetime of `values`.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        Self::row_major(bytes, DType::F32, rows, cols)
    }

    /// Creates a contiguous row-major view of float64 values.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there are fewer than `rows * cols` values.
    pub fn from_f64(values: &'a [f64], rows: usize, cols: usize) -> Result<Self> {
        // SAFETY: an initialised f64 is eight valid bytes, and the slice has the lifetime of `values`.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        Self::row_major(bytes, DType::F64, rows, cols)
    }

    /// Returns the number of rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the transposed view.
    #[must_use]
    pub const fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Returns the view, or its transpose if it has more rows than columns.
    #[must_use]
    pub const fn wide(self) -> Self {
        if self.rows <= self.cols { self } else { self.transposed() }
    }

    /// Returns true if adjacent elements of a column, rather than those of a row, are closer in memory.
    #[must_use]
    pub const fn is_column_major(&self) -> bool {
        self.row_stride < self.col_stride
    }

    /// Writes the block `rows x cols`, times `scale`, to `out`. The conversion to float64 is exact.
    ///
    /// # Panics
    /// Panics if `out` has another shape, or the block exceeds the matrix.
    pub(crate) fn upcast<T: Number>(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        scale: f64,
        mut out: MatMut<'_, T>,
    ) {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "block inside the matrix");
        assert_eq!((out.nrows(), out.ncols()), (rows.len(), cols.len()), "one output per element");
        if self.is_column_major() {
            return self.transposed().upcast(cols, rows, scale, out.transpose_mut());
        }
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        let (cols, first) = (cols.len(), rows.start * self.row_stride + cols.start * self.col_stride);
        if self.col_stride == 1 && out.col_stride() == 1 {
            // Contiguous rows on both sides are processed as one row.
            let gapless = self.row_stride == cols && usize::try_from(out.row_stride()) == Ok(cols);
            let (lines, length) = if gapless { (1, rows.len() * cols) } else { (rows.len(), cols) };
            for i in 0..lines {
                // SAFETY: `out` is borrowed mutably, and `length` of its elements are contiguous from the
                // start of row `i` on: one row, or all rows if `gapless`.
                let line = unsafe { std::slice::from_raw_parts_mut(out.rb_mut().ptr_at_mut(i, 0), length) };
                self.dtype.decode(self.elements(first + i * self.row_stride, length), scale, line);
            }
            return;
        }
        for i in 0..rows.len() {
            for j in 0..cols {
                let index = first + i * self.row_stride + j * self.col_stride;
                out[(i, j)] = T::of(self.element(index) * scale);
            }
        }
    }

    /// Writes whole rows, times `scale`, to the row-major `out`.
    ///
    /// # Panics
    /// Panics if `out` has another length, or the rows exceed the matrix.
    pub(crate) fn upcast_rows<T: Number>(&self, rows: Range<usize>, scale: f64, out: &mut [T]) {
        let count = rows.len();
        let out = MatMut::from_row_major_slice_mut(out, count, self.cols);
        self.upcast(rows, 0..self.cols, scale, out);
    }

    /// Returns the bytes of all elements if the matrix is row-major and contiguous.
    #[must_use]
    pub fn as_row_major_bytes(&self) -> Option<&'a [u8]> {
        let gapless = self.cols <= 1 || self.col_stride == 1;
        let stacked = self.rows <= 1 || self.row_stride == self.cols;
        (gapless && stacked).then(|| self.elements(0, self.rows * self.cols))
    }

    /// Returns the elements from `(row, col)` on without a copy, and the distance between rows in elements.
    /// `None` unless the elements are numbers of type `T` and the rows are contiguous.
    #[must_use]
    pub(crate) fn in_place<T: Number>(&self, row: usize, col: usize) -> Option<(&'a [T], usize)> {
        let is_native =
            cfg!(target_endian = "little") && self.dtype == DType::of::<T>() && self.col_stride == 1;
        // Rows that overlap, as those of a sliding window, are copied: kernels take rows for disjoint.
        let is_native = is_native && (self.rows <= 1 || self.row_stride >= self.cols);
        let start = (row * self.row_stride + col) * self.dtype.size();
        let bytes = self.bytes.get(start..).filter(|_| is_native)?;
        // The cast fails for misaligned memory, which a file may contain.
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        Some((pulp::bytemuck::try_cast_slice(&bytes[..whole]).ok()?, self.row_stride))
    }

    /// Returns all elements as float64, row-major. Aborts the process if the system provides no memory.
    #[must_use]
    pub fn to_row_major(&self) -> Vec<f64> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.upcast_rows(0..self.rows, 1.0, &mut values);
        values
    }

    /// Returns all elements as float64, row-major, unless it is cancelled.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::Cancelled`].
    pub fn to_f64(&self, cancel: &CancelToken) -> Result<Vec<f64>> {
        self.numbers(cancel)
    }

    /// Returns all elements as float32, row-major, unless it is cancelled. Only elements of float64 are
    /// rounded.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::Cancelled`].
    pub fn to_f32(&self, cancel: &CancelToken) -> Result<Vec<f32>> {
        self.numbers(cancel)
    }

    fn numbers<T: Number>(&self, cancel: &CancelToken) -> Result<Vec<T>> {
        let count = self.rows.saturating_mul(self.cols);
        let mut values = zeros(count, "the values of a matrix")?;
        if count == 0 {
            return Ok(values);
        }
        let width = self.cols.min(POLLED);
        let height = POLLED / width;
        for top in (0..self.rows).step_by(height) {
            for left in (0..self.cols).step_by(width) {
                cancel.check()?;
                let (rows, cols) = (top..self.rows.min(top + height), left..self.cols.min(left + width));
                // Whole rows, or a part of one row.
                let out = &mut values[top * self.cols + left..][..rows.len() * cols.len()];
                let out = MatMut::from_row_major_slice_mut(out, rows.len(), cols.len());
                self.upcast(rows, cols, 1.0, out);
            }
        }
        Ok(values)
    }

    /// Returns the largest absolute value, 0 for an empty or zero matrix.
    ///
    /// # Errors
    /// [`Error::Numerical`] at the first NaN or infinity.
    pub fn max_abs(&self) -> Result<f64> {
        self.max_abs_until(&CancelToken::default())
    }

    /// Returns the value of [`max_abs`](Self::max_abs), unless it is cancelled.
    pub(crate) fn max_abs_until(&self, cancel: &CancelToken) -> Result<f64> {
        if self.is_column_major() {
            return self.transposed().max_abs_until(cancel);
        }
        let (mut largest, mut unpolled) = (0.0, 0);
        for line in self.lines().flat_map(|line| line.chunks(POLLED)) {
            unpolled += line.len();
            if unpolled >= POLLED {
                cancel.check()?;
                unpolled = 0;
            }
            let found = self.dtype.largest(line);
            if !found.is_finite() {
                return Err(Error::Numerical("holds NaN or infinite values".into()));
            }
            largest = found.max(largest);
        }
        Ok(largest)
    }

    /// Returns the bytes of all elements, in the longest contiguous pieces.
    fn lines(&self) -> impl Iterator<Item = &'a [u8]> {
        let is_dense = self.cols <= 1 || self.col_stride == 1;
        let (count, length) = match self.as_row_major_bytes() {
            Some(_) => (1, self.rows * self.cols),
            None if is_dense => (self.rows, self.cols),
            None => (self.rows * self.cols, 1),
        };
        // The loop must not depend on the number of empty rows, which may be 2^60 in a malicious file.
        (0..if self.cols == 0 { 0 } else { count }).map(move |i| {
            let (row, col) = if length == 1 { (i / self.cols, i % self.cols) } else { (i, 0) };
            self.elements(row * self.row_stride + col * self.col_stride, length)
        })
    }

    /// Returns the sum of the squares of all elements, each times `scale`.
    #[must_use]
    pub fn sum_of_squares(&self, scale: f64) -> f64 {
        const LANES: usize = 16;
        const BLOCK: usize = 64 * LANES;
        if self.is_column_major() {
            return self.transposed().sum_of_squares(scale);
        }
        let (mut sums, mut buffer) = ([0.0; LANES], [0.0f64; BLOCK]);
        let size = self.dtype.size();
        for bytes in self.lines().flat_map(|line| line.chunks(BLOCK * size)) {
            let count = bytes.len() / size;
            self.dtype.decode(bytes, scale, &mut buffer[..count]);
            let padded = count.next_multiple_of(LANES);
            buffer[count..padded].fill(0.0);
            for values in buffer[..padded].as_chunks::<LANES>().0 {
                for (sum, x) in sums.iter_mut().zip(values) {
                    *sum += x * x;
                }
            }
        }
        sums.iter().sum()
    }

    fn elements(&self, start: usize, count: usize) -> &'a [u8] {
        let size = self.dtype.size();
        &self.bytes[start * size..(start + count) * size]
    }

    fn element(&self, index: usize) -> f64 {
        let mut value = [0.0];
        self.dtype.decode(self.elements(index, 1), 1.0, &mut value);
        value[0]
    }
}

#[cfg(test)]
mod tests;
