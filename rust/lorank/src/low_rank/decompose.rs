//! The singular value decomposition of a low-rank update, from its factors alone.
//!
//! An update is a sum of terms, `sum_j w_j B_j A_j` with `B_j (out, r_j)` and `A_j (r_j, in)`: one
//! term is an adapter's module, several are a merge. The terms are stacked into one product `B A` of
//! rank at most `K = sum r_j`. With `B = Q_B R_B` and `A^T = Q_A R_A`, the decomposition of the small
//! core `R_B R_A^T = U S V^T` gives that of the whole, `(Q_B U) S (Q_A V)^T`, and `out * in` numbers
//! never exist. `U` and `V` are computed of the values that are kept ([`core_svd`](crate::low_rank::core_svd)).
//!
//! Source: PARA, Post-Optimization Adaptive Rank Allocation for `LoRA`, equations 2 to 5 and 13.
//!
//! There are two ways to `R`. The fast one is the Cholesky factor of the Gram matrix
//! ([`triangular`](crate::low_rank::cholesky_qr)), half the operations of a product and no `Q`: `Q_B U S` and `Q_A V` are formed
//! by products with `B` and `A`, of those columns alone that are kept ([`basis`](crate::low_rank::basis)). It serves factors of
//! narrow types for which a bound shows that `Q` is orthonormal enough. Everything else takes Householder reflections
//! ([`HouseholderQr`]) in float64, after powers of two have been taken out of every factor: in float32 the core loses
//! digits wherever terms cancel.

use std::sync::Arc;

use faer::{Mat, MatMut, MatRef};

use crate::Result;
use crate::exec::cancel::CancelToken;
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool, side_by_side};
use crate::kernels::dense::{scale_columns, scale_rows};
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::low_rank::basis::Basis;
use crate::low_rank::cholesky_qr::Triangular;
use crate::low_rank::core_svd::{CoreSvd, core_svd_scratch};
use crate::low_rank::terms::{Side, Term, checked_shape, weights_of_rows};
use crate::low_rank::triplets::Values;
use crate::matrix::dtype::DType;
use crate::matrix::stacked::Gram;
use crate::storage::source::{Buffer, Parts, StoredMatrix};
use crate::svd::dense_svd;
use crate::svd::qr::HouseholderQr;

/// An update's singular values, and the way to its factors.
#[derive(Clone, Debug)]
pub struct Decomposition {
    /// The `k` singular values of the update, descending; those that are zero up to rounding are 0.
    pub singular_values: Vec<f64>,
    /// `(out, in)`.
    pub shape: (usize, usize),
    pub(crate) form: Form,
}

#[derive(Clone, Debug)]
pub(crate) enum Form {
    /// The stacked factors become the balanced columns by products with small matrices. Terms in files are read
    /// again then: fresh memory to keep them in would cost more than a warm disk cache.
    Basis { terms: Arc<[Term]>, basis: Basis },
    /// The balanced columns themselves, one after the other, `(k, out)` and `(k, in)`: as wide as they are
    /// written.
    Explicit { b: Arc<Values>, a: Arc<Values> },
}

/// Memory that one update after the other uses.
#[derive(Default)]
pub struct Buffers {
    /// The factors at hand, a buffer for each term, and what products with them need.
    parts: Parts,
    /// The products of a side's rows with each other.
    gram: Gram,
    /// What the sides of `B` and of `A` become.
    sides: [Triangular; 2],
}

/// Decomposes every update with up to `threads` threads and hands each result to `emit` with the
/// index of its update, as they finish; `emit` is called from several threads.
///
/// The factors of at most `threads` updates are in memory at any time. An update that fails does not
/// stop the others. The results do not depend on `threads`.
///
/// # Errors
/// [`Cancelled`](crate::Error::Cancelled), and a lack of threads; errors of single updates go to `emit`.
pub fn decompose_all(
    updates: &[Vec<Term>],
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Decomposition>) + Sync),
) -> Result<()> {
    let order = costliest_first(updates.iter().map(|update| cost(update)));
    pool(threads)?.install(|| {
        side_by_side(&order, threads, cancel, &|i, buffers: &mut Buffers| {
            emit(i, guarded(|| decompose(&updates[i], buffers, cancel)));
        });
        cancel.check()
    })
}

