//! The group of every column, which libraries store if they quantize columns in the order of activations.

use crate::Result;
use crate::quantized::request::{Input, Request};

/// The groups of the elements along the dimension that is divided into groups.
pub(crate) struct GroupOrder {
    /// Position of the input with the indices; `None` if groups are consecutive.
    input: Option<usize>,
    /// Number of groups.
    groups: usize,
}

impl GroupOrder {
    /// Returns the order that a tensor in the role `order` gives, and appends its bytes to the inputs.
    pub(crate) fn of(
        request: &Request,
        size: usize,
        groups: usize,
        count: usize,
        inputs: &mut Vec<Input>,
    ) -> Result<Self> {
        let Some(tensor) = request.parts.get("order") else { return Ok(Self { input: None, groups }) };
        request.check_type(tensor, &["I32"])?;
        inputs.push(request.own(tensor, size, count)?);
        Ok(Self { input: Some(inputs.len() - 1), groups })
    }

    /// Checks that all indices are groups. Indices of -1 stand for consecutive groups.
    pub(crate) fn check(&self, inputs: &[&[u8]]) -> std::result::Result<(), (usize, String)> {
        let Some(input) = self.input else { return Ok(()) };
        if !self.is_given(inputs) {
            return Ok(());
        }
        let indices = inputs[input].as_chunks::<4>().0;
        for (place, &index) in indices.iter().enumerate() {
            let index = i32::from_le_bytes(index);
            if usize::try_from(index).map_or(true, |index| index >= self.groups) {
                let groups = self.groups;
                return Err((
                    input,
                    format!("has group {index} at position {place}, but there are {groups} groups"),
                ));
            }
        }
        Ok(())
    }

    /// Returns true if the indices determine the groups.
    #[inline]
    pub(crate) fn is_given(&self, inputs: &[&[u8]]) -> bool {
        self.input.is_some_and(|input| !inputs[input].starts_with(&[0xff; 4]))
    }

    /// Returns the group at a position, if the order [`is_given`](Self::is_given).
    #[inline]
    pub(crate) fn at(&self, inputs: &[&[u8]], at: usize) -> usize {
        let index = |input: usize| u32::from_le_bytes(inputs[input].as_chunks::<4>().0[at]);
        self.input.map_or(0, |input| index(input) as usize)
    }
}
