//! Weights with low-rank updates, computed in blocks of rows.
//!
//! The products are computed in float64 by the kernels of [`thin_product`](crate::kernels::thin_product), which
//! add up in the order of the factors' rows. The bits of a result therefore depend neither on the blocks nor on
//! the number of threads.

use std::ops::Range;

use faer::MatMut;

use crate::exec::cancel::CancelToken;
use crate::exec::memory::{resize, zeros};
use crate::kernels::number::padded;
use crate::kernels::thin_product::{Panel, multiply_transposed};
use crate::low_rank::terms::Term;
use crate::matrix::MatrixView;
use crate::storage::source::{Buffer, StoredMatrix, Streamed};
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "a weight with its update";

/// Number of elements of a block, of which several copies stay in cache.
const BLOCK: usize = 1 << 16;

/// Least number of rows of a block, for which the factor `A` is read once.
const LEAST_ROWS: usize = 16;

/// Number of columns of `A` that stay in cache for all rows of a block. A multiple of the padding of panels.
const STRIP: usize = 512;

/// Number of bytes that are read from a file at a time.
const READ: usize = 1 << 22;

/// One term of an update: `weight * B A`, or its transpose.
#[derive(Clone, Debug)]
pub struct Addend {
    /// The factors and their weight.
    pub term: Term,
    /// True to add the transpose of the product.
    pub is_transposed: bool,
}

/// The norms that `DoRA` gives to the rows or columns of an updated weight.
#[derive(Clone, Debug)]
pub struct Magnitude {
    /// The norm of every row or column.
    pub values: Vec<f64>,
    /// True if the norms are those of columns.
    pub is_of_columns: bool,
}

/// A weight with its update, `W + sum_j weight_j B_j A_j`, whose rows or columns may get other norms.
#[derive(Clone, Debug)]
pub struct UpdatedMatrix {
    base: StoredMatrix,
    addends: Vec<Addend>,
    magnitude: Option<Magnitude>,
}

/// Consecutive rows of a weight before and after its update.
pub(crate) struct Rows<'a> {
    /// The index of the first row.
    pub first: usize,
    /// The rows before, row-major.
    pub base: &'a [f64],
    /// The rows after, row-major.
    pub updated: &'a [f64],
}

impl UpdatedMatrix {
    /// Combines a weight and its update.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if shapes do not fit each other.
    ///
    /// # Examples
    /// ```
    /// use std::sync::Arc;
    ///
    /// use lorank::low_rank::Term;
    /// use lorank::source::{Buffer, StoredMatrix, Streamed};
    /// use lorank::updated::{Addend, UpdatedMatrix};
    /// use lorank::{cancel::CancelToken, dtype::DType};
    ///
    /// let stored = |values: &[f64], shape: (usize, usize)| {
    ///     let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    ///     StoredMatrix::in_memory(Arc::new(bytes), DType::F64, shape, (shape.1, 1)).unwrap()
    /// };
    /// let term = Term { b: stored(&[1.0, 2.0], (2, 1)), a: stored(&[1.0, 0.0, -1.0], (1, 3)), weight: 0.5 };
    /// let addend = Addend { term, is_transposed: false };
    /// let base = stored(&[1.0; 6], (2, 3));
    /// let updated = UpdatedMatrix::new(base, vec![addend], None).unwrap();
    /// let mut found = Vec::new();
    /// updated
    ///     .stream(&mut Buffer::default(), &CancelToken::default(), &mut |rows| Ok(found.extend_from_slice(rows)))
    ///     .unwrap();
    /// assert_eq!(found, [1.5, 1.0, 0.5, 2.0, 1.0, 0.0]);
    /// ```
    pub fn new(base: StoredMatrix, addends: Vec<Addend>, magnitude: Option<Magnitude>) -> Result<Self> {
        let (rows, cols) = base.shape();
        for Addend { term, is_transposed } in &addends {
            let ((out, r), (depth, fan_in)) = (term.b.shape(), term.a.shape());
            let shape = if *is_transposed { (fan_in, out) } else { (out, fan_in) };
            if r != depth || shape != (rows, cols) {
                return Err(Error::InvalidInput(format!(
                    "factors of shapes {out}x{r} and {depth}x{fan_in} do not fit a weight stored as {rows}x{cols}"
                )));
            }
        }
        if let Some(Magnitude { values, is_of_columns }) = &magnitude {
            let count = if *is_of_columns { cols } else { rows };
            if values.len() != count {
                return Err(Error::InvalidInput(format!(
                    "{} magnitudes do not fit a weight stored as {rows}x{cols}",
                    values.len()
                )));
            }
        }
        Ok(Self { base, addends, magnitude })
    }

