//! From a decomposition to the factors of the singular values that are kept.
//!
//! Factors are computed where they are needed, as a file of them is written for instance: all of them
//! together need not be in memory. Only where an update's terms lie in memory that somebody else may write
//! to, as live models do, are they computed at once.

use std::sync::Arc;

use faer::{Mat, MatRef};

use crate::exec::cancel::CancelToken;
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool, side_by_side};
use crate::kernels::dense::scale_columns;
use crate::kernels::number::Number;
use crate::low_rank::cholesky_qr::Precision;
use crate::low_rank::decompose::{Decomposition, Form, by_reflections};
use crate::low_rank::terms::{Side, Term, weights_of_rows};
use crate::low_rank::triplets::Values;
use crate::matrix::dtype::DType;
use crate::matrix::stacked::product_scratch;
use crate::storage::source::{Computed, Parts, StoredMatrix};
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

/// The factors of every truncation, as [`decompose_all`](crate::low_rank::decompose::decompose_all) does the
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
        side_by_side(&order, threads, cancel, &|i, parts: &mut Parts| {
            emit(i, guarded(|| truncations[i].rebuild(parts, cancel)));
        });
        cancel.check()
    })
}

impl Truncation {
    fn rebuild(&self, parts: &mut Parts, cancel: &CancelToken) -> Result<Factors> {
        let factors = self.factors(cancel)?;
        if !self.decomposition.reads_memory() {
            return Ok(factors);
        }
        let mut hold = |matrix: &StoredMatrix| {
            let size = matrix.size();
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(size).map_err(|_| Error::no_memory(size, "truncated factors"))?;
            bytes.resize(size, 0);
            if let Some(values) = matrix.computation() {
                values.compute(&mut bytes, parts, cancel)?;
            }
            let (rows, cols) = matrix.shape();
            StoredMatrix::in_memory(Arc::new(bytes), matrix.dtype(), (rows, cols), (cols, 1))
        };
        Ok(Factors { b: hold(&factors.b)?, a: hold(&factors.a)? })
    }

    /// The factors, computed whenever they are needed.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there is not one mark per value; those of a decomposition, where it has to be
    /// done anew.
    pub fn factors(&self, cancel: &CancelToken) -> Result<Factors> {
        let Self { decomposition, keep } = self;
        let values = &decomposition.singular_values;
        if keep.len() != values.len() {
            let reason = format!("{} marks for {} singular values", keep.len(), values.len());
            return Err(Error::InvalidInput(reason));
        }
        let kept: Vec<usize> = (0..keep.len()).filter(|&i| keep[i]).collect();
        let (k, (out, fan_in)) = (kept.len(), decomposition.shape);
        let (b, a) = match &decomposition.form {
            Form::Explicit { b, a } => {
                let columns = |of: &Arc<Values>| Source::Columns { of: Arc::clone(of), kept: kept.clone() };
                (columns(b), columns(a))
            }
            Form::Basis { terms, basis } => {
                let Some([mut left, mut right]) = basis.columns(&kept, &weights_of_rows(terms)) else {
                    return self.by_reflections(terms, cancel);
                };
                // What rounding left of zeros is none of the triplets.
                let roots: Vec<f64> = kept.iter().map(|&i| values[i].sqrt()).collect();
                let inverse = |root: &f64| if *root > 0.0 { root.recip() } else { 0.0 };
                scale_columns(&mut left, &roots.iter().map(inverse).collect::<Vec<_>>());
                scale_columns(&mut right, &roots);
                let times = |by, precision| Source::Product { terms: Arc::clone(terms), by, precision };
                let [b, a] = basis.precisions;
                (times(left, b), times(right, a))
            }
        };
        let dtype = decomposition.dtype();
        let factor = |side, source, length, shape| {
            StoredMatrix::computed(Arc::new(Factor { source, side, length }), dtype, shape)
        };
        Ok(Factors { b: factor(Side::B, b, out, (out, k)), a: factor(Side::A, a, fan_in, (k, fan_in)) })
    }

    /// The factors by the decomposition that needs no bound.
    fn by_reflections(&self, terms: &[Term], cancel: &CancelToken) -> Result<Factors> {
        let Self { decomposition, keep } = self;
        let ((out, fan_in), rank) = (decomposition.shape, keep.len());
        let again = by_reflections(terms, (out, fan_in, rank), &mut Parts::default(), cancel)?;
        Self { decomposition: Arc::new(again), keep: keep.clone() }.factors(cancel)
    }
}

impl Decomposition {
    /// Multiplications of a rebuild, up to a constant.
    fn cost(&self) -> u128 {
        let (out, fan_in) = self.shape;
        (self.singular_values.len() * (out + fan_in)) as u128
    }

