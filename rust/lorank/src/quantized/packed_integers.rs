//! Integers of 2 to 8 bits in words of 32 bits, as compressed-tensors packs them.
//!
//! The codes of a row follow each other without gaps, so that codes of 3, 5, 6 and 7 bits cross words. A code
//! `q` stands for `q - 2^(bits - 1)`. The value is `(q - zero) * scale`, both of the group of the column.
//! Zero points are codes that are packed along rows, or plain integers. Defined by
//! `compressors/pack_quantized` of compressed-tensors.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::Result;
use crate::kernels::simd::dispatch;
use crate::quantized::bits::unpack;
use crate::quantized::decoder::{Decoder, Plan};
use crate::quantized::grid::Grid;
use crate::quantized::group_order::GroupOrder;
use crate::quantized::numbers::ScaleType;
use crate::quantized::request::{Request, elements_of};

/// Number of codes that are unpacked at once.
const STAGE: usize = 512;

/// Positions of the inputs; the others follow.
const CODES: usize = 0;
const SCALES: usize = 1;

/// The layout of zero points.
#[derive(Clone, Copy)]
enum Zeros {
    None,
    /// Plain integers, as many as scales.
    Plain,
    /// Codes in words along rows.
    Packed,
}

struct Packed {
    bits: usize,
    scale: ScaleType,
    grid: Grid,
    zeros: (Zeros, usize),
    order: GroupOrder,
    /// Number of words of a row.
    words: usize,
}

/// Plans a matrix of packed integers.
pub(crate) fn plan(request: &Request) -> Result<Plan> {
    let (rows, cols) = request.shape;
    let codes = request.codes()?;
    request.check_type(codes, &["I32"])?;
    let bits = request.bits()?;
    let words = cols.saturating_mul(bits).div_ceil(32);
    let count = request.stacked(rows.saturating_mul(words))?;
    let scales = request.part("scales")?;
    let declared = request.size("group_size")?.map(|size| (1, size));
    let (grid, own) = Grid::of(request, scales, request.shape, count, declared)?;
    let scale = ScaleType::of(request, scales)?;
    let mut inputs = vec![request.own(codes, rows * words, count)?, own];
    let mut zeros = (Zeros::None, 0);
    if let Some(tensor) = request.parts.get("zeros") {
        request.check_type(tensor, &["I32", "I8"])?;
        let plain = grid.shape.0 * grid.shape.1;
        let packed = grid.shape.0.saturating_mul(bits).div_ceil(32) * grid.shape.1;
        let is_packed = tensor.info.dtype == "I32";
        let size = if is_packed { packed } else { plain };
        let own = if elements_of(tensor) == size { 1 } else { count };
        zeros = (if is_packed { Zeros::Packed } else { Zeros::Plain }, inputs.len());
        inputs.push(request.own(tensor, size, own)?);
    }
    let order = GroupOrder::of(request, cols, grid.shape.1, count, &mut inputs)?;
    let decoder = Packed { bits, scale, grid, zeros, order, words };
    Ok(Plan { inputs, stored: request.shape, is_transposed: false, decoder: Box::new(decoder) })
}

impl Decoder for Packed {
    fn check(&self, inputs: &[&[u8]]) -> std::result::Result<(), (usize, String)> {
        self.order.check(inputs)
    }

    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        dispatch(Kernel { by: self, inputs, rows, cols, out });
    }
}

impl Packed {
    /// Returns the number to subtract from the codes of a group, and the scale.
    #[inline(always)]
    fn group(&self, inputs: &[&[u8]], row: usize, group: usize) -> (f32, f32) {
        let first = row / self.grid.block.0;
        let at = first * self.grid.shape.1 + group;
        let scale = self.scale.at(inputs[SCALES], at);
        let middle = f32::from(1u8 << (self.bits - 1));
        let zero = match self.zeros {
            (Zeros::None, _) => middle,
            (Zeros::Plain, input) => middle + f32::from(inputs[input][at].cast_signed()),
            (Zeros::Packed, input) => f32::from(self.packed_zero(inputs[input], first, group)),
        };
        (zero, scale)
    }

    /// Returns the code of a zero point. Words have one column per group, and codes follow each other along
    /// rows.
    #[inline(always)]
    fn packed_zero(&self, zeros: &[u8], row: usize, group: usize) -> u8 {
        let words = zeros.as_chunks::<4>().0;
        let word = |at: usize| {
            words.get(at * self.grid.shape.1 + group).map_or(0, |&bytes| u64::from(u32::from_le_bytes(bytes)))
        };
        let start = row * self.bits;
        let both = (word(start / 32) | word(start / 32 + 1) << 32) >> (start % 32);
        both.to_le_bytes()[0] & u8::MAX >> (8 - self.bits)
    }
}

struct Kernel<'a> {
    by: &'a Packed,
    inputs: &'a [&'a [u8]],
    rows: Range<usize>,
    cols: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for Kernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { by, inputs, rows, cols, out } = self;
        let mut stage = [0; STAGE];
        let size = 4 * by.words;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            let codes = &inputs[CODES][row * size..][..size];
            for (first, out) in cols.clone().step_by(STAGE).zip(out.chunks_mut(STAGE)) {
                let stage = &mut stage[..out.len()];
                unpack(codes, by.bits, first, stage);
                if by.order.is_given(inputs) {
                    for (i, (x, &q)) in out.iter_mut().zip(&*stage).enumerate() {
                        let (zero, scale) = by.group(inputs, row, by.order.at(inputs, first + i));
                        *x = (f32::from(q) - zero) * scale;
                    }
                    continue;
                }
                let width = by.grid.block.1;
                let mut done = 0;
                while done < out.len() {
                    let group = (first + done) / width;
                    let end = out.len().min((group + 1) * width - first);
                    let (zero, scale) = by.group(inputs, row, group);
                    for (x, &q) in out[done..end].iter_mut().zip(&stage[done..end]) {
                        *x = (f32::from(q) - zero) * scale;
                    }
                    done = end;
                }
            }
        }
    }
}
