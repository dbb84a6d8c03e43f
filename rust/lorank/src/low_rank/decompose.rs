//! Singular value decomposition of a low-rank update from its factors.
//!
//! An update is a sum of terms `sum_j w_j B_j A_j` with `B_j (out, r_j)` and `A_j (r_j, in)`. A module of an
//! adapter has one term, a merge has several. The terms are stacked into one product `B A` of rank at most
//! `K = sum r_j`. With `B = Q_B R_B` and `A^T = Q_A R_A`, the decomposition of the small core
//! `R_B R_A^T = U S V^T` gives that of the update, `(Q_B U) S (Q_A V)^T`. The `out * in` entries of the
//! update are never formed. `U` and `V` are computed for the kept values only
//! ([`core_svd`](crate::low_rank::core_svd)).
//!
//! Source: \[PARA\], equations 2 to 5 and 13.
//!
//! `R` is computed in one of two ways. The fast way is the Cholesky factor of the Gram matrix
//! ([`cholesky_qr`](crate::low_rank::cholesky_qr)), in half the operations of a product and without `Q`. The
//! kept columns of `Q_B U S` and `Q_A V` are products with `B` and `A` ([`basis`](crate::low_rank::basis)).
//! This way is used for factors in types narrower than float64 if a bound shows that `Q` is sufficiently
//! orthonormal. All other updates are decomposed by Householder reflections ([`HouseholderQr`]) in float64,
//! after scaling every factor by a power of two: in float32, the core would lose digits where terms cancel.

use std::sync::Arc;

use faer::{Mat, MatMut, MatRef};

use crate::exec::cancel::CancelToken;
use crate::exec::memory::{copied, zero_matrix};
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool_for, side_by_side};
use crate::kernels::dense::{product, scale_columns, scale_rows};
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
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "the decomposition of an update";

/// The singular values of an update, and the data to compute its factors.
#[derive(Clone, Debug)]
pub struct Decomposition {
    /// The `k` singular values, descending. Values that are zero up to rounding are 0.
    pub singular_values: Vec<f64>,
    /// Shape of the update, `(out, in)`.
    pub shape: (usize, usize),
    pub(crate) form: Form,
}

#[derive(Clone, Debug)]
pub(crate) enum Form {
    /// The balanced columns are products of the stacked factors and small matrices. Terms in files are read
    /// again for them: new memory to store them would cost more than a warm disk cache.
    Basis { terms: Arc<[Term]>, basis: Basis },
    /// The balanced columns, `(k, out)` and `(k, in)`, in the precision in which they are written.
    Explicit { b: Arc<Values>, a: Arc<Values> },
}

/// Reusable memory for decompositions.
#[derive(Default)]
pub struct Buffers {
    /// One buffer per term, and temporaries of the products.
    parts: Parts,
    /// Gram matrix of one side.
    gram: Gram,
    /// Triangular factors of `B` and of `A`.
    sides: [Triangular; 2],
}

/// Decomposes every update with up to `threads` threads. Calls `emit` with the index of an update and its
/// result as soon as the update is finished; several threads call `emit`.
///
/// The factors of at most `threads` updates are in memory at any time. An update that fails does not stop the
/// others. The results do not depend on `threads`.
///
/// # Errors
/// [`Cancelled`](crate::Error::Cancelled), and [`NoThreads`](crate::Error::NoThreads). `emit` receives the
/// errors of single updates.
pub fn decompose_all(
    updates: &[Vec<Term>],
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Decomposition>) + Sync),
) -> Result<()> {
    let order = costliest_first(updates.iter().map(|update| cost(update)));
    pool_for(threads, order.len())?.install(|| {
        side_by_side(&order, threads, cancel, &|i, buffers: &mut Buffers| {
            emit(i, guarded(|| decompose(&updates[i], buffers, cancel)));
        });
        cancel.check()
    })
}

