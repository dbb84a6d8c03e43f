//! The leading singular triplets of the difference of two weights: a full fine-tune minus its base.
//!
//! Small differences are decomposed in full. Large ones by randomised subspace iteration (Halko,
//! Martinsson and Tropp, *Finding structure with randomness*, 2011, algorithms 4.4 and 5.1): the
//! range of `(D D^T)^q D Omega` for a Gaussian `Omega` with a few more columns than wanted, then the
//! decomposition of `Q^T D`. The error of a value falls with the `2q + 1`-th power of the ratio of the
//! first value left out to it; `q = 4` keeps the energy of the leading ones, which is what a truncation
//! is about, to better than a thousandth of the whole, and to half a per cent where the spectrum is flat;
//! the first value left out comes out up to 5 per cent too small there (see the tests). The energy of
//! the whole is that of the difference itself, and so is what is missing of it.

use faer::{Mat, MatRef};

use crate::exec::cancel::CancelToken;
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool, side_by_side};
use crate::kernels::dense::product;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::low_rank::triplets::{Triplets, balanced};
use crate::storage::source::{Buffer, StoredMatrix};
use crate::svd::qr::HouseholderQr;
use crate::svd::{SvdSpace, ThinSvd, dense_svd};
use crate::{Error, Result};

/// Columns of the random start beyond the rank that is wanted.
const OVERSAMPLING: usize = 16;

/// Applications of `D D^T` to the random start.
const POWER_ITERATIONS: usize = 4;

/// Smaller sides up to this are decomposed in full: it takes less than a second.
const EXACT_UP_TO: usize = 512;

/// Rows of the base that are subtracted at a time.
const BLOCK_ROWS: usize = 64;

/// What a worker keeps from one difference to the next, so that large pieces of memory that come and go
/// leave no holes between the small results, which stay.
#[derive(Default)]
pub struct Buffers {
    /// The stored elements of the weight at hand.
    buffer: Buffer,
    /// The difference, row by row.
    difference: Vec<f64>,
    /// Some rows of the base.
    block: Vec<f64>,
    /// What a decomposition in full needs.
    space: SvdSpace,
}

/// Two weights of one module.
#[derive(Clone, Debug)]
pub struct Pair {
    /// After the fine-tune, `(out, in)`.
    pub tuned: StoredMatrix,
    /// Before it, `(out, in)`.
    pub base: StoredMatrix,
}

/// The leading part of a difference, and the whole of its energy.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Up to the rank that was asked for, float32.
    pub leading: Triplets,
    /// `||tuned - base||_F^2`.
    pub energy: f64,
    /// The first singular value that was left out: the spectral norm of what is missing, 0 if nothing
    /// is. Of a large difference an estimate from below.
    pub next: f64,
}

/// Decomposes every difference with up to `threads` threads, as
/// [`decompose_all`](crate::low_rank::decompose::decompose_all) does for adapters: at most `threads`
/// differences are in memory at any time, and the results do not depend on `threads`.
///
/// # Errors
/// [`Cancelled`](crate::Error::Cancelled), and a lack of threads; errors of single pairs go to `emit`.
pub fn subtract_all(
    pairs: &[Pair],
    max_rank: usize,
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Difference>) + Sync),
) -> Result<()> {
    let cost = |pair: &Pair| pair.base.shape().0 as u128 * pair.base.shape().1 as u128;
    let order = costliest_first(pairs.iter().map(cost));
    pool(threads)?.install(|| {
        side_by_side(&order, threads, cancel, &|i, buffers: &mut Buffers| {
            emit(i, guarded(|| subtract(&pairs[i], max_rank, buffers, cancel)));
        });
        cancel.check()
    })
}

/// The leading `max_rank` singular triplets of `tuned - base`.
///
/// # Errors
/// [`Error::InvalidInput`] if the shapes differ, [`Error::Numerical`] for NaN and infinite values,
/// [`Error::OutOfMemory`], and those of reading.
pub fn subtract(
    pair: &Pair,
    max_rank: usize,
    buffers: &mut Buffers,
    cancel: &CancelToken,
) -> Result<Difference> {
    let (rows, cols) = pair.base.shape();
    if pair.tuned.shape() != (rows, cols) {
        let (r, c) = pair.tuned.shape();
        return Err(Error::InvalidInput(format!("{r}x{c} after the fine-tune, {rows}x{cols} before")));
    }
    let exponent = scaled_difference(pair, buffers, cancel)?;
    let difference = MatRef::from_row_major_slice(&buffers.difference, rows, cols);
    let (rank, unit) = (max_rank.min(rows).min(cols), power_of_two(exponent));
    let energy = difference.squared_norm_l2() * unit * unit;
    let leading_of = |values: &[f64], u: MatRef<'_, f64>, v: MatRef<'_, f64>| {
        let (u, v) = (u.subcols(0, rank), v.subcols(0, rank));
        let next = values.get(rank).copied().unwrap_or(0.0) * unit;
        Difference { leading: balanced(u, &values[..rank], v, exponent), energy, next }
    };
    if rows.min(cols) <= EXACT_UP_TO || rank + OVERSAMPLING >= rows.min(cols) / 2 {
        // Transposed, as it is column by column then.
        let (values, v, u) = buffers.space.decompose(difference.transpose())?;
        Ok(leading_of(&values, u, v))
    } else {
        let svd = randomized(difference, rank, cancel)?;
        Ok(leading_of(&svd.singular_values, svd.u.as_ref(), svd.v.as_ref()))
    }
}