    /// Computes all rows in order, and passes them to `emit` in blocks.
    pub(crate) fn for_each_block(
        &self,
        buffer: &mut Buffer,
        cancel: &CancelToken,
        emit: &mut dyn FnMut(Rows<'_>) -> Result<()>,
    ) -> Result<()> {
        let factors = Factors::of(&self.addends, self.base.shape(), buffer, cancel)?;
        let scales = match &self.magnitude {
            Some(magnitude) => Some(self.scales(magnitude, &factors, buffer, cancel)?),
            None => None,
        };
        self.blocks(&factors, scales.as_ref(), buffer, cancel, emit)
    }

    /// Returns the factors of rows or columns that give them their norms.
    fn scales(
        &self,
        magnitude: &Magnitude,
        factors: &Factors,
        buffer: &mut Buffer,
        cancel: &CancelToken,
    ) -> Result<Magnitude> {
        let cols = self.base.shape().1;
        let mut squares: Vec<f64> = zeros(magnitude.values.len(), MEMORY)?;
        self.blocks(factors, None, buffer, cancel, &mut |rows| {
            for (i, line) in rows.updated.chunks_exact(cols.max(1)).enumerate() {
                if magnitude.is_of_columns {
                    squares.iter_mut().zip(line).for_each(|(sum, x)| *sum += x * x);
                } else {
                    squares[rows.first + i] = line.iter().map(|x| x * x).sum();
                }
            }
            Ok(())
        })?;
        for (square, value) in squares.iter_mut().zip(&magnitude.values) {
            *square = value / square.sqrt();
        }
        Ok(Magnitude { values: squares, is_of_columns: magnitude.is_of_columns })
    }

    fn blocks(
        &self,
        factors: &Factors,
        scales: Option<&Magnitude>,
        buffer: &mut Buffer,
        cancel: &CancelToken,
        emit: &mut dyn FnMut(Rows<'_>) -> Result<()>,
    ) -> Result<()> {
        let (rows, cols) = self.base.shape();
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let height = (BLOCK / cols).max(LEAST_ROWS);
        let together = (READ / (cols * self.base.dtype().size()) / height).max(1) * height;
        let mut space = Space::new(height.min(rows), cols)?;
        let mut block = |view: &MatrixView<'_>, within: Range<usize>, first: usize| {
            cancel.check()?;
            let rows = space.compute(view, within, first, factors, scales);
            emit(rows)
        };
        if self.base.rows_alone(0..0).is_none() {
            return self.base.with_view(buffer, cancel, |view| {
                blocks_of(0..rows, height).try_for_each(|part| block(view, part.clone(), part.start))
            });
        }
        for piece in blocks_of(0..rows, together) {
            let Some(stored) = self.base.rows_alone(piece.clone()) else { continue };
            stored.with_view(buffer, cancel, |view| {
                blocks_of(0..piece.len(), height)
                    .try_for_each(|part| block(view, part.clone(), piece.start + part.start))
            })?;
        }
        Ok(())
    }
}

impl Streamed for UpdatedMatrix {
    fn shape(&self) -> (usize, usize) {
        self.base.shape()
    }