/// Multiplications, up to a constant.
fn cost(update: &[Term]) -> u128 {
    let rank: usize = update.iter().map(|term| term.a.shape().0).sum();
    let sides = update.first().map_or(0, |term| term.b.shape().0 + term.a.shape().1);
    (rank as u128).pow(2) * sides as u128
}

/// Decomposes one update.
///
/// # Errors
/// [`InvalidInput`](crate::Error::InvalidInput) if the shapes do not fit,
/// [`Numerical`](crate::Error::Numerical) for NaN and infinite values, and those of reading.
pub fn decompose(update: &[Term], buffers: &mut Buffers, cancel: &CancelToken) -> Result<Decomposition> {
    let shape = checked_shape(update)?;
    if let Some(fast) = by_gram(update, shape, buffers, cancel)? {
        return Ok(fast);
    }
    by_reflections(update, shape, &mut buffers.parts, cancel)
}

/// `None` where the Gram matrices cannot be trusted.
fn by_gram(
    update: &[Term],
    (out, fan_in, rank): (usize, usize, usize),
    buffers: &mut Buffers,
    cancel: &CancelToken,
) -> Result<Option<Decomposition>> {
    if update.iter().any(is_wide) {
        return Ok(None);
    }
    let Buffers { parts, gram, sides: [b, a] } = buffers;
    if !b.find(update, Side::B, (&mut *parts, &mut *gram), cancel)?
        || !a.find(update, Side::A, (&mut *parts, gram), cancel)?
    {
        return Ok(None);
    }
    let mut weighted = b.factor.clone();
    scale_rows(&mut weighted, &weights_of_rows(update));
    let stack = parts.scratch.stack(core_svd_scratch(rank))?;
    let CoreSvd { singular_values, vectors } = CoreSvd::of(weighted.transpose(), a.factor.as_ref(), stack)?;
    let norm = weighted.norm_l2() * a.factor.norm_l2();
    let singular_values = without_noise(singular_values, rank, norm);
    let form = Form::Basis { basis: Basis::new(b, a, vectors), terms: update.into() };
    Ok(Some(Decomposition { singular_values, shape: (out, fan_in), form }))
}

fn is_wide(term: &Term) -> bool {
    term.a.dtype() == DType::F64 || term.b.dtype() == DType::F64
}

/// Singular values with zeros for those that rounding leaves of zeros, where the factors have this norm.
fn without_noise(values: Vec<f64>, rank: usize, norm: f64) -> Vec<f64> {
    let noise = rank as f64 * f64::EPSILON * norm;
    values.into_iter().map(|s| if s > noise { s } else { 0.0 }).collect()
}

pub(crate) fn by_reflections(
    update: &[Term],
    (out, fan_in, rank): (usize, usize, usize),
    Parts { buffers, .. }: &mut Parts,
    cancel: &CancelToken,
) -> Result<Decomposition> {
    buffers.resize_with(buffers.len().max(1), Buffer::default);
    let buffer = &mut buffers[0];
    let scales = Scales::of(update, buffer, cancel)?;
    let mut b = Mat::zeros(out, rank);
    let mut a_transposed = Mat::zeros(fan_in, rank);
    let mut column = 0;
    for (term, (b_scale, a_scale)) in update.iter().zip(&scales.factors) {
        let r = term.a.shape().0;
        upcast(&term.b, *b_scale, b.as_mut().subcols_mut(column, r), buffer, cancel)?;
        let rows = a_transposed.as_mut().subcols_mut(column, r).transpose_mut();
        upcast(&term.a, *a_scale, rows, buffer, cancel)?;
        column += r;
    }
    let (b, a) = (HouseholderQr::new(b), HouseholderQr::new(a_transposed));
    let (r_b, r_a) = (b.r(), a.r());
    let core = dense_svd((&r_b * r_a.transpose()).as_ref())?;
    let values = without_noise(core.singular_values, rank, r_b.norm_l2() * r_a.norm_l2());
    let unit = power_of_two(scales.half_exponent);
    let roots: Vec<f64> = values.iter().map(|s| s.sqrt() * unit).collect();
    let wide = update.iter().any(is_wide);
    let columns = |of: &HouseholderQr, vectors: &Mat<f64>, length| {
        let columns = rotated(of, vectors.as_ref(), &roots, length);
        Arc::new(Values::collect(columns.col_iter().flat_map(|column| column.iter().copied()), wide))
    };
    let form = Form::Explicit { b: columns(&b, &core.u, out), a: columns(&a, &core.v, fan_in) };
    let singular_values = values.into_iter().map(|s| s * unit * unit).collect();
    Ok(Decomposition { singular_values, shape: (out, fan_in), form })
}

