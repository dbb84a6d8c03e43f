//! Decoding of one matrix, block by block.

use std::ops::Range;

use pulp::bytemuck::{cast_slice_mut, try_cast_slice_mut};

use crate::exec::aligned_bytes::AlignedBytes;
use crate::exec::cancel::CancelToken;
use crate::quantized::request::Input;
use crate::storage::source::{Buffer, Computed, Parts};
use crate::{Error, Result};

/// Side of the square blocks in which a transposed matrix is decoded. Blocks begin at its multiples.
pub(crate) const SIDE: usize = 64;

/// Largest number of values of a block.
const BLOCK: usize = 1 << 15;

const MEMORY: &str = "a block of a quantized matrix";

/// A scheme of one matrix, with checked types and shapes.
pub(crate) trait Decoder: Send + Sync {
    /// Checks the values of the inputs on which [`decode`](Self::decode) relies. An error has the position of
    /// the input.
    fn check(&self, inputs: &[&[u8]]) -> std::result::Result<(), (usize, String)> {
        let _ = inputs;
        Ok(())
    }

    /// Decodes a block of rows and columns to `out`, row by row. The first column is a multiple of [`SIDE`].
    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]);
}

/// The inputs and the decoder of one matrix.
pub(crate) struct Plan {
    /// The bytes that the decoder reads.
    pub inputs: Vec<Input>,
    /// Shape in which the codes are stored.
    pub stored: (usize, usize),
    /// True if the matrix is the transpose of the stored one.
    pub is_transposed: bool,
    /// The decoder of blocks of the stored matrix.
    pub decoder: Box<dyn Decoder>,
}

/// A quantized matrix of a file.
pub(crate) struct Dequantized(Plan);

impl Dequantized {
    /// Returns the matrix of a plan, after a comparison of its shape with the requested one.
    pub(crate) fn new(plan: Plan, shape: (usize, usize)) -> Result<Self> {
        let (rows, cols) = plan.stored;
        let found = if plan.is_transposed { (cols, rows) } else { (rows, cols) };
        if found == shape {
            return Ok(Self(plan));
        }
        Err(Error::Internal(format!("a plan of shape {found:?} for a matrix of shape {shape:?}")))
    }

    const fn len(&self) -> usize {
        self.0.stored.0 * self.0.stored.1 // checked on opening
    }

    /// Reads the inputs and decodes the matrix to `out`.
    fn compute(&self, out: &mut [f32], parts: &mut Parts, cancel: &CancelToken) -> Result<()> {
        let Plan { inputs, stored: (rows, cols), is_transposed, decoder } = &self.0;
        if parts.buffers.len() <= inputs.len() {
            parts.buffers.resize_with(inputs.len() + 1, Buffer::default);
        }
        let [tile, buffers @ ..] = &mut parts.buffers[..] else { return Ok(()) };
        let mut bytes: Vec<&[u8]> = Vec::with_capacity(inputs.len());
        for (Input { tensor, start, len }, buffer) in inputs.iter().zip(buffers) {
            bytes.push(tensor.file.read_into(&mut buffer.bytes, &tensor.info, *start, *len, cancel)?);
        }
        decoder.check(&bytes).map_err(|(input, reason)| {
            let tensor = &inputs[input].tensor;
            Error::tensor(tensor.file.path(), &tensor.info.name, reason)
        })?;
        let tile = numbers(&mut tile.bytes, SIDE * SIDE)?;
        if *is_transposed {
            transposed(&**decoder, &bytes, (*rows, *cols), out, tile, cancel)
        } else {
            in_order(&**decoder, &bytes, (*rows, *cols), out, cancel)
        }
    }
}

/// Consecutive matrices of a stack.
pub(crate) struct Stack(pub Vec<Dequantized>);

impl Computed for Stack {
    fn compute(&self, out: &mut [u8], parts: &mut Parts, cancel: &CancelToken) -> Result<()> {
        if let Ok(values) = try_cast_slice_mut(out) {
            return self.decode(values, parts, cancel);
        }
        // Memory of a caller that is not aligned for numbers.
        let mut aligned = AlignedBytes::default();
        self.decode(numbers(&mut aligned, out.len() / size_of::<f32>())?, parts, cancel)?;
        out.copy_from_slice(&aligned.bytes()[..out.len()]);
        Ok(())
    }
}

impl Stack {
    fn decode(&self, mut out: &mut [f32], parts: &mut Parts, cancel: &CancelToken) -> Result<()> {
        for matrix in &self.0 {
            let (own, rest) = out.split_at_mut(matrix.len());
            matrix.compute(own, parts, cancel)?;
            out = rest;
        }
        Ok(())
    }
}

/// Decodes a matrix in its stored order.
fn in_order(
    decoder: &dyn Decoder,
    inputs: &[&[u8]],
    (rows, cols): (usize, usize),
    out: &mut [f32],
    cancel: &CancelToken,
) -> Result<()> {
    let (height, width) = if cols <= BLOCK { ((BLOCK / cols.max(1)).max(1), cols) } else { (1, BLOCK) };
    let mut out = out;
    for row in (0..rows).step_by(height) {
        let rows = row..rows.min(row + height);
        for col in (0..cols).step_by(width) {
            cancel.check()?;
            let cols = col..cols.min(col + width);
            let (block, rest) = out.split_at_mut(rows.len() * cols.len());
            decoder.decode(inputs, rows.clone(), cols, block);
            out = rest;
        }
    }
    Ok(())
}

/// Decodes the transpose of a stored matrix, in square blocks.
fn transposed(
    decoder: &dyn Decoder,
    inputs: &[&[u8]],
    (rows, cols): (usize, usize),
    out: &mut [f32],
    tile: &mut [f32],
    cancel: &CancelToken,
) -> Result<()> {
    for col in (0..cols).step_by(SIDE) {
        cancel.check()?;
        let width = SIDE.min(cols - col);
        for row in (0..rows).step_by(SIDE) {
            let height = SIDE.min(rows - row);
            let block = &mut tile[..height * width];
            decoder.decode(inputs, row..row + height, col..col + width, block);
            for j in 0..width {
                let to = &mut out[(col + j) * rows + row..][..height];
                to.iter_mut().zip(block[j..].iter().step_by(width)).for_each(|(to, from)| *to = *from);
            }
        }
    }
    Ok(())
}

/// Returns `count` numbers in a reusable buffer.
fn numbers(buffer: &mut AlignedBytes, count: usize) -> Result<&mut [f32]> {
    let size = count * size_of::<f32>();
    let memory = buffer.reserve(size, 0).ok_or_else(|| Error::no_memory(size, MEMORY))?;
    Ok(cast_slice_mut(&mut memory[..size]))
}

/// Returns the float32 numbers of an input.
pub(crate) fn as_f32(bytes: &[u8], at: usize) -> f32 {
    let (elements, _) = bytes.as_chunks::<4>();
    f32::from_le_bytes(elements[at])
}
