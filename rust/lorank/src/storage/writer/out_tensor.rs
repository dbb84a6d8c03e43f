//! Tensors to be written, and the sources of their values.

use std::sync::Arc;

use crate::matrix::dtype::DType;
use crate::storage::checkpoint::StoredTensor;
use crate::storage::safetensors::bits_per_element;
use crate::storage::source::{StoredMatrix, Streamed};
use crate::{Error, Result};

/// A tensor to be written.
#[derive(Debug)]
pub struct OutTensor<'a> {
    /// Name of the tensor.
    pub name: String,
    /// Shape of the tensor. Ignored for [`Content::Stored`], which has its own shape.
    pub shape: Vec<usize>,
    /// Values of the tensor.
    pub content: Content<'a>,
}

/// The source of a tensor's values.
#[derive(Debug)]
pub enum Content<'a> {
    /// Row-major values, rounded as in [`Values`](Self::Values).
    F64 {
        /// Values, as many as the shape requires.
        values: &'a [f64],
        /// Element type in the file.
        dtype: DType,
    },
    /// Row-major values, rounded as in [`Values`](Self::Values).
    F32 {
        /// Values, as many as the shape requires.
        values: &'a [f32],
        /// Element type in the file.
        dtype: DType,
    },
    /// The rows of a matrix, rounded to the nearest value of `dtype` (F64, F32, F16 or BF16), halfway cases
    /// to even.
    Values {
        /// Matrix with as many elements as the shape requires, in any layout.
        matrix: &'a StoredMatrix,
        /// Element type in the file.
        dtype: DType,
    },
    /// The rows of several matrices, rounded as in [`Values`](Self::Values). Each matrix is computed in blocks.
    Streamed {
        /// Matrices with as many elements as the shape requires, in the order of the tensor.
        matrices: &'a [Arc<dyn Streamed>],
        /// Element type in the file.
        dtype: DType,
    },
    /// Bytes, written unchanged.
    Raw {
        /// Bytes, as many as shape and type require.
        bytes: &'a [u8],
        /// Element type as named in the header.
        dtype: String,
    },
    /// The bytes of a tensor of another file, copied piece by piece.
    Stored(&'a StoredTensor),
}

impl OutTensor<'_> {
    pub(super) fn dtype(&self) -> &str {
        match &self.content {
            Content::F64 { dtype, .. }
            | Content::F32 { dtype, .. }
            | Content::Values { dtype, .. }
            | Content::Streamed { dtype, .. } => match dtype {
                DType::F64 => "F64",
                DType::F32 => "F32",
                DType::F16 => "F16",
                DType::Bf16 => "BF16",
                DType::F8E4M3 | DType::F8E5M2 => "",
            },
            Content::Raw { dtype, .. } => dtype,
            Content::Stored(tensor) => &tensor.info.dtype,
        }
    }

    pub(super) fn shape(&self) -> &[usize] {
        if let Content::Stored(tensor) = &self.content { &tensor.info.shape } else { &self.shape }
    }

    /// Returns the size in bytes after checking that name, type, shape and content fit together.
    pub(super) fn checked_len(&self) -> Result<usize> {
        let fail = |reason: String| Err(Error::InvalidInput(format!("tensor `{}`: {reason}", self.name)));
        if let Content::Stored(tensor) = &self.content {
            return Ok(tensor.info.len);
        }
        let Some(bits) = bits_per_element(self.dtype()) else {
            return fail(format!("cannot be written as `{}`", self.dtype()));
        };
        let elements = self.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let sizes = elements.and_then(|n| Some((n, (n as u64).checked_mul(bits)?.div_ceil(8))));
        let Some((elements, len)) = sizes else {
            return fail(format!("shape {:?} overflows", self.shape));
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let given = match &self.content {
            Content::F64 { values, .. } => values.len() == elements,
            Content::F32 { values, .. } => values.len() == elements,
            Content::Values { matrix, .. } => {
                let (rows, cols) = matrix.shape();
                rows.checked_mul(cols) == Some(elements)
            }
            Content::Streamed { matrices, .. } => {
                let sizes = matrices.iter().map(|matrix| {
                    let (rows, cols) = matrix.shape();
                    rows.checked_mul(cols)
                });
                sizes.sum::<Option<usize>>() == Some(elements)
            }
            Content::Raw { bytes, .. } => bytes.len() == len,
            Content::Stored(_) => true,
        };
        if given { Ok(len) } else { fail(format!("the values do not fill shape {:?}", self.shape)) }
    }
}
