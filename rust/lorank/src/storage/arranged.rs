//! Matrices that are put together from stored ones, as their file arranges rows in another way than the model.

use std::sync::Arc;

use pulp::bytemuck::cast_slice;

use crate::exec::cancel::CancelToken;
use crate::matrix::dtype::DType;
use crate::storage::source::{Buffer, Computed, Parts, StoredMatrix};
use crate::{Error, Result};

/// An arrangement of the rows of stored matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// The matrices one below the other.
    Stacked,
    /// The rows of the matrices by turns: the first of each, the second of each, and so on.
    Interleaved,
    /// The rows of each of `n` heads, of which the file alternates the first and the second half.
    Heads(usize),
}

struct Arranged {
    parts: Vec<StoredMatrix>,
    by: Arrangement,
    dtype: DType,
}

/// Returns a matrix that is arranged whenever it is loaded. It has the type of the matrices, or float32 if they
/// have several types.
///
/// # Errors
/// [`Error::InvalidInput`] if the matrices have different numbers of columns, or rows that the arrangement does
/// not divide.
pub fn arranged(parts: Vec<StoredMatrix>, by: Arrangement) -> Result<StoredMatrix> {
    let Some(first) = parts.first() else {
        return Err(Error::InvalidInput("no matrices to arrange".into()));
    };
    let ((rows, cols), dtype) = (first.shape(), first.dtype());
    let dtype = if parts.iter().all(|part| part.dtype() == dtype) { dtype } else { DType::F32 };
    let is_one_width = parts.iter().all(|part| part.shape().1 == cols);
    let fits = match by {
        Arrangement::Stacked => true,
        Arrangement::Interleaved => parts.iter().all(|part| part.shape().0 == rows),
        Arrangement::Heads(heads) => parts.len() == 1 && is_multiple(rows, heads),
    };
    if !is_one_width || !fits {
        return Err(Error::InvalidInput(format!("{parts:?} cannot be arranged as {by:?}")));
    }
    let total = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.shape().0));
    let Some(total) = total else { return Err(Error::InvalidInput("too many rows".into())) };
    Ok(StoredMatrix::computed(Arc::new(Arranged { parts, by, dtype }), dtype, (total, cols)))
}

/// Returns true if every head has an even number of rows.
fn is_multiple(rows: usize, heads: usize) -> bool {
    heads.checked_mul(2).is_some_and(|unit| unit > 0 && rows.is_multiple_of(unit))
}

impl Computed for Arranged {
    fn compute(&self, out: &mut [u8], parts: &mut Parts, cancel: &CancelToken) -> Result<()> {
        let count = self.parts.len();
        if parts.buffers.is_empty() {
            parts.buffers.push(Buffer::default());
        }
        let mut done = 0;
        for (k, part) in self.parts.iter().enumerate() {
            let (rows, cols) = part.shape();
            let view = part.load(&mut parts.buffers[0], cancel)?;
            let size = cols * self.dtype.size();
            let converted;
            let bytes = match view.as_row_major_bytes() {
                Some(bytes) if view.dtype() == self.dtype => bytes,
                _ if self.dtype == DType::F32 => {
                    converted = view.to_f32(cancel)?;
                    cast_slice(&converted)
                }
                _ => return Err(Error::Internal("an arrangement of transposed matrices".into())),
            };
            for (i, row) in bytes.chunks_exact(size.max(1)).enumerate() {
                let to = match self.by {
                    Arrangement::Stacked => done + i,
                    Arrangement::Interleaved => i * count + k,
                    Arrangement::Heads(heads) => {
                        let (head, half) = (rows / heads, rows / heads / 2);
                        i / head * head + i % 2 * half + i % head / 2
                    }
                };
                out[to * size..][..size].copy_from_slice(row);
            }
            done += rows;
        }
        Ok(())
    }
}
