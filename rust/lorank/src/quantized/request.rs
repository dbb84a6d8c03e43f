//! The tensors and settings of a quantized matrix, and checks of their types and shapes.

use std::collections::BTreeMap;

use crate::storage::checkpoint::StoredTensor;
use crate::storage::safetensors::bits_per_element;
use crate::{Error, Result};

/// The tensors and settings from which a quantized matrix is decoded.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of the scheme: see [`schemes`](crate::quantized::schemes).
    pub scheme: String,
    /// The tensors by their role. Every scheme has `codes`.
    pub parts: BTreeMap<String, StoredTensor>,
    /// Numbers that the scheme needs besides the tensors, such as the size of a block.
    pub settings: BTreeMap<String, f64>,
    /// Shape of the decoded matrix.
    pub shape: (usize, usize),
    /// Position of the matrix in its stack; 0 for a single matrix.
    pub index: usize,
}

/// A range of the bytes of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub tensor: StoredTensor,
    pub start: usize,
    pub len: usize,
}

impl Request {
    /// Returns the tensor of a role.
    pub(crate) fn part(&self, role: &str) -> Result<&StoredTensor> {
        self.parts.get(role).ok_or_else(|| self.invalid(format!("there is no tensor for `{role}`")))
    }

    /// Returns the tensor of codes.
    pub(crate) fn codes(&self) -> Result<&StoredTensor> {
        self.part("codes")
    }

    /// Returns a setting as a positive integer; `None` if it is missing.
    pub(crate) fn size(&self, name: &str) -> Result<Option<usize>> {
        let Some(&value) = self.settings.get(name) else { return Ok(None) };
        if value < 1.0 || value > f64::from(u32::MAX) || value.fract() != 0.0 {
            return Err(self.invalid(format!("`{name}` is {value}, not a positive integer")));
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Checked above.
        Ok(Some(value as usize))
    }

    /// Returns the number of bits of a code.
    pub(crate) fn bits(&self) -> Result<usize> {
        match self.size("bits")? {
            Some(bits @ 1..=8) => Ok(bits),
            found => Err(self.invalid(format!("`bits` is {found:?}, expected 1 to 8"))),
        }
    }

    /// Returns true if a setting is present and not zero.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.settings.get(name).is_some_and(|&value| value != 0.0)
    }

    /// Returns an error about the request, with the file and tensor of the codes if there are any.
    pub(crate) fn invalid(&self, reason: String) -> Error {
        match self.parts.get("codes") {
            Some(codes) => self.refuse(codes, reason),
            None => Error::InvalidInput(format!("{}: {reason}", self.scheme)),
        }
    }

    /// Returns an error about a tensor.
    pub(crate) fn refuse(&self, tensor: &StoredTensor, reason: impl std::fmt::Display) -> Error {
        let reason = format!("{reason} ({})", self.scheme);
        Error::tensor(tensor.file.path(), &tensor.info.name, reason)
    }

    /// Checks the element type of a tensor.
    pub(crate) fn check_type(&self, tensor: &StoredTensor, types: &[&str]) -> Result<()> {
        if types.contains(&tensor.info.dtype.as_str()) {
            return Ok(());
        }
        Err(self.refuse(tensor, format!("has type {}, expected {}", tensor.info.dtype, types.join(" or "))))
    }

    /// Returns the number of matrices in the codes, given the number of elements of one matrix.
    pub(crate) fn stacked(&self, elements: usize) -> Result<usize> {
        let codes = self.codes()?;
        let found = elements_of(codes);
        let count = found.checked_div(elements).unwrap_or(0);
        if count == 0 || !found.is_multiple_of(elements) || self.index >= count {
            let (index, shape) = (self.index, self.shape);
            let reason = format!(
                "has shape {:?}, which does not hold matrix {index} of shape {shape:?}",
                codes.info.shape
            );
            return Err(self.refuse(codes, reason));
        }
        Ok(count)
    }

    /// Returns the part of a tensor that belongs to this matrix, one of `count`, of which each has `elements`
    /// elements.
    pub(crate) fn own(&self, tensor: &StoredTensor, elements: usize, count: usize) -> Result<Input> {
        let whole = elements.checked_mul(count);
        if whole != Some(elements_of(tensor)) || elements == 0 {
            let whole = if count == 1 { elements.to_string() } else { format!("{count} x {elements}") };
            let reason = format!("has shape {:?}, expected {whole} elements", tensor.info.shape);
            return Err(self.refuse(tensor, reason));
        }
        let len = tensor.info.len / count;
        Ok(Input { tensor: tensor.clone(), start: self.index * len, len })
    }
}

/// Returns the number of elements of a tensor.
pub(crate) fn elements_of(tensor: &StoredTensor) -> usize {
    tensor.info.shape.iter().product() // The header was checked: the product fits the file.
}

/// Returns the size of an element of a tensor in bytes; 0 for types smaller than a byte.
pub(crate) fn element_size(tensor: &StoredTensor) -> usize {
    bits_per_element(&tensor.info.dtype).map_or(0, |bits| usize::try_from(bits / 8).unwrap_or(0))
}