/// What the factors are multiplied with before the decomposition.
struct Scales {
    /// For `B` and for `A` of every term: together `weight / 4^half_exponent`.
    factors: Vec<(f64, f64)>,
    /// Half the binary exponent that was taken out of the update.
    half_exponent: i32,
}

impl Scales {
    /// Brings the largest term near 1, the others in proportion, and both factors of each to the
    /// same size.
    fn of(update: &[Term], buffer: &mut Buffer, cancel: &CancelToken) -> Result<Self> {
        let mut exponents = Vec::with_capacity(update.len());
        for term in update {
            let b = exponent(&term.b, buffer, cancel)?;
            let a = exponent(&term.a, buffer, cancel)?;
            let weight = if term.weight == 0.0 { None } else { Some(binary_exponent(term.weight.abs())?) };
            exponents.push(b.zip(a).zip(weight).map(|((b, a), weight)| (b, a, weight)));
        }
        let total = |&(b, a, weight): &(i32, i32, i32)| b + a + weight;
        let half_exponent = exponents.iter().flatten().map(total).max().unwrap_or(0).div_euclid(2);
        let factors = exponents
            .iter()
            .zip(update)
            .map(|(exponents, term)| {
                let Some((b, a, weight)) = exponents else { return (0.0, 0.0) };
                let mantissa = term.weight * power_of_two(-weight);
                let size = b + a + weight - 2 * half_exponent;
                let b_size = size.div_euclid(2).max(-500);
                let a_size = (size - b_size).max(-500);
                (mantissa * power_of_two(b_size - b), power_of_two(a_size - a))
            })
            .collect();
        Ok(Self { factors, half_exponent })
    }
}

/// The binary exponent of the largest entry, `None` for a matrix of zeros.
fn exponent(matrix: &StoredMatrix, buffer: &mut Buffer, cancel: &CancelToken) -> Result<Option<i32>> {
    matrix.with_view(buffer, cancel, |view| {
        let largest = view.max_abs()?;
        if largest == 0.0 { Ok(None) } else { binary_exponent(largest).map(Some) }
    })
}

fn upcast(
    matrix: &StoredMatrix,
    scale: f64,
    out: MatMut<'_, f64>,
    buffer: &mut Buffer,
    cancel: &CancelToken,
) -> Result<()> {
    if scale == 0.0 {
        return Ok(()); // `out` is zero already.
    }
    let (rows, cols) = matrix.shape();
    matrix.with_view(buffer, cancel, |view| {
        view.upcast(0..rows, 0..cols, scale, out);
        Ok(())
    })
}

/// `Q X diag(roots)`.
fn rotated(q: &HouseholderQr, x: MatRef<'_, f64>, roots: &[f64], length: usize) -> Mat<f64> {
    let mut columns = Mat::zeros(length, roots.len());
    columns.as_mut().subrows_mut(0, x.nrows()).copy_from(x);
    q.apply(columns.as_mut());
    scale_columns(&mut columns, roots);
    columns
}

#[cfg(test)]
mod tests;