/// Leaves `(tuned - base) / 2^exponent`, its largest entry near 1, in the buffers and returns the exponent.
fn scaled_difference(pair: &Pair, buffers: &mut Buffers, cancel: &CancelToken) -> Result<i32> {
    let (rows, cols) = pair.base.shape();
    let Buffers { buffer, difference, block, .. } = buffers;
    let size = rows * cols;
    if difference.capacity() < size {
        *difference = Vec::new(); // Freed before it grows: old and new together would set the peak.
        let bytes = size.saturating_mul(size_of::<f64>());
        let no_memory = |_| Error::no_memory(bytes, "a difference of weights");
        difference.try_reserve_exact(size).map_err(no_memory)?;
    }
    difference.resize(size, 0.0);
    pair.tuned.with_view(buffer, cancel, |view| {
        view.max_abs()?; // Refuses NaN and infinities.
        view.upcast_rows(0..rows, 1.0, difference);
        Ok(())
    })?;
    pair.base.with_view(buffer, cancel, |view| {
        view.max_abs()?;
        for (k, part) in difference.chunks_mut(BLOCK_ROWS * cols.max(1)).enumerate() {
            let first = k * BLOCK_ROWS;
            block.resize(part.len(), 0.0);
            view.upcast_rows(first..(first + BLOCK_ROWS).min(rows), 1.0, block);
            part.iter_mut().zip(&*block).for_each(|(x, y)| *x -= y);
        }
        Ok(())
    })?;
    let largest = difference.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    if largest == 0.0 {
        return Ok(0);
    }
    let exponent = binary_exponent(largest)?;
    let scale = power_of_two(-exponent);
    for x in difference.iter_mut() {
        *x *= scale;
    }
    Ok(exponent)
}

fn randomized(a: MatRef<'_, f64>, rank: usize, cancel: &CancelToken) -> Result<ThinSvd> {
    let width = rank + OVERSAMPLING;
    let mut range = orthonormal(&product(a, gaussian(a.ncols(), width).as_ref()));
    for _ in 0..POWER_ITERATIONS {
        cancel.check()?;
        let back = orthonormal(&product(a.transpose(), range.as_ref()));
        range = orthonormal(&product(a, back.as_ref()));
    }
    cancel.check()?;
    // A = Q (Q^T A): the small factor's transpose is tall.
    let small = product(a.transpose(), range.as_ref());
    let inner = dense_svd(small.as_ref())?;
    Ok(ThinSvd {
        u: product(range.as_ref(), inner.v.as_ref()),
        singular_values: inner.singular_values,
        v: inner.u,
    })
}

fn orthonormal(a: &Mat<f64>) -> Mat<f64> {
    let mut q = Mat::identity(a.nrows(), a.ncols().min(a.nrows()));
    HouseholderQr::new(a.clone()).apply(q.as_mut());
    q
}

