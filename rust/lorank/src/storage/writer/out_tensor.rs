//! Tensors to be written, and where their values come from.

use crate::matrix::dtype::DType;
use crate::storage::checkpoint::StoredTensor;
use crate::storage::safetensors::bits_per_element;
use crate::storage::source::StoredMatrix;
use crate::{Error, Result};

/// A tensor to be written.
#[derive(Debug)]
pub struct OutTensor<'a> {
    /// Its name.
    pub name: String,
    /// Its shape; for [`Content::Stored`] that of the stored tensor is taken.
    pub shape: Vec<usize>,
    /// Its values.
    pub content: Content<'a>,
}

/// Where a tensor's values come from.
#[derive(Debug)]
pub enum Content<'a> {
    /// Row-major values, rounded as those of [`Values`](Self::Values).
    F64 {
        /// As many as the shape says.
        values: &'a [f64],
        /// What they become.
        dtype: DType,
    },
    /// Row-major values, rounded as those of [`Values`](Self::Values).
    F32 {
        /// As many as the shape says.
        values: &'a [f32],
        /// What they become.
        dtype: DType,
    },
    /// A matrix's rows one after the other, rounded to the nearest of `dtype` (F64, F32, F16 or BF16), halves
    /// to even.
    Values {
        /// As many as the shape says, in any layout of their own.
        matrix: &'a StoredMatrix,
        /// What they become.
        dtype: DType,
    },
    /// Bytes as they are.
    Raw {
        /// As many as shape and type say.
        bytes: &'a [u8],
        /// The type by the header's name.
        dtype: String,
    },
    /// The bytes of another file's tensor, piece by piece.
    Stored(&'a StoredTensor),
}

impl OutTensor<'_> {
    pub(super) fn dtype(&self) -> &str {
        match &self.content {
            Content::F64 { dtype, .. } | Content::F32 { dtype, .. } | Content::Values { dtype, .. } => {
                match dtype {
                    DType::F64 => "F64",
                    DType::F32 => "F32",
                    DType::F16 => "F16",
                    DType::Bf16 => "BF16",
                    DType::F8E4M3 | DType::F8E5M2 => "",
                }
            }
            Content::Raw { dtype, .. } => dtype,
            Content::Stored(tensor) => &tensor.info.dtype,
        }
    }

    pub(super) fn shape(&self) -> &[usize] {
        if let Content::Stored(tensor) = &self.content { &tensor.info.shape } else { &self.shape }
    }

    /// Bytes that it takes, if everything about it fits together.
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
            Content::Raw { bytes, .. } => bytes.len() == len,
            Content::Stored(_) => true,
        };
        if given { Ok(len) } else { fail(format!("its values do not fill shape {:?}", self.shape)) }
    }
}
