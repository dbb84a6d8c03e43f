//! Block types of GGUF files, of which each packs 32, 64 or 256 consecutive values of a row.
//!
//! Every type has its formula in a file of its family. Products and sums are rounded to float32 in the order of
//! `quants.py` of the `gguf` package, which defines the types. To add a type, implement [`Block`] and add a row
//! to [`TYPES`].

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

mod float4;
mod grids;
mod iq1;
mod iq2;
mod iq3;
mod iq4;
mod k_types;
mod old_types;
mod ternary;

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;
use pulp::{Simd, WithSimd};

use crate::Result;
use crate::kernels::simd::dispatch;
use crate::quantized::decoder::{Decoder, Plan};
use crate::quantized::request::Request;

/// A type of blocks of `BYTES` bytes and `LEN` values.
trait Block<const BYTES: usize, const LEN: usize>: Send + Sync + 'static {
    /// Decodes a block. Must be inlined.
    fn decode(block: &[u8; BYTES], out: &mut [f32; LEN]);
}

/// A type in a table: name, values of a block, and constructor of the decoder.
type Row = (&'static str, usize, fn(usize) -> Box<dyn Decoder>);

/// Every type that has a formula.
const TYPES: &[Row] = &[
    row::<iq1::S, 50, 256>("IQ1_S"),
    row::<iq1::M, 56, 256>("IQ1_M"),
    row::<iq2::Xxs, 66, 256>("IQ2_XXS"),
    row::<iq2::Xs, 74, 256>("IQ2_XS"),
    row::<iq2::S, 82, 256>("IQ2_S"),
    row::<iq3::Xxs, 98, 256>("IQ3_XXS"),
    row::<iq3::S, 110, 256>("IQ3_S"),
    row::<iq4::Nl, 18, 32>("IQ4_NL"),
    row::<iq4::Xs, 136, 256>("IQ4_XS"),
    row::<float4::Mx, 17, 32>("MXFP4"),
    row::<float4::Nv, 36, 64>("NVFP4"),
    row::<k_types::Q2, 84, 256>("Q2_K"),
    row::<k_types::Q3, 110, 256>("Q3_K"),
    row::<k_types::Q4, 144, 256>("Q4_K"),
    row::<k_types::Q5, 176, 256>("Q5_K"),
    row::<k_types::Q6, 210, 256>("Q6_K"),
    row::<old_types::Q4With0, 18, 32>("Q4_0"),
    row::<old_types::Q4With1, 20, 32>("Q4_1"),
    row::<old_types::Q5With0, 22, 32>("Q5_0"),
    row::<old_types::Q5With1, 24, 32>("Q5_1"),
    row::<old_types::Q8With0, 34, 32>("Q8_0"),
    row::<ternary::Base3, 54, 256>("TQ1_0"),
    row::<ternary::Bits2, 66, 256>("TQ2_0"),
];

const fn row<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(name: &'static str) -> Row {
    (name, LEN, |cols| Box::new(OfType { cols, block: PhantomData::<B> }))
}

/// Returns the names of the types that can be decoded.
pub fn types() -> impl Iterator<Item = &'static str> {
    TYPES.iter().map(|&(name, ..)| name)
}

/// Plans a matrix of blocks.
pub(crate) fn plan(request: &Request) -> Result<Plan> {
    let codes = request.codes()?;
    let Some(&(_, len, decoder)) = TYPES.iter().find(|(name, ..)| *name == codes.info.dtype) else {
        return Err(request.refuse(codes, format!("has type {}, which has no formula", codes.info.dtype)));
    };
    let (rows, cols) = request.shape;
    let elements = rows.saturating_mul(cols);
    let count = request.stacked(elements)?;
    if !elements.is_multiple_of(len) {
        let reason =
            format!("a matrix of shape {:?} does not consist of blocks of {len} values", request.shape);
        return Err(request.refuse(codes, reason));
    }
    let inputs = vec![request.own(codes, elements, count)?];
    Ok(Plan { inputs, stored: request.shape, is_transposed: false, decoder: decoder(cols) })
}

/// Decodes a matrix of blocks of one type.
struct OfType<B, const BYTES: usize, const LEN: usize> {
    /// Number of columns of the matrix.
    cols: usize,
    block: PhantomData<B>,
}

impl<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize> Decoder for OfType<B, BYTES, LEN> {
    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let run = |start: usize, out: &mut [f32]| {
            dispatch(Run::<B, BYTES, LEN> { codes: inputs[0], start, out, block: PhantomData });
        };
        if cols.len() == self.cols {
            // Whole rows follow each other, also within a block.
            return run(rows.start * self.cols, out);
        }
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            run(row * self.cols + cols.start, out);
        }
    }
}

/// Decodes consecutive values.
struct Run<'a, B, const BYTES: usize, const LEN: usize> {
    codes: &'a [u8],
    /// Position of the first value.
    start: usize,
    out: &'a mut [f32],
    block: PhantomData<B>,
}

impl<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize> WithSimd for Run<'_, B, BYTES, LEN> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { codes, start, out, .. } = self;
        let blocks = &codes.as_chunks::<BYTES>().0[start / LEN..];
        let skipped = start % LEN;
        let head = if skipped == 0 { 0 } else { out.len().min(LEN - skipped) };
        let (first, out) = out.split_at_mut(head);
        part::<B, BYTES, LEN>(blocks, skipped, first);
        let blocks = &blocks[usize::from(skipped > 0)..];
        let (whole, last) = out.as_chunks_mut::<LEN>();
        part::<B, BYTES, LEN>(&blocks[whole.len()..], 0, last);
        for (block, out) in blocks.iter().zip(whole) {
            B::decode(block, out);
        }
    }
}

/// Decodes a part of the first of some blocks.
#[inline(never)]
fn part<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    blocks: &[[u8; BYTES]],
    skipped: usize,
    out: &mut [f32],
) {
    if let Some(block) = blocks.first().filter(|_| !out.is_empty()) {
        let mut whole = [0.0; LEN];
        B::decode(block, &mut whole);
        out.copy_from_slice(&whole[skipped..][..out.len()]);
    }
}

/// Returns the 16-bit float at a position of a block.
#[inline(always)]
fn half<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> f32 {
    f16::from_bits(word(block, at)).to_f32()
}

/// Returns the 16-bit integer at a position of a block.
#[inline(always)]
fn word<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// Returns the 32-bit integer at a position of a block.
#[inline(always)]
fn double_word<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[cfg(test)]
mod tests;
