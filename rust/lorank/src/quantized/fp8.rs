//! 8-bit floats and integers with scales: one for the matrix, or for every row, column, or block.
//!
//! Defined by `Fp8Dequantize` of transformers, and by the compressors `naive_quantized` and `mxfp8` of
//! compressed-tensors.

use crate::Result;
use crate::quantized::decoder::Plan;
use crate::quantized::grid::{Code, Grid, OnGrid, Overall};
use crate::quantized::numbers::ScaleType;
use crate::quantized::request::Request;

/// Plans a matrix of 8-bit floats.
pub(crate) fn floats(request: &Request) -> Result<Plan> {
    request.check_type(request.codes()?, &["F8_E4M3", "F8_E5M2"])?;
    let code = if request.codes()?.info.dtype == "F8_E4M3" { Code::E4M3 } else { Code::E5M2 };
    plan(request, code)
}

/// Plans a matrix of 8-bit integers, with zero points if there are any.
pub(crate) fn integers(request: &Request) -> Result<Plan> {
    request.check_type(request.codes()?, &["I8"])?;
    plan(request, Code::I8)
}

fn plan(request: &Request, code: Code) -> Result<Plan> {
    let (rows, cols) = request.shape;
    let count = request.stacked(rows.saturating_mul(cols))?;
    let declared = request.size("block_rows")?.zip(request.size("block_cols")?);
    let scales = request.part("scales")?;
    let (grid, own) = Grid::of(request, scales, request.shape, count, declared)?;
    let mut inputs = vec![request.own(request.codes()?, rows * cols, count)?, own];
    let zeros = request.parts.get("zeros");
    if let Some(zeros) = zeros {
        request.check_type(zeros, &["I8"])?;
        let (same, own) = Grid::of(request, zeros, request.shape, count, declared)?;
        if same != grid {
            let reason = format!("has shape {:?}, the scales have {:?}", zeros.info.shape, scales.info.shape);
            return Err(request.refuse(zeros, reason));
        }
        inputs.push(own);
    }
    let scale = ScaleType::of(request, scales)?;
    let has_zeros = zeros.is_some();
    let decoder = OnGrid { code, scale, grid, overall: Overall::None, has_zeros, cols };
    Ok(Plan { inputs, stored: request.shape, is_transposed: false, decoder: Box::new(decoder) })
}
