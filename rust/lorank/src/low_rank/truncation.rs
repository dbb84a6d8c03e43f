//! The factors of the kept singular values of a decomposition.
//!
//! Factors are computed on demand, for instance when a file is written, so that not all of them are in memory
//! at the same time. If an update's terms are in memory that other code may modify, as in live models, the
//! factors are computed immediately.

use std::sync::Arc;

use faer::{Mat, MatRef};

use crate::exec::cancel::CancelToken;
use crate::exec::memory::zeros;
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool_for, side_by_side};
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

/// A truncation of a decomposition.
#[derive(Clone, Debug)]
pub struct Truncation {
    /// The decomposition to truncate.
    pub decomposition: Arc<Decomposition>,
    /// One mark per singular value: true to keep it.
    pub keep: Vec<bool>,
}

/// Balanced factors as written to files: float32, or float64 if a term was float64.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `(out, r)`.
    pub b: StoredMatrix,
    /// `(r, in)`.
    pub a: StoredMatrix,
}

/// Computes the factors of every truncation in parallel. The arguments are those of
/// [`decompose_all`](crate::low_rank::decompose::decompose_all).
///
/// # Errors
/// The errors of [`decompose_all`](crate::low_rank::decompose::decompose_all).
pub fn rebuild_all(
    truncations: &[Truncation],
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Factors>) + Sync),
) -> Result<()> {
    let order = costliest_first(truncations.iter().map(|t| t.decomposition.cost()));
    pool_for(threads, order.len())?.install(|| {
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
            let mut bytes = zeros(size, "truncated factors")?;
            if let Some(values) = matrix.computation() {
                values.compute(&mut bytes, parts, cancel)?;
            }
            let (rows, cols) = matrix.shape();
            StoredMatrix::in_memory(Arc::new(bytes), matrix.dtype(), (rows, cols), (cols, 1))
        };
        Ok(Factors { b: hold(&factors.b)?, a: hold(&factors.a)? })
    }

    /// Returns the factors, which are computed whenever they are loaded.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] unless there is one mark per value, and the errors of a decomposition if it
    /// must be repeated.
    ///
    /// # Examples
    /// ```
    /// use std::sync::Arc;
    ///
    /// use lorank::low_rank::{Buffers, Term};
    /// use lorank::truncation::Truncation;
    /// use lorank::{cancel::CancelToken, dtype::DType, product_svd::decompose, source::{Buffer, StoredMatrix}};
    ///
    /// let stored = |values: &[f64], shape: (usize, usize)| {
    ///     let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    ///     StoredMatrix::in_memory(Arc::new(bytes), DType::F64, shape, (shape.1, 1)).unwrap()
    /// };
    /// let term = Term { b: stored(&[4.0, 0.0, 0.0, 1.0], (2, 2)), a: stored(&[1.0, 0.0, 0.0, 1.0], (2, 2)), weight: 1.0 };
    /// let cancel = CancelToken::default();
    /// let decomposition = Arc::new(decompose(&[term], &mut Buffers::default(), &cancel).unwrap());
    /// let factors = Truncation { decomposition, keep: vec![true, false] }.factors(&cancel).unwrap();
    /// let mut buffer = Buffer::default();
    /// let b = factors.b.load(&mut buffer, &cancel).unwrap().to_row_major();
    /// assert!((b[0].abs() - 2.0).abs() < 1e-14 && b[1].abs() < 1e-14); // B = (±2, 0), A = (±2, 0)
    /// ```
    pub fn factors(&self, cancel: &CancelToken) -> Result<Factors> {
        let Self { decomposition, keep } = self;
        let values = &decomposition.singular_values;
        if keep.len() != values.len() {
            let reason = format!("`keep` has {} marks for {} singular values", keep.len(), values.len());
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
                let Some([mut left, mut right]) = basis.columns(&kept, &weights_of_rows(terms))? else {
                    return self.by_reflections(terms, cancel);
                };
                // Values that are zero up to rounding have no triplets.
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

    /// Repeats the decomposition by reflections, which needs no error bound, and returns its factors.
    fn by_reflections(&self, terms: &[Term], cancel: &CancelToken) -> Result<Factors> {
        let Self { decomposition, keep } = self;
        let ((out, fan_in), rank) = (decomposition.shape, keep.len());
        let again = by_reflections(terms, (out, fan_in, rank), &mut Parts::default(), cancel)?;
        Self { decomposition: Arc::new(again), keep: keep.clone() }.factors(cancel)
    }
}

impl Decomposition {
    /// Returns the number of multiplications of a rebuild, up to a constant.
    fn cost(&self) -> u128 {
        let (out, fan_in) = self.shape;
        (self.singular_values.len() * (out + fan_in)) as u128
    }

    fn dtype(&self) -> DType {
        let is_float64 = matches!(&self.form, Form::Explicit { b, .. } if matches!(**b, Values::F64(_)));
        if is_float64 { DType::F64 } else { DType::F32 }
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
    /// Length of the columns of `B`, or of the rows of `A`.
    length: usize,
}

/// The data from which a factor is computed.
enum Source {
    /// The balanced columns in memory, and the positions of those to keep.
    Columns { of: Arc<Values>, kept: Vec<usize> },
    /// The product of the side's stacked factors and a matrix `(K, k)`.
    Product { terms: Arc<[Term]>, by: Mat<f64>, precision: Precision },
}

impl Computed for Factor {
    fn compute(&self, out: &mut [u8], parts: &mut Parts, cancel: &CancelToken) -> Result<()> {
        match &self.source {
            Source::Columns { of, kept } => match self.side {
                Side::B => of.put_columns(kept, self.length, out),
                Side::A => of.put_rows(kept, self.length, out),
            },
            // An empty factor needs no terms.
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