/// Returns the number of multiplications, up to a constant.
fn cost(update: &[Term]) -> u128 {
    let rank: usize = update.iter().map(|term| term.a.shape().0).sum();
    let sides = update.first().map_or(0, |term| term.b.shape().0 + term.a.shape().1);
    (rank as u128).pow(2) * sides as u128
}

/// Decomposes one update.
///
/// # Errors
/// [`InvalidInput`](crate::Error::InvalidInput) if the shapes do not match,
/// [`Numerical`](crate::Error::Numerical) for NaN and infinite values, and the errors of loading the factors.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use lorank::low_rank::{Buffers, Term};
/// use lorank::{cancel::CancelToken, dtype::DType, product_svd::decompose, source::StoredMatrix};
///
/// let stored = |values: &[f64], shape: (usize, usize)| {
///     let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
///     StoredMatrix::in_memory(Arc::new(bytes), DType::F64, shape, (shape.1, 1)).unwrap()
/// };
/// // 0.5 B A with orthogonal columns of B and orthogonal rows of A.
/// let b = stored(&[3.0, 0.0, 0.0, 1.0, 4.0, 0.0], (3, 2));
/// let a = stored(&[0.0, 2.0, 2.0, 0.0], (2, 2));
/// let found = decompose(&[Term { b, a, weight: 0.5 }], &mut Buffers::default(), &CancelToken::default()).unwrap();
/// assert!((found.singular_values[0] - 5.0).abs() < 1e-14);
/// assert!((found.singular_values[1] - 1.0).abs() < 1e-14);
/// ```
pub fn decompose(update: &[Term], buffers: &mut Buffers, cancel: &CancelToken) -> Result<Decomposition> {
    let shape = checked_shape(update)?;
    if let Some(fast) = by_gram(update, shape, buffers, cancel)? {
        return Ok(fast);
    }
    by_reflections(update, shape, &mut buffers.parts, cancel)
}

/// Decomposes by Gram matrices. Returns `None` if they are not accurate enough.
fn by_gram(
    update: &[Term],
    (out, fan_in, rank): (usize, usize, usize),
    buffers: &mut Buffers,
    cancel: &CancelToken,
) -> Result<Option<Decomposition>> {
    if update.iter().any(is_float64) {
        return Ok(None);
    }
    let Buffers { parts, gram, sides: [b, a] } = buffers;
    if !b.find(update, Side::B, (&mut *parts, &mut *gram), cancel)?
        || !a.find(update, Side::A, (&mut *parts, gram), cancel)?
    {
        return Ok(None);
    }
    let mut weighted = copied(b.factor.as_ref(), MEMORY)?;
    scale_rows(&mut weighted, &weights_of_rows(update));
    let stack = parts.scratch.stack(core_svd_scratch(rank))?;
    let CoreSvd { singular_values, vectors } = CoreSvd::of(weighted.transpose(), a.factor.as_ref(), stack)?;
    let norm = weighted.norm_l2() * a.factor.norm_l2();
    // Weights may leave the range of float64, where a product of zero does not show an update of zero.
    let is_zero = b.factor.norm_l2() == 0.0
        || a.factor.norm_l2() == 0.0
        || update.iter().all(|term| term.weight == 0.0);
    if !is_zero && binary_exponent(norm).is_err() {
        return Ok(None);
    }
    let singular_values = without_noise(singular_values, rank, norm);
    let form = Form::Basis { basis: Basis::new(b, a, vectors)?, terms: update.into() };
    Ok(Some(Decomposition { singular_values, shape: (out, fan_in), form }))
}

fn is_float64(term: &Term) -> bool {
    term.a.dtype() == DType::F64 || term.b.dtype() == DType::F64
}

/// Refuses an update whose energy leaves the range of float64. Its largest singular value is
/// `largest * 2^exponent`.
fn check_range(largest: f64, exponent: i32) -> Result<()> {
    if largest == 0.0 || binary_exponent(largest * power_of_two(exponent)).is_ok() {
        return Ok(());
    }
    let power = largest.log2() + f64::from(exponent);
    Err(Error::Numerical(format!(
        "its largest singular value is about 2^{power:.0}: its square leaves the range of float64; correct the \
         scaling or the factors"
    )))
}