    fn stream(
        &self,
        buffer: &mut Buffer,
        cancel: &CancelToken,
        emit: &mut dyn FnMut(&[f64]) -> Result<()>,
    ) -> Result<()> {
        self.for_each_block(buffer, cancel, &mut |rows| emit(rows.updated))
    }
}

/// Divides a range into parts of `length`, of which the last may be shorter.
fn blocks_of(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(length.max(1)).map(move |start| start..end.min(start.saturating_add(length)))
}

/// The stacked factors of all terms: the update is `L^T R`.
struct Factors {
    /// `L (depth, rows)`, row-major, with the weights.
    left: Vec<f64>,
    rows: usize,
    /// `R (depth, width)`, row-major and padded with zeros.
    right: Vec<f64>,
    width: usize,
}

impl Factors {
    fn of(
        addends: &[Addend],
        (rows, cols): (usize, usize),
        buffer: &mut Buffer,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let depth: usize = addends.iter().map(|addend| addend.term.a.shape().0).sum();
        let width = padded::<f64>(cols);
        let (left, right) =
            (zeros(depth.saturating_mul(rows), MEMORY)?, zeros(depth.saturating_mul(width), MEMORY)?);
        let mut found = Self { left, rows, right, width };
        let (mut first, mut block) = (0, Vec::new());
        for Addend { term, is_transposed } in addends {
            let rank = term.a.shape().0;
            let left = (&mut found.left[first * rows..], rows);
            let right = (&mut found.right[first * width..], width);
            let (of_b, of_a) = if *is_transposed { (right, left) } else { (left, right) };
            term.b.with_view(buffer, cancel, |view| {
                check(view, cancel)?;
                put_transposed(view, term.weight, of_b, &mut block)
            })?;
            term.a.with_view(buffer, cancel, |view| {
                check(view, cancel)?;
                let (out, stride) = of_a;
                for (i, line) in out.chunks_mut(stride.max(1)).enumerate().take(rank) {
                    view.upcast_rows(i..i + 1, 1.0, &mut line[..view.cols()]);
                }
                Ok(())
            })?;
            first += rank;
        }
        Ok(found)
    }
}

/// Refuses factors with NaN and infinities.
fn check(view: &MatrixView<'_>, cancel: &CancelToken) -> Result<()> {
    match view.max_abs_until(cancel) {
        Err(Error::Numerical(_)) => {
            Err(Error::Numerical("a factor of the update holds NaN or infinite values".into()))
        }
        other => other.map(drop),
    }
}

/// Writes the transpose of a view, times `scale`, to rows of `out` that begin `stride` elements apart.
fn put_transposed(
    view: &MatrixView<'_>,
    scale: f64,
    (out, stride): (&mut [f64], usize),
    block: &mut Vec<f64>,
) -> Result<()> {
    let (rows, cols) = (view.rows(), view.cols());
    for part in blocks_of(0..rows, (BLOCK / cols.max(1)).max(1)) {
        resize(block, part.len() * cols, MEMORY)?;
        let target = MatMut::from_row_major_slice_mut(&mut block[..], part.len(), cols);
        view.upcast(part.clone(), 0..cols, scale, target);
        for (i, line) in block.chunks_exact(cols.max(1)).enumerate() {
            for (j, x) in line.iter().enumerate() {
                out[j * stride + part.start + i] = *x;
            }
        }
    }
    Ok(())
}

/// The memory of a block.
struct Space {
    base: Vec<f64>,
    product: Vec<f64>,
    updated: Vec<f64>,
    cols: usize,
}

impl Space {
    fn new(height: usize, cols: usize) -> Result<Self> {
        let space = |width: usize| zeros(height.saturating_mul(width), MEMORY);
        let width = padded::<f64>(cols);
        // One more row, so that the last row of a strip that begins within a row is complete.
        let product = zeros(height.saturating_add(1).saturating_mul(width), MEMORY)?;
        Ok(Self { base: space(cols)?, product, updated: space(cols)?, cols })
    }

    /// Computes the rows `within` a view, of which the first is the row `first` of the weight.
    fn compute(
        &mut self,
        view: &MatrixView<'_>,
        within: Range<usize>,
        first: usize,
        factors: &Factors,
        scales: Option<&Magnitude>,
    ) -> Rows<'_> {
        let (count, width) = (within.len(), factors.width);
        let base = &mut self.base[..count * self.cols];
        view.upcast_rows(within, 1.0, base);
        let product = &mut self.product[..(count + 1) * width];
        if factors.left.is_empty() || factors.right.is_empty() {
            product.fill(0.0);
        } else {
            let left = Panel { values: &factors.left[first..], stride: factors.rows, cols: count };
            for strip in blocks_of(0..width, STRIP) {
                let right = &factors.right[strip.start..];
                let right = Panel { values: right, stride: width, cols: strip.len() };
                multiply_transposed(left, right, (&mut product[strip.start..][..count * width], width));
            }
        }
        let updated = &mut self.updated[..count * self.cols];
        let lines = updated.chunks_exact_mut(self.cols).zip(base.chunks_exact(self.cols));
        for (i, ((line, base), product)) in lines.zip(product.chunks_exact(width)).enumerate() {
            for ((x, y), z) in line.iter_mut().zip(base).zip(product) {
                *x = y + z;
            }
            match scales {
                Some(Magnitude { values, is_of_columns: true }) => {
                    line.iter_mut().zip(values).for_each(|(x, scale)| *x *= scale);
                }
                Some(Magnitude { values, .. }) => line.iter_mut().for_each(|x| *x *= values[first + i]),
                None => {}
            }
        }
        Rows { first, base, updated }
    }
}

#[cfg(test)]
mod tests;
