//! Codes of which each is a number, times a scale of the block that contains it.
//!
//! Scales form a grid of blocks, which may be ragged at the last rows and columns: the value of row `i` and
//! column `j` is `code[i, j] * scale[i / rows_of_a_block, j / cols_of_a_block]` in float32, rounded once. With
//! zero points the value is `(code - zero) * scale`.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::Result;
use crate::kernels::simd::dispatch;
use crate::quantized::bits::unpack;
use crate::quantized::decoder::{Decoder, as_f32};
use crate::quantized::float_codes::{e2m1, e4m3, e5m2};
use crate::quantized::numbers::ScaleType;
use crate::quantized::request::{Input, Request, elements_of};
use crate::storage::checkpoint::StoredTensor;

/// Side of the blocks of most fp8 checkpoints, for grids that fit no even division.
const USUAL_BLOCK: usize = 128;

/// Number of 4-bit codes that are unpacked at once.
const STAGE: usize = 128;

/// The blocks of a matrix that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Number of rows and of columns of the grid.
    pub shape: (usize, usize),
    /// Number of rows and of columns of a block.
    pub block: (usize, usize),
}

impl Grid {
    /// Returns the grid of a tensor of scales for one of `count` matrices of shape `(rows, cols)`, and the
    /// bytes of the matrix's own scales.
    ///
    /// The tensor may have a scale for all matrices, for every matrix, row, or column, or for every block.
    pub(crate) fn of(
        request: &Request,
        scales: &StoredTensor,
        (rows, cols): (usize, usize),
        count: usize,
        declared: Option<(usize, usize)>,
    ) -> Result<(Self, Input)> {
        let shape = &scales.info.shape[..];
        let fail = || {
            let blocks = declared.map_or(String::new(), |block| format!(" of the declared shape {block:?}"));
            let reason =
                format!("has shape {shape:?}, which does not divide {rows} x {cols} into blocks{blocks}");
            request.refuse(scales, reason)
        };
        if elements_of(scales) == 1 {
            let own = Input { tensor: scales.clone(), start: 0, len: scales.info.len };
            return Ok((Self { shape: (1, 1), block: (rows, cols) }, own));
        }
        let own = match shape {
            [first, rest @ ..] if count > 1 && *first == count => rest,
            [1, rest @ ..] if count == 1 && shape.len() == 3 => rest,
            _ if count > 1 => return Err(fail()),
            _ => shape,
        };
        let grid = match *own {
            [] | [1] => (1, 1),
            [n] if n == rows => (n, 1),
            [n] if n == cols => (1, n),
            [m, n] => (m, n),
            _ => return Err(fail()),
        };
        let sides = [(grid.0, rows, declared.map(|d| d.0)), (grid.1, cols, declared.map(|d| d.1))];
        let [Some(height), Some(width)] = sides.map(|(count, size, side)| side_of(count, size, side)) else {
            return Err(fail());
        };
        Ok((Self { shape: grid, block: (height, width) }, request.own(scales, grid.0 * grid.1, count)?))
    }
}

/// Returns the side of `count` blocks that cover `size` elements; `None` if no side fits.
pub(crate) fn side_of(count: usize, size: usize, declared: Option<usize>) -> Option<usize> {
    let fits = |side: &usize| size.div_ceil(*side) == count;
    match count {
        0 => None,
        _ if declared.is_some() => declared.filter(fits),
        1 => Some(size.max(1)),
        _ if size.is_multiple_of(count) => Some(size / count),
        _ => Some(USUAL_BLOCK).filter(fits),
    }
}

/// The numbers that codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    E4M3,
    E5M2,
    I8,
    /// Two codes per byte, the low four bits first.
    E2M1,
}

/// A number by which all scales are divided or multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overall {
    None,
    Divides,
    Multiplies,
}

/// Positions of the inputs.
const CODES: usize = 0;
const SCALES: usize = 1;
const THIRD: usize = 2;

/// Decodes codes on a grid of scales. The inputs are codes, scales, and zero points or the overall scale.
pub(crate) struct OnGrid {
    pub code: Code,
    pub scale: ScaleType,
    pub grid: Grid,
    pub overall: Overall,
    /// True if the third input has a zero point of type I8 for every scale.
    pub has_zeros: bool,
    /// Number of columns of the matrix.
    pub cols: usize,
}

impl Decoder for OnGrid {
    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        dispatch(Kernel { by: self, inputs, rows, cols, out });
    }
}

impl OnGrid {
    #[inline(always)]
    fn scale_at(&self, inputs: &[&[u8]], overall: f32, at: usize) -> f32 {
        let own = self.scale.at(inputs[SCALES], at);
        match self.overall {
            Overall::None => own,
            Overall::Divides => own / overall,
            Overall::Multiplies => own * overall,
        }
    }
}

struct Kernel<'a> {
    by: &'a OnGrid,
    inputs: &'a [&'a [u8]],
    rows: Range<usize>,
    cols: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for Kernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.by.code {
            Code::E4M3 => self.run(|bytes, out, zero, scale| each(bytes, out, |b| (e4m3(b) - zero) * scale)),
            Code::E5M2 => self.run(|bytes, out, zero, scale| each(bytes, out, |b| (e5m2(b) - zero) * scale)),
            Code::I8 => self.run(|bytes, out, zero, scale| {
                each(bytes, out, |b| (f32::from(b.cast_signed()) - zero) * scale);
            }),
            Code::E2M1 => self.run(|bytes, out, _, scale| {
                let mut codes = [0; STAGE];
                for (out, bytes) in out.chunks_mut(STAGE).zip(bytes.chunks(STAGE / 2)) {
                    let codes = &mut codes[..out.len()];
                    unpack(bytes, 4, 0, codes);
                    each(codes, out, |code| e2m1(code) * scale);
                }
            }),
        }
    }
}

impl Kernel<'_> {
    #[inline(always)]
    fn run(self, segment: impl Fn(&[u8], &mut [f32], f32, f32)) {
        let Self { by, inputs, rows, cols, out } = self;
        let per_byte = if by.code == Code::E2M1 { 2 } else { 1 };
        let overall = if by.overall == Overall::None { 1.0 } else { as_f32(inputs[THIRD], 0) };
        let (height, width) = by.grid.block;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            let first = row / height * by.grid.shape.1;
            let mut col = cols.start;
            while col < cols.end {
                let block = col / width;
                let end = cols.end.min((block + 1) * width);
                let scale = by.scale_at(inputs, overall, first + block);
                let zero =
                    if by.has_zeros { f32::from(inputs[THIRD][first + block].cast_signed()) } else { 0.0 };
                let bytes = (row * by.cols + col) / per_byte..(row * by.cols + end) / per_byte;
                let place = col - cols.start..end - cols.start;
                segment(&inputs[CODES][bytes], &mut out[place], zero, scale);
                col = end;
            }
        }
    }
}

#[inline(always)]
fn each(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    for (x, &b) in out.iter_mut().zip(bytes) {
        *x = value(b);
    }
}