/// Replaces singular values by 0 if they are zero up to rounding, for factors with the given product of
/// norms.
fn without_noise(mut values: Vec<f64>, rank: usize, norm: f64) -> Vec<f64> {
    let noise = rank as f64 * f64::EPSILON * norm;
    for s in &mut values {
        *s = if *s > noise { *s } else { 0.0 };
    }
    values
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
    let mut b = zero_matrix(out, rank, MEMORY)?;
    let mut a_transposed = zero_matrix(fan_in, rank, MEMORY)?;
    let mut column = 0;
    for (term, (b_scale, a_scale)) in update.iter().zip(&scales.factors) {
        let r = term.a.shape().0;
        upcast(&term.b, *b_scale, b.as_mut().subcols_mut(column, r), buffer, cancel)?;
        let rows = a_transposed.as_mut().subcols_mut(column, r).transpose_mut();
        upcast(&term.a, *a_scale, rows, buffer, cancel)?;
        column += r;
    }
    let (b, a) = (HouseholderQr::new(b)?, HouseholderQr::new(a_transposed)?);
    let (r_b, r_a) = (b.r()?, a.r()?);
    let core = dense_svd(product(r_b.as_ref(), r_a.transpose())?.as_ref())?;
    let values = without_noise(core.singular_values, rank, r_b.norm_l2() * r_a.norm_l2());
    let unit = power_of_two(scales.half_exponent);
    check_range(values.first().copied().unwrap_or(0.0), 2 * scales.half_exponent)?;
    let roots: Vec<f64> = values.iter().map(|s| s.sqrt() * unit).collect();
    let in_float64 = update.iter().any(is_float64);
    let columns = |of: &HouseholderQr, vectors: &Mat<f64>, length| {
        let columns = rotated(of, vectors.as_ref(), &roots, length)?;
        let count = length * columns.ncols();
        let values = columns.col_iter().flat_map(|column| column.iter().copied());
        Values::collect(values, count, in_float64).map(Arc::new)
    };
    let form = Form::Explicit { b: columns(&b, &core.u, out)?, a: columns(&a, &core.v, fan_in)? };
    let singular_values = values.into_iter().map(|s| s * unit * unit).collect();
    Ok(Decomposition { singular_values, shape: (out, fan_in), form })
}

/// Scale factors that are applied before the decomposition.
struct Scales {
    /// Scales of `B` and of `A` of every term. Their product is `weight / 4^half_exponent`.
    factors: Vec<(f64, f64)>,
    /// Half of the binary exponent by which the update is scaled.
    half_exponent: i32,
}

impl Scales {
    /// Scales the largest term to about 1, the others by the same amount, and both factors of a term to the
    /// same size.
    fn of(update: &[Term], buffer: &mut Buffer, cancel: &CancelToken) -> Result<Self> {
        let mut exponents = Vec::with_capacity(update.len());
        for term in update {
            let b = exponent(&term.b, buffer, cancel)?;
            let a = exponent(&term.a, buffer, cancel)?;
            exponents.push(match b.zip(a) {
                Some((b, a)) if term.weight != 0.0 => Some((b, a, binary_exponent(term.weight.abs())?)),
                _ => None,
            });
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

/// Returns the binary exponent of the largest entry, or `None` for a zero matrix.
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

/// Returns `Q X diag(roots)`.
fn rotated(q: &HouseholderQr, x: MatRef<'_, f64>, roots: &[f64], length: usize) -> Result<Mat<f64>> {
    let mut columns = zero_matrix(length, roots.len(), MEMORY)?;
    columns.as_mut().subrows_mut(0, x.nrows()).copy_from(x);
    q.apply(columns.as_mut())?;
    scale_columns(&mut columns, roots);
    Ok(columns)
}

#[cfg(test)]
mod tests;
