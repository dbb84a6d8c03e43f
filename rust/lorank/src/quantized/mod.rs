//! Quantized matrices of files, which are decoded to float32 whenever they are loaded.
//!
//! A quantized matrix consists of codes and of further tensors, such as scales and zero points. A scheme
//! checks types and shapes of all of them when a matrix is opened ([`open`]), and decodes blocks of the
//! matrix when it is loaded. Only the bytes of one matrix are read, also from a stack of experts.
//!
//! To add a scheme, implement [`Decoder`](decoder::Decoder) in a file of its own and add a row to [`SCHEMES`].

mod awq;
mod bits;
mod bitsandbytes;
mod decoder;
mod float_codes;
mod fp4;
mod fp8;
pub mod gguf;
mod gptq;
mod grid;
mod group_order;
mod numbers;
mod packed_integers;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::Result;
use crate::matrix::dtype::DType;
use crate::quantized::decoder::{Dequantized, Plan, Stack};
pub use crate::quantized::request::Request;
use crate::storage::source::StoredMatrix;

type Constructor = fn(&Request) -> Result<Plan>;

/// The constructor of every scheme by its name.
const SCHEMES: &[(&str, Constructor)] = &[
    ("awq", awq::plan),
    ("bitsandbytes-4bit", bitsandbytes::four_bits),
    ("bitsandbytes-int8", bitsandbytes::int8),
    ("fp8", fp8::floats),
    ("gguf", gguf::plan),
    ("gptq", gptq::plan),
    ("int8", fp8::integers),
    ("mxfp4", fp4::mxfp4),
    ("nvfp4-divide", fp4::divided),
    ("nvfp4-multiply", fp4::multiplied),
    ("packed-integers", packed_integers::plan),
];

/// Returns the names of all schemes.
pub fn schemes() -> impl Iterator<Item = &'static str> {
    SCHEMES.iter().map(|&(name, _)| name)
}

/// Opens a quantized matrix, or the consecutive matrices of a stack, as a float32 matrix of shape `view`.
///
/// # Errors
/// [`Error::Format`](crate::Error::Format) if a tensor has a type or shape that does not fit the scheme, and
/// [`Error::InvalidInput`](crate::Error::InvalidInput) for an unknown scheme or setting.
pub fn open(request: &Request, count: usize, view: (usize, usize)) -> Result<StoredMatrix> {
    let constructor = SCHEMES.iter().find(|(name, _)| *name == request.scheme).map(|&(_, found)| found);
    let Some(constructor) = constructor else {
        return Err(
            request.invalid(format!("unknown scheme; the schemes are {:?}", schemes().collect::<Vec<_>>()))
        );
    };
    let size = request.shape.0.checked_mul(request.shape.1).and_then(|n| n.checked_mul(count));
    if count == 0 || size.is_none() || size != view.0.checked_mul(view.1) {
        let reason = format!("{count} matrices of shape {:?} have no view of shape {view:?}", request.shape);
        return Err(request.invalid(reason));
    }
    let mut matrices = Vec::new();
    for index in request.index..request.index.saturating_add(count) {
        matrices.push(Dequantized::new(constructor(&Request { index, ..request.clone() })?, request.shape)?);
    }
    Ok(StoredMatrix::computed(Arc::new(Stack(matrices)), DType::F32, view))
}
