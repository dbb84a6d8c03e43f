//! From a decomposition to the factors of the singular values that are kept.

use std::sync::Arc;

use faer::{Mat, MatMut, MatRef};

use crate::cancel::CancelToken;
use crate::low_rank::{Factors, Triplets, Values};
use crate::matrix::MatrixView;
use crate::parallel::{costliest_first, guarded, pool, side_by_side};
use crate::product_svd::{Decomposition, Form};
use crate::thin::{HIGH, Strided, UNIT, multiply};
use crate::{Error, Result};

/// Rows of `B`, and columns of `A`, that are multiplied at a time: a panel stays in the nearest cache.
fn panel_length(rank: usize) -> usize {
    (16_384 / rank.max(1)).clamp(64, 2048).next_multiple_of(UNIT)
}

/// A truncation that is wanted: of which decomposition, and which values are kept.
#[derive(Clone, Debug)]
pub struct Truncation {
    /// Of what.
    pub decomposition: Arc<Decomposition>,
    /// One per singular value.
    pub keep: Vec<bool>,
}

/// Computes the factors of every truncation, as [`decompose_all`](crate::product_svd::decompose_all) does the decompositions.
///
/// # Errors
/// As there.
pub fn rebuild_all(
    truncations: &[Truncation],
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Factors>) + Sync),
) -> Result<()> {
    let order = costliest_first(truncations.iter().map(|t| t.decomposition.cost()));
    pool(threads)?.install(|| {
        side_by_side(&order, threads, cancel, &|i, bytes: &mut Vec<u8>| {
            let Truncation { decomposition, keep } = &truncations[i];
            emit(i, guarded(|| decomposition.rebuild(keep, bytes, cancel)));
        });
        cancel.check()
    })
}

impl Decomposition {
    /// Multiplications of a rebuild, up to a constant.
    fn cost(&self) -> u128 {
        let (out, fan_in) = match &self.form {
            Form::Basis { term, .. } => (term.b.shape().0, term.a.shape().1),
            Form::Explicit { b, a, .. } => (b.nrows(), a.nrows()),
        };
        (self.singular_values.len() * (out + fan_in)) as u128
    }

    /// The factors of the kept values; `bytes` is a buffer for factors in files.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there is not one mark per value, and those of reading.
    pub fn rebuild(&self, keep: &[bool], bytes: &mut Vec<u8>, cancel: &CancelToken) -> Result<Factors> {
        if keep.len() != self.singular_values.len() {
            return Err(Error::InvalidInput(format!(
                "{} marks for {} singular values",
                keep.len(),
                self.singular_values.len()
            )));
        }
        let kept: Vec<usize> = (0..keep.len()).filter(|&i| keep[i]).collect();
        let columns = |x: &Mat<f64>| Mat::from_fn(x.nrows(), kept.len(), |i, j| x[(i, kept[j])]);
        match &self.form {
            Form::Explicit { b, a, wide } => Ok(Factors {
                b: Values::collect((0..b.nrows()).flat_map(|i| kept.iter().map(move |&j| b[(i, j)])), *wide),
                a: Values::collect(kept.iter().flat_map(|&j| a.col(j).iter().copied()), *wide),
            }),
            // The factors need not be read to keep nothing of them.
            Form::Basis { .. } if kept.is_empty() => {
                Ok(Factors { b: Values::F32(Vec::new()), a: Values::F32(Vec::new()) })
            }
            Form::Basis { term, left, right } => {
                let (left, right) = (columns(left), columns(right));
                Ok(Factors {
                    b: term.b.with_view(bytes, cancel, |view| times(view, left.as_ref(), cancel))?,
                    a: term
                        .a
                        .with_view(bytes, cancel, |view| transposed_times(right.as_ref(), view, cancel))?,
                })
            }
        }
    }

    /// All triplets at once, for callers that keep them.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild).
    pub fn triplets(&self, cancel: &CancelToken) -> Result<Triplets> {
        let Factors { b, a } =
            self.rebuild(&vec![true; self.singular_values.len()], &mut Vec::new(), cancel)?;
        let k = self.singular_values.len();
        Ok(Triplets { b_columns: transposed(b, k), singular_values: self.singular_values.clone(), a_rows: a })
    }
}

/// Row-major values with `cols` columns, column by column.
fn transposed(values: Values, cols: usize) -> Values {
    fn columns<T: Copy>(x: &[T], cols: usize) -> Vec<T> {
        (0..cols).flat_map(|j| x.iter().skip(j).step_by(cols).copied()).collect()
    }
    match values {
        Values::F32(x) => Values::F32(columns(&x, cols)),
        Values::F64(x) => Values::F64(columns(&x, cols)),
    }
}

/// `B X`, row-major float32, for `B (out, K)` and `X (K, k)`.
fn times(b: &MatrixView<'_>, x: MatRef<'_, f64>, cancel: &CancelToken) -> Result<Values> {
    let (out, rank, k) = (b.rows(), x.nrows(), x.ncols());
    let mut result = vec![0f32; out * k];
    let width = k.next_multiple_of(UNIT);
    let x: Vec<f64> =
        (0..rank).flat_map(|i| (0..width).map(move |j| if j < k { x[(i, j)] } else { 0.0 })).collect();
    let length = panel_length(rank);
    let (mut panel, mut product) = (vec![0.0; length * rank], vec![0.0; length * width]);
    for first in (0..out).step_by(length) {
        cancel.check()?;
        let rows = first..out.min(first + length);
        let (count, padded) = (rows.len(), rows.len().next_multiple_of(UNIT));
        b.upcast_rows(rows, 1.0, &mut panel[..count * rank]);
        let left = Strided { values: &panel[..padded * rank], stride: rank, step: 1 };
        multiply(left, &x, width, &mut product[..padded * width]);
        let lines = result[first * k..(first + count) * k].chunks_exact_mut(k);
        for (line, sums) in lines.zip(product.chunks_exact(width)) {
            narrow(&sums[..k], line);
        }
    }
    Ok(Values::F32(result))
}

/// `X^T A`, row-major float32, for `X (K, k)` and `A (K, in)`.
fn transposed_times(x: MatRef<'_, f64>, a: &MatrixView<'_>, cancel: &CancelToken) -> Result<Values> {
    let (fan_in, rank, k) = (a.cols(), x.nrows(), x.ncols());
    let mut result = vec![0f32; k * fan_in];
    let height = k.next_multiple_of(HIGH);
    let x: Vec<f64> =
        (0..height).flat_map(|j| (0..rank).map(move |i| if j < k { x[(i, j)] } else { 0.0 })).collect();
    let length = panel_length(rank);
    let (mut panel, mut product) = (vec![0.0; rank * length], vec![0.0; height * length]);
    for first in (0..fan_in).step_by(length) {
        cancel.check()?;
        let cols = first..fan_in.min(first + length);
        let (count, width) = (cols.len(), cols.len().next_multiple_of(UNIT));
        let block = MatMut::from_column_major_slice_with_stride_mut(&mut panel, count, rank, width);
        a.upcast(0..rank, cols, 1.0, block.transpose_mut());
        let left = Strided { values: &x, stride: rank, step: 1 };
        multiply(left, &panel[..rank * width], width, &mut product[..height * width]);
        for i in 0..k {
            let start = i * fan_in + first;
            narrow(&product[i * width..][..count], &mut result[start..start + count]);
        }
    }
    Ok(Values::F32(result))
}

#[allow(clippy::cast_possible_truncation)] // Rounding is the point.
fn narrow(from: &[f64], to: &mut [f32]) {
    for (y, x) in to.iter_mut().zip(from) {
        *y = *x as f32;
    }
}
