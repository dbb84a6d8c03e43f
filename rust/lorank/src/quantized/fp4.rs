//! 4-bit floats (`E2M1`), two per byte, with a scale for every group of a row.
//!
//! - `MXFP4`: groups of 32 with powers of two. Defined by `integrations/mxfp4.py` and `Fp8Dequantize` of
//!   transformers, and by the compressor `mxfp4` of compressed-tensors. The setting `transposed` is for
//!   gpt-oss, which stores the transpose of its parameters.
//! - `NVFP4`: groups of 16 with scales of type E4M3 and one scale of type F32, by which compressed-tensors
//!   divides them and `ModelOpt` multiplies them, before the product with the codes.

use crate::Result;
use crate::quantized::decoder::Plan;
use crate::quantized::grid::{Code, Grid, OnGrid, Overall};
use crate::quantized::numbers::ScaleType;
use crate::quantized::request::{Input, Request, elements_of};

/// Plans a matrix with one level of scales.
pub(crate) fn mxfp4(request: &Request) -> Result<Plan> {
    plan(request, Overall::None)
}

/// Plans a matrix whose scales are divided by an overall scale.
pub(crate) fn divided(request: &Request) -> Result<Plan> {
    plan(request, Overall::Divides)
}

/// Plans a matrix whose scales are multiplied by an overall scale.
pub(crate) fn multiplied(request: &Request) -> Result<Plan> {
    plan(request, Overall::Multiplies)
}

fn plan(request: &Request, overall: Overall) -> Result<Plan> {
    let codes = request.codes()?;
    request.check_type(codes, &["U8", "I8"])?;
    let is_transposed = request.is_set("transposed");
    let (rows, cols) = request.shape;
    let (rows, cols) = if is_transposed { (cols, rows) } else { (rows, cols) };
    if cols % 2 != 0 {
        return Err(request.refuse(codes, format!("{cols} columns do not fill bytes of two codes")));
    }
    let bytes = rows.saturating_mul(cols / 2);
    let count = request.stacked(bytes)?;
    let scales = request.part("scales")?;
    let (grid, own) = Grid::of(request, scales, (rows, cols), count, None)?;
    if grid.block.1 % 2 != 0 {
        return Err(request.refuse(scales, format!("groups of {} split a byte of codes", grid.block.1)));
    }
    let scale = ScaleType::of(request, scales)?;
    let mut inputs = vec![request.own(codes, bytes, count)?, own];
    if overall != Overall::None {
        let tensor = request.part("overall")?;
        request.check_type(tensor, &["F32"])?;
        inputs.push(if elements_of(tensor) == 1 {
            Input { tensor: tensor.clone(), start: 0, len: tensor.info.len }
        } else {
            request.own(tensor, 1, count)?
        });
    }
    let decoder = OnGrid { code: Code::E2M1, scale, grid, overall, has_zeros: false, cols };
    Ok(Plan { inputs, stored: (rows, cols), is_transposed, decoder: Box::new(decoder) })
}
