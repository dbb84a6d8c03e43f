//! From a decomposition to the factors of the singular values that are kept.
//!
//! Factors are computed where they are needed, as a file of them is written for instance: all of them
//! together need not be in memory. Only where an update's terms lie in memory that somebody else may write
//! to, as live models do, are they computed at once.

use std::sync::Arc;

use faer::Mat;

use crate::cancel::CancelToken;
use crate::dtype::DType;
use crate::low_rank::{Buffers, Side, Term, Values};
use crate::parallel::{costliest_first, guarded, pool, side_by_side};
use crate::product_svd::{Decomposition, Form};
use crate::source::{Buffer, Computed, StoredMatrix};
use crate::triangular::Precision;
use crate::{Error, Result};

/// A truncation that is wanted: of which decomposition, and which values are kept.
#[derive(Clone, Debug)]
pub struct Truncation {
    /// Of what.
    pub decomposition: Arc<Decomposition>,
    /// One per singular value.
    pub keep: Vec<bool>,
}

/// Factors as files hold them, balanced: float32 unless a term was float64.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `(out, r)`.
    pub b: StoredMatrix,
    /// `(r, in)`.
    pub a: StoredMatrix,
}

/// The factors of every truncation, as [`decompose_all`](crate::product_svd::decompose_all) does the
/// decompositions.
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
        side_by_side(&order, threads, cancel, &|i, (): &mut ()| {
            emit(i, guarded(|| truncations[i].rebuild(cancel)));
        });
        cancel.check()
    })
}

impl Truncation {
    fn rebuild(&self, cancel: &CancelToken) -> Result<Factors> {
        let factors = self.factors()?;
        if !self.decomposition.reads_memory() {
            return Ok(factors);
        }
        let hold = |matrix: &StoredMatrix| {
            let mut buffer = Buffer::default();
            matrix.load(&mut buffer, cancel)?;
            let (rows, cols) = matrix.shape();
            StoredMatrix::in_memory(Arc::new(buffer.bytes), matrix.dtype(), (rows, cols), (cols, 1))
        };
        Ok(Factors { b: hold(&factors.b)?, a: hold(&factors.a)? })
    }

    /// The factors, computed whenever they are needed.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there is not one mark per value.
    pub fn factors(&self) -> Result<Factors> {
        let Self { decomposition, keep } = self;
        let values = &decomposition.singular_values;
        if keep.len() != values.len() {
            let reason = format!("{} marks for {} singular values", keep.len(), values.len());
            return Err(Error::InvalidInput(reason));
        }
        let kept: Arc<[usize]> = (0..keep.len()).filter(|&i| keep[i]).collect();
        let (k, (out, fan_in)) = (kept.len(), decomposition.shape);
        let dtype = decomposition.dtype();
        let factor = |side, shape| {
            let of = (Arc::clone(decomposition), Arc::clone(&kept));
            StoredMatrix::computed(Arc::new(Factor { decomposition: of.0, kept: of.1, side }), dtype, shape)
        };
        Ok(Factors { b: factor(Side::B, (out, k)), a: factor(Side::A, (k, fan_in)) })
    }
}

impl Decomposition {
    /// Multiplications of a rebuild, up to a constant.
    fn cost(&self) -> u128 {
        let (out, fan_in) = self.shape;
        (self.singular_values.len() * (out + fan_in)) as u128
    }

    fn dtype(&self) -> DType {
        let is_wide = matches!(&self.form, Form::Explicit { b: Values::F64(_), .. });
        if is_wide { DType::F64 } else { DType::F32 }
    }

    fn reads_memory(&self) -> bool {
        let is_in_memory = |term: &Term| term.b.is_in_memory() || term.a.is_in_memory();
        matches!(&self.form, Form::Basis { terms, .. } if terms.iter().any(is_in_memory))
    }
}

/// One factor of a truncation.
struct Factor {
    decomposition: Arc<Decomposition>,
    kept: Arc<[usize]>,
    side: Side,
}

impl Computed for Factor {
    fn compute(&self, out: &mut Vec<u8>, parts: &mut Buffers, cancel: &CancelToken) -> Result<()> {
        if self.kept.is_empty() {
            return Ok(()); // Terms need not be read to keep nothing of them.
        }
        match (&self.decomposition.form, self.side) {
            (Form::Explicit { b, .. }, Side::B) => {
                out.clear();
                b.put_columns(&self.kept, self.decomposition.shape.0, out);
            }
            (Form::Explicit { a, .. }, Side::A) => {
                out.clear();
                a.put_rows(&self.kept, self.decomposition.shape.1, out);
            }
            (Form::Basis { terms, b: basis, .. }, Side::B)
            | (Form::Basis { terms, a: basis, .. }, Side::A) => {
                let stacked = self.side.stacked(terms, parts, cancel)?;
                let columns = basis.columns.as_ref();
                let y = Mat::from_fn(columns.nrows(), self.kept.len(), |i, j| columns[(i, self.kept[j])]);
                let y = y.as_ref();
                match (self.side, basis.precision) {
                    (Side::B, Precision::Single) => stacked.transposed_times::<f32>(y, out, cancel)?,
                    (Side::B, Precision::Double) => stacked.transposed_times::<f64>(y, out, cancel)?,
                    (Side::A, Precision::Single) => stacked.times::<f32>(y, out, cancel)?,
                    (Side::A, Precision::Double) => stacked.times::<f64>(y, out, cancel)?,
                }
            }
        }
        Ok(())
    }
}
