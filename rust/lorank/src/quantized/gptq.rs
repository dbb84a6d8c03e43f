//! GPTQ: integers of 2, 3, 4 or 8 bits in words of 32 bits along the inputs of a layer.
//!
//! The codes form a matrix `(in, out)`, so that the weight is its transpose. The value is
//! `(q - zero) * scale`, both of the group of the row. Version 1 of the format stores `zero - 1`. Defined by
//! `auto_gptq.py` and `exllama.py` of vLLM.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::Result;
use crate::kernels::simd::dispatch;
use crate::quantized::bits::unpack;
use crate::quantized::decoder::{Decoder, Plan, SIDE};
use crate::quantized::grid::side_of;
use crate::quantized::group_order::GroupOrder;
use crate::quantized::numbers::ScaleType;
use crate::quantized::request::{Request, elements_of};

/// Positions of the inputs; the order of groups follows.
const CODES: usize = 0;
const SCALES: usize = 1;
const ZEROS: usize = 2;

struct Gptq {
    bits: usize,
    scale: ScaleType,
    /// Number of rows of a group, if groups are consecutive.
    group: usize,
    order: GroupOrder,
    /// The number that is added to stored zero points.
    bias: u8,
    cols: usize,
}

/// Plans a matrix.
pub(crate) fn plan(request: &Request) -> Result<Plan> {
    let (cols, rows) = request.shape;
    let codes = request.codes()?;
    request.check_type(codes, &["I32"])?;
    let bits = request.bits()?;
    let words = rows.saturating_mul(bits) / 32;
    if rows.saturating_mul(bits) % 32 != 0 || cols.saturating_mul(bits) % 32 != 0 {
        let reason = format!("codes of {bits} bits do not fill words for shape {:?}", request.shape);
        return Err(request.refuse(codes, reason));
    }
    let count = request.stacked(words.saturating_mul(cols))?;
    let scales = request.part("scales")?;
    let groups = elements_of(scales) / cols.saturating_mul(count).max(1);
    let Some(group) = side_of(groups, rows, request.size("group_size")?) else {
        return Err(request.refuse(scales, format!("has shape {:?} for {rows} rows", scales.info.shape)));
    };
    let scale = ScaleType::of(request, scales)?;
    let zeros = request.part("zeros")?;
    request.check_type(zeros, &["I32"])?;
    let mut inputs = vec![
        request.own(codes, words * cols, count)?,
        request.own(scales, groups * cols, count)?,
        request.own(zeros, groups * (cols * bits / 32), count)?,
    ];
    let order = GroupOrder::of(request, rows, groups, count, &mut inputs)?;
    let bias = u8::from(!request.is_set("zeros_are_exact"));
    let decoder = Gptq { bits, scale, group, order, bias, cols };
    Ok(Plan { inputs, stored: (rows, cols), is_transposed: true, decoder: Box::new(decoder) })
}

impl Decoder for Gptq {
    fn check(&self, inputs: &[&[u8]]) -> std::result::Result<(), (usize, String)> {
        self.order.check(inputs)
    }

    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        dispatch(Kernel { by: self, inputs, rows, cols, out });
    }
}

struct Kernel<'a> {
    by: &'a Gptq,
    inputs: &'a [&'a [u8]],
    rows: Range<usize>,
    cols: Range<usize>,
    out: &'a mut [f32],
}

/// Scales and zero points of a group of rows, for the columns of a block.
pub(crate) struct Group {
    pub index: usize,
    pub scales: [f32; SIDE],
    pub zeros: [f32; SIDE],
}

impl Default for Group {
    fn default() -> Self {
        Self { index: usize::MAX, scales: [0.0; SIDE], zeros: [0.0; SIDE] }
    }
}

impl WithSimd for Kernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { by, inputs, rows, cols, out } = self;
        let (width, words) = (cols.len(), inputs[CODES].as_chunks::<4>().0);
        let mut group = Group::default();
        let is_ordered = by.order.is_given(inputs);
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            let index = if is_ordered { by.order.at(inputs, row) } else { row / by.group };
            if index != group.index {
                by.read_group(inputs, index, &cols, &mut group);
            }
            let start = row * by.bits;
            let (word, shift) = (start / 32, start % 32);
            let low = &words[word * by.cols + cols.start..][..width];
            let mask = u32::MAX >> (32 - by.bits);
            if shift + by.bits <= 32 {
                let codes = low.iter().map(|&word| u32::from_le_bytes(word) >> shift & mask);
                values(codes, &group, out);
            } else {
                let high = &words[(word + 1) * by.cols + cols.start..][..width];
                let codes = low.iter().zip(high).map(|(&low, &high)| {
                    (u32::from_le_bytes(low) >> shift | u32::from_le_bytes(high) << (32 - shift)) & mask
                });
                values(codes, &group, out);
            }
        }
    }
}

/// Computes the values of a row.
#[inline(always)]
pub(crate) fn values(codes: impl Iterator<Item = u32>, group: &Group, out: &mut [f32]) {
    let sides = group.scales.iter().zip(&group.zeros);
    for ((x, q), (scale, zero)) in out.iter_mut().zip(codes).zip(sides) {
        // Codes have at most 8 bits.
        *x = (q.cast_signed() as f32 - zero) * scale;
    }
}

impl Gptq {
    /// Reads the scales and zero points of a group.
    #[inline(always)]
    fn read_group(&self, inputs: &[&[u8]], index: usize, cols: &Range<usize>, group: &mut Group) {
        group.index = index;
        let mut codes = [0; SIDE];
        let size = self.cols * self.bits / 8;
        let codes = &mut codes[..cols.len()];
        unpack(&inputs[ZEROS][index * size..][..size], self.bits, cols.start, codes);
        for (i, (&code, col)) in codes.iter().zip(cols.clone()).enumerate() {
            group.zeros[i] = f32::from(code) + f32::from(self.bias);
            group.scales[i] = self.scale.at(inputs[SCALES], index * self.cols + col);
        }
    }
}
