//! AWQ: integers of 4 bits in words of 32 bits along the outputs of a layer.
//!
//! The codes form a matrix `(in, out)`, so that the weight is its transpose. The value is
//! `(q - zero) * scale`, both of the group of the row. A word holds its eight columns in the order
//! 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits. Defined by `awq_triton.py` of vLLM.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::Result;
use crate::kernels::simd::dispatch;
use crate::quantized::decoder::{Decoder, Plan, SIDE};
use crate::quantized::gptq::{Group, values};
use crate::quantized::grid::side_of;
use crate::quantized::numbers::ScaleType;
use crate::quantized::request::{Request, elements_of};

/// Positions of the inputs.
const CODES: usize = 0;
const SCALES: usize = 1;
const ZEROS: usize = 2;

/// Number of columns in a word.
const PER_WORD: usize = 8;

/// The bits by which a word is shifted for each of its columns.
const SHIFTS: [u32; PER_WORD] = [0, 16, 4, 20, 8, 24, 12, 28];

struct Awq {
    scale: ScaleType,
    /// Number of rows of a group.
    group: usize,
    cols: usize,
}

/// Plans a matrix.
pub(crate) fn plan(request: &Request) -> Result<Plan> {
    let (cols, rows) = request.shape;
    let codes = request.codes()?;
    request.check_type(codes, &["I32"])?;
    if cols % PER_WORD != 0 {
        return Err(request.refuse(codes, format!("{cols} columns do not fill words of eight")));
    }
    let words = cols / PER_WORD;
    let count = request.stacked(rows.saturating_mul(words))?;
    let scales = request.part("scales")?;
    let groups = elements_of(scales) / cols.saturating_mul(count).max(1);
    let Some(group) = side_of(groups, rows, request.size("group_size")?) else {
        return Err(request.refuse(scales, format!("has shape {:?} for {rows} rows", scales.info.shape)));
    };
    let scale = ScaleType::of(request, scales)?;
    let zeros = request.part("zeros")?;
    request.check_type(zeros, &["I32"])?;
    let inputs = vec![
        request.own(codes, rows * words, count)?,
        request.own(scales, groups * cols, count)?,
        request.own(zeros, groups * words, count)?,
    ];
    let decoder = Awq { scale, group, cols };
    Ok(Plan { inputs, stored: (rows, cols), is_transposed: true, decoder: Box::new(decoder) })
}

impl Decoder for Awq {
    fn decode(&self, inputs: &[&[u8]], rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        dispatch(Kernel { by: self, inputs, rows, cols, out });
    }
}

struct Kernel<'a> {
    by: &'a Awq,
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
        let (width, words) = (cols.len(), inputs[CODES].as_chunks::<4>().0);
        let mut group = Group::default();
        let mut codes = [0; SIDE];
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            if row / by.group != group.index {
                by.read_group(inputs, row / by.group, &cols, &mut group);
            }
            let first = (row * by.cols + cols.start) / PER_WORD;
            unpack(&words[first..][..width / PER_WORD], &mut codes);
            values(codes.iter().copied(), &group, out);
        }
    }
}

/// Unpacks words into codes in the order of columns.
#[inline(always)]
fn unpack(words: &[[u8; 4]], codes: &mut [u32; SIDE]) {
    for (codes, &word) in codes.as_chunks_mut::<PER_WORD>().0.iter_mut().zip(words) {
        let word = u32::from_le_bytes(word);
        *codes = SHIFTS.map(|shift| word >> shift & 15);
    }
}

impl Awq {
    /// Reads the scales and zero points of a group.
    #[inline(always)]
    fn read_group(&self, inputs: &[&[u8]], index: usize, cols: &Range<usize>, group: &mut Group) {
        group.index = index;
        let mut codes = [0; SIDE];
        let words = inputs[ZEROS].as_chunks::<4>().0;
        let first = (index * self.cols + cols.start) / PER_WORD;
        unpack(&words[first..][..cols.len() / PER_WORD], &mut codes);
        for (i, (&code, col)) in codes.iter().zip(cols.clone()).enumerate() {
            group.zeros[i] = code.cast_signed() as f32;
            group.scales[i] = self.scale.at(inputs[SCALES], index * self.cols + col);
        }
    }
}