    fn dtype(&self) -> DType {
        let is_wide = matches!(&self.form, Form::Explicit { b, .. } if matches!(**b, Values::F64(_)));
        if is_wide { DType::F64 } else { DType::F32 }
    }

    fn reads_memory(&self) -> bool {
        let is_in_memory = |term: &Term| term.b.is_in_memory() || term.a.is_in_memory();
        matches!(&self.form, Form::Basis { terms, .. } if terms.iter().any(is_in_memory))
    }
}

/// One factor of a truncation.
struct Factor {
    source: Source,
    side: Side,
    /// What its columns or rows are long.
    length: usize,
}

/// What a factor is computed of.
enum Source {
    /// Those of balanced columns in memory that are kept.
    Columns { of: Arc<Values>, kept: Vec<usize> },
    /// The side's stacked factors times a matrix `(K, k)`.
    Product { terms: Arc<[Term]>, by: Mat<f64>, precision: Precision },
}

impl Computed for Factor {
    fn compute(&self, out: &mut [u8], parts: &mut Parts, cancel: &CancelToken) -> Result<()> {
        match &self.source {
            Source::Columns { of, kept } => match self.side {
                Side::B => of.put_columns(kept, self.length, out),
                Side::A => of.put_rows(kept, self.length, out),
            },
            // Terms need not be read to keep nothing of them.
            Source::Product { by, .. } if by.ncols() == 0 => {}
            Source::Product { terms, by, precision } => match precision {
                Precision::Single => self.multiply::<f32>(terms, by.as_ref(), out, parts, cancel)?,
                Precision::Double => self.multiply::<f64>(terms, by.as_ref(), out, parts, cancel)?,
            },
        }
        Ok(())
    }
}

impl Factor {
    fn multiply<T: Number>(
        &self,
        terms: &[Term],
        by: MatRef<'_, f64>,
        out: &mut [u8],
        Parts { buffers, scratch }: &mut Parts,
        cancel: &CancelToken,
    ) -> Result<()> {
        let stacked = self.side.stacked(terms, buffers, cancel)?;
        let stack = scratch.stack(product_scratch::<T>(by.nrows(), by.ncols()))?;
        match self.side {
            Side::B => stacked.transposed_times::<T>(by, out, stack, cancel),
            Side::A => stacked.times::<T>(by, out, stack, cancel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::low_rank::decompose::{Buffers, decompose};
    use crate::storage::source::Buffer;

    fn stored(rows: usize, cols: usize, seed: usize) -> StoredMatrix {
        let value =
            |i: usize| (((i * 7919 + seed * 131 + i * i * 3) % 1013) as f32 / 507.0 - 1.0).to_le_bytes();
        let bytes: Vec<u8> = (0..rows * cols).flat_map(value).collect();
        StoredMatrix::in_memory(Arc::new(bytes), DType::F32, (rows, cols), (cols, 1)).unwrap()
    }

    fn product(Factors { b, a }: &Factors) -> Mat<f64> {
        let dense = |matrix: &StoredMatrix| {
            let (mut buffer, (rows, cols)) = (Buffer::default(), matrix.shape());
            let mut out = Mat::<f64>::zeros(rows, cols);
            matrix.load(&mut buffer, &CancelToken::default()).unwrap().upcast(
                0..rows,
                0..cols,
                1.0,
                out.as_mut(),
            );
            out
        };
        dense(b) * dense(a)
    }

    #[test]
    fn both_decompositions_give_the_same_factors() {
        let cancel = CancelToken::default();
        let update = vec![Term { b: stored(60, 12, 1), a: stored(12, 70, 2), weight: 0.5 }];
        let found = decompose(&update, &mut Buffers::default(), &cancel).unwrap();
        assert!(matches!(found.form, Form::Basis { .. }));
        let decomposition = Arc::new(found);
        for kept in [0, 1, 5, 12] {
            let keep = (0..12).map(|i| i < kept).collect();
            let truncation = Truncation { decomposition: Arc::clone(&decomposition), keep };
            let (fast, slow) =
                (truncation.factors(&cancel).unwrap(), truncation.by_reflections(&update, &cancel).unwrap());
            assert_eq!((fast.b.shape(), fast.a.shape()), ((60, kept), (kept, 70)));
            assert_eq!((slow.b.shape(), slow.a.shape()), ((60, kept), (kept, 70)));
            let size = decomposition.singular_values[0];
            assert!((product(&fast) - product(&slow)).norm_max() <= 1e-6 * size);
        }
    }
}
