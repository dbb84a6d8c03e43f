//! The formats of bitsandbytes: tables of 16 values with a scale for every block, and integers of 8 bits.
//!
//! - 4 bits: the codes of the whole tensor follow each other, two per byte, the high four bits first. The
//!   value is `map[code] * absmax[block]`. Nested statistics are codes, too:
//!   `absmax = nested_map[code] * nested_absmax[block] + offset`.
//! - 8 bits: `code * SCB[row] * (1 / 127)`, with the reciprocal in float32.
//!
//! Defined by `functional.py` and `_ops.py` of bitsandbytes.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::Result;
use crate::kernels::simd::dispatch;
use crate::quantized::decoder::{Decoder, Plan, as_f32};
use crate::quantized::float_codes::pairs;
use crate::quantized::request::{Input, Request, element_size, elements_of};

/// Positions of the inputs.
const CODES: usize = 0;
const ABSMAX: usize = 1;
const MAP: usize = 2;
const NESTED_ABSMAX: usize = 3;
const NESTED_MAP: usize = 4;

/// The reciprocal of 127 by which bitsandbytes multiplies.
const RECIPROCAL: f32 = 7.874_016e-3;

/// Nested statistics.
struct Nested {
    /// Number of codes of a block.
    block: usize,
    offset: f32,
}

struct FourBits {
    /// Number of codes of a block.
    block: usize,
    /// Position of the first element of the matrix among the codes that are read.
    first: usize,
    /// Position of the first element of the matrix in the tensor, which decides its block.
    start: usize,
    nested: Option<Nested>,
    cols: usize,
}

/// Plans a matrix of 4-bit codes.
pub(crate) fn four_bits(request: &Request) -> Result<Plan> {
    let (rows, cols) = request.shape;
    let size = rows.saturating_mul(cols);
    let codes = request.codes()?;
    let capacity = 2 * codes.info.len;
    let (start, end) = (size.saturating_mul(request.index), size.saturating_mul(request.index + 1));
    if size == 0 || end > capacity || element_size(codes) == 0 {
        let reason = format!(
            "holds {capacity} codes, too few for matrix {} of shape {:?}",
            request.index, request.shape
        );
        return Err(request.refuse(codes, reason));
    }
    let Some(block) = request.size("block_size")? else {
        return Err(request.refuse(codes, "its state has no size of blocks"));
    };
    let whole = |tensor: &crate::storage::checkpoint::StoredTensor| Input {
        tensor: tensor.clone(),
        start: 0,
        len: tensor.info.len,
    };
    let at_least = |role: &str, types: &[&str], count: usize| {
        let tensor = request.part(role)?;
        request.check_type(tensor, types)?;
        if elements_of(tensor) >= count {
            return Ok(whole(tensor));
        }
        let reason = format!("has {} values, expected {count}", elements_of(tensor));
        Err(request.refuse(tensor, reason))
    };
    let is_nested = request.parts.contains_key("nested_absmax");
    let blocks = end.div_ceil(block);
    let bytes = Input { tensor: codes.clone(), start: start / 2, len: end.div_ceil(2) - start / 2 };
    let absmax = at_least("absmax", if is_nested { &["U8"] } else { &["F32"] }, blocks)?;
    let mut inputs = vec![bytes, absmax, at_least("map", &["F32"], 16)?];
    let mut nested = None;
    if is_nested {
        let Some(block) = request.size("nested_block_size")? else {
            return Err(request.refuse(codes, "its state has no size of nested blocks"));
        };
        inputs.push(at_least("nested_absmax", &["F32"], blocks.div_ceil(block))?);
        inputs.push(at_least("nested_map", &["F32"], 256)?);
        #[allow(clippy::cast_possible_truncation)] // bitsandbytes reads the offset as float32.
        let offset = request.settings.get("offset").copied().unwrap_or(0.0) as f32;
        nested = Some(Nested { block, offset });
    }
    let decoder = FourBits { block, first: start % 2, start, nested, cols };
    Ok(Plan { inputs, stored: request.shape, is_transposed: false, decoder: Box::new(decoder) })
}

impl Decoder for FourBits {
    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let mut values = [0.0; 16];
        values.iter_mut().enumerate().for_each(|(i, x)| *x = as_f32(inputs[MAP], i));
        let table = pairs(&values);
        dispatch(Kernel { by: self, inputs, table: &table, rows, cols, out });
    }
}

impl FourBits {
    #[inline(always)]
    fn absmax(&self, inputs: &[&[u8]], block: usize) -> f32 {
        let Some(Nested { block: size, offset }) = &self.nested else { return as_f32(inputs[ABSMAX], block) };
        let code = usize::from(inputs[ABSMAX][block]);
        as_f32(inputs[NESTED_MAP], code) * as_f32(inputs[NESTED_ABSMAX], block / size) + offset
    }
}

struct Kernel<'a> {
    by: &'a FourBits,
    inputs: &'a [&'a [u8]],
    table: &'a [[f32; 2]; 256],
    rows: Range<usize>,
    cols: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for Kernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { by, inputs, table, rows, cols, out } = self;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            let start = row * by.cols + cols.start;
            let mut done = 0;
            while done < out.len() {
                // Positions in the tensor decide the block, and positions among the codes the byte.
                let block = (by.start + start + done) / by.block;
                let end = out.len().min((block + 1) * by.block - by.start - start);
                let scale = by.absmax(inputs, block);
                decode(inputs[CODES], by.first + start + done, table, scale, &mut out[done..end]);
                done = end;
            }
        }
    }
}

/// Decodes consecutive codes of a block.
#[inline(always)]
fn decode(codes: &[u8], first: usize, table: &[[f32; 2]; 256], scale: f32, out: &mut [f32]) {
    let (odd, out) = out.split_at_mut((first % 2).min(out.len()));
    let bytes = &codes[first / 2..];
    if let [odd] = odd {
        *odd = table[usize::from(bytes[0])][1] * scale;
    }
    let bytes = &bytes[odd.len()..];
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(bytes) {
        *pair = table[usize::from(byte)].map(|value| value * scale);
    }
    if let [last] = last {
        *last = table[usize::from(bytes[pairs.len()])][0] * scale;
    }
}

struct Int8 {
    cols: usize,
}

/// Plans a matrix of 8-bit integers with one scale per row.
pub(crate) fn int8(request: &Request) -> Result<Plan> {
    let (rows, cols) = request.shape;
    let (codes, scales) = (request.codes()?, request.part("scales")?);
    request.check_type(codes, &["I8"])?;
    request.check_type(scales, &["F32"])?;
    let count = request.stacked(rows.saturating_mul(cols))?;
    let inputs = vec![request.own(codes, rows * cols, count)?, request.own(scales, rows, count)?];
    Ok(Plan { inputs, stored: request.shape, is_transposed: false, decoder: Box::new(Int8 { cols }) })
}

impl Decoder for Int8 {
    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        dispatch(IntKernel { cols_of_all: self.cols, inputs, rows, cols, out });
    }
}

struct IntKernel<'a> {
    cols_of_all: usize,
    inputs: &'a [&'a [u8]],
    rows: Range<usize>,
    cols: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for IntKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { cols_of_all, inputs, rows, cols, out } = self;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            let scale = as_f32(inputs[ABSMAX], row);
            let codes = &inputs[CODES][row * cols_of_all + cols.start..][..cols.len()];
            for (x, &q) in out.iter_mut().zip(codes) {
                *x = f32::from(q.cast_signed()) * scale * RECIPROCAL;
            }
        }
    }
}