/// Sums of twelve uniform numbers: near enough to Gaussian for a random start, and the same anywhere.
fn gaussian(rows: usize, cols: usize) -> Mat<f64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    Mat::from_fn(rows, cols, |_, _| (0..12).map(|_| uniform()).sum::<f64>() - 6.0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::low_rank::triplets::Values;
    use crate::matrix::dtype::DType;

    fn stored(matrix: &Mat<f64>) -> StoredMatrix {
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let bytes: Vec<u8> =
            (0..rows).flat_map(|i| (0..cols).flat_map(move |j| matrix[(i, j)].to_le_bytes())).collect();
        StoredMatrix::in_memory(Arc::new(bytes), DType::F64, (rows, cols), (cols, 1)).unwrap()
    }

    fn difference(base: &Mat<f64>, change: &Mat<f64>, rank: usize) -> Difference {
        let pair = Pair { tuned: stored(&(base + change)), base: stored(base) };
        subtract(&pair, rank, &mut Buffers::default(), &CancelToken::default()).unwrap()
    }

    /// Random singular vectors, given values.
    fn with_values(rows: usize, cols: usize, value: impl Fn(usize) -> f64) -> Mat<f64> {
        let k = rows.min(cols);
        // Rows swapped: the algorithm's own random start must not know the subspaces.
        let swapped = |x: Mat<f64>| x.as_ref().reverse_rows().to_owned();
        let (u, v) = (swapped(orthonormal(&gaussian(rows, k))), swapped(orthonormal(&gaussian(cols, k))));
        Mat::from_fn(rows, k, |i, j| u[(i, j)] * value(j)) * v.transpose()
    }

    #[test]
    fn small_differences_are_exact() {
        let base = Mat::zeros(20, 33);
        let change = with_values(20, 33, |i| 3.0 / (i + 1) as f64);
        let found = difference(&base, &change, 5);
        for (i, s) in found.leading.singular_values.iter().enumerate() {
            assert!((s - 3.0 / (i + 1) as f64).abs() < 1e-13);
        }
        assert!((found.next - 0.5).abs() < 1e-13);
        assert!(difference(&base, &change, 20).next.abs() < f64::MIN_POSITIVE);
        let energy: f64 = (1..=20).map(|i| 9.0 / f64::from(i * i)).sum();
        assert!((found.energy - energy).abs() < 1e-12 * energy);
        let same = difference(&change, &Mat::zeros(20, 33), 5);
        assert_eq!((same.energy, same.next, same.leading.singular_values), (0.0, 0.0, vec![0.0; 5]));
    }

    #[test]
    fn large_differences_keep_the_energy_of_the_full_decomposition() {
        type Decay = fn(usize) -> f64;
        let (rows, cols, rank) = (700, 540, 24);
        let decays: [(Decay, f64); 4] = [
            (|i| 0.9f64.powi(i32::try_from(i).unwrap()), 1e-12),
            (|i| 1.0 / ((i + 1) as f64).sqrt(), 1e-3),
            (|i| 1.0 - i as f64 / 1000.0, 5e-3), // nearly flat: the hard case
            (|i| if i < 24 { 1.0 } else { 0.999 }, 1e-3),
        ];
        for (case, (value, loss)) in decays.into_iter().enumerate() {
            let found = difference(&Mat::zeros(rows, cols), &with_values(rows, cols, value), rank);
            let kept: f64 = found.leading.singular_values.iter().map(|s| s * s).sum();
            let best: f64 = (0..rank).map(|i| value(i).powi(2)).sum();
            let whole: f64 = (0..cols).map(|i| value(i).powi(2)).sum();
            assert!((found.energy - whole).abs() < 1e-9 * whole);
            assert!(kept <= best * (1.0 + 1e-9), "case {case}");
            assert!(best - kept <= loss * whole, "case {case}: {kept} of {best}");
            // Of a subspace, hence never above the true one.
            assert!(found.next <= value(rank) * (1.0 + 1e-9), "case {case}");
            assert!(found.next >= value(rank) * 0.95, "case {case}: {} of {}", found.next, value(rank));
        }
    }

    #[test]
    fn the_factors_multiply_to_the_truncation() {
        let change = with_values(600, 530, |i| 0.8f64.powi(i32::try_from(i).unwrap()));
        let found = difference(&Mat::zeros(600, 530), &change, 10).leading;
        let (Values::F32(b), Values::F32(a)) = (&found.b_columns, &found.a_rows) else { panic!("float32") };
        let left = Mat::from_fn(600, 10, |i, j| f64::from(b[j * 600 + i]));
        let right = Mat::from_fn(10, 530, |i, j| f64::from(a[i * 530 + j]));
        let error = (&change - left * right).norm_l2();
        let best: f64 = (10..530).map(|i| 0.8f64.powi(2 * i)).sum::<f64>().sqrt();
        assert!((error - best).abs() < 1e-6, "{error} {best}");
    }

    #[test]
    fn misfits_are_errors() {
        let pair = Pair { tuned: stored(&Mat::zeros(2, 3)), base: stored(&Mat::zeros(3, 2)) };
        let fail = |pair: &Pair| {
            subtract(pair, 1, &mut Buffers::default(), &CancelToken::default()).unwrap_err().to_string()
        };
        assert!(fail(&pair).contains("2x3 after the fine-tune, 3x2 before"));
        let nan = Pair { tuned: stored(&Mat::full(2, 2, f64::NAN)), base: stored(&Mat::zeros(2, 2)) };
        assert!(fail(&nan).contains("NaN"));
    }
}
