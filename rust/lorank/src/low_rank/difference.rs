//! The leading singular triplets of the difference of two weights: a full fine-tune minus its base.
//!
//! Small differences are decomposed in full. Large ones are decomposed by randomised subspace iteration
//! (\[HMT\], algorithms 4.4 and 5.1). It finds the range of `(D D^T)^q D Omega` for a Gaussian `Omega` with a
//! few more columns than the rank, and decomposes `Q^T D`. The error of a value falls with the power `2q + 1`
//! of the ratio of the first dropped value to it. With `q = 4`, the energy of the leading values is accurate
//! to a thousandth of the total energy, or half a per cent for a flat spectrum. The first dropped value of a
//! flat spectrum may be up to 5 per cent too small (see the tests). The total energy is computed from the
//! difference itself.

use faer::{Mat, MatRef};

use crate::exec::cancel::CancelToken;
use crate::exec::memory::{identity, matrix, resize};
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool_for, side_by_side};
use crate::kernels::dense::product;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::low_rank::triplets::{Triplets, balanced};
use crate::storage::source::{Buffer, StoredMatrix};
use crate::svd::qr::HouseholderQr;
use crate::svd::{SvdSpace, ThinSvd, dense_svd};
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "a difference of weights";

/// Number of columns of the random start beyond the rank.
const OVERSAMPLING: usize = 16;

/// Number of applications of `D D^T` to the random start.
const POWER_ITERATIONS: usize = 4;

/// Largest smaller side of differences that are decomposed in full, in less than a second.
const EXACT_UP_TO: usize = 512;

/// Number of rows of the base that are subtracted at a time.
const BLOCK_ROWS: usize = 64;

/// Reusable memory for differences. Without reuse, large temporary allocations would leave holes between the
/// small results, which stay allocated.
#[derive(Default)]
pub struct Buffers {
    /// Stored elements of one weight.
    buffer: Buffer,
    /// Difference, row-major.
    difference: Vec<f64>,
    /// Rows of the base.
    block: Vec<f64>,
    /// Memory of a full decomposition.
    space: SvdSpace,
}

/// The weight of a module before and after fine-tuning.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Weight after fine-tuning, `(out, in)`.
    pub tuned: StoredMatrix,
    /// Weight before fine-tuning, `(out, in)`.
    pub base: StoredMatrix,
}

/// The leading part of a difference, and its total energy.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Leading triplets up to the requested rank, in float32.
    pub leading: Triplets,
    /// `||tuned - base||_F^2`.
    pub energy: f64,
    /// The first dropped singular value: the spectral norm of the remainder, 0 if there is none. For a large
    /// difference, an estimate from below.
    pub next: f64,
}

/// Decomposes every difference with up to `threads` threads, as
/// [`decompose_all`](crate::low_rank::decompose::decompose_all) decomposes updates: at most `threads`
/// differences are in memory at any time, and the results do not depend on `threads`.
///
/// # Errors
/// [`Cancelled`](crate::Error::Cancelled), and [`NoThreads`](crate::Error::NoThreads). `emit` receives the
/// errors of single pairs.
pub fn subtract_all(
    pairs: &[Pair],
    max_rank: usize,
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Difference>) + Sync),
) -> Result<()> {
    let cost = |pair: &Pair| pair.base.shape().0 as u128 * pair.base.shape().1 as u128;
    let order = costliest_first(pairs.iter().map(cost));
    pool_for(threads, order.len())?.install(|| {
        side_by_side(&order, threads, cancel, &|i, buffers: &mut Buffers| {
            emit(i, guarded(|| subtract(&pairs[i], max_rank, buffers, cancel)));
        });
        cancel.check()
    })
}

/// Computes the leading `max_rank` singular triplets of `tuned - base`.
///
/// # Errors
/// [`Error::InvalidInput`] if the shapes differ, [`Error::Numerical`] for NaN and infinite values,
/// [`Error::OutOfMemory`], and the errors of loading the weights.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use lorank::difference_svd::{Buffers, Pair, subtract};
/// use lorank::{cancel::CancelToken, dtype::DType, source::StoredMatrix};
///
/// let stored = |values: [f64; 4]| {
///     let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
///     StoredMatrix::in_memory(Arc::new(bytes), DType::F64, (2, 2), (2, 1)).unwrap()
/// };
/// let pair = Pair { tuned: stored([4.0, 1.0, 1.0, 2.0]), base: stored([1.0, 1.0, 1.0, 1.0]) };
/// let found = subtract(&pair, 1, &mut Buffers::default(), &CancelToken::default()).unwrap();
/// assert!((found.leading.singular_values[0] - 3.0).abs() < 1e-14);
/// assert!((found.next - 1.0).abs() < 1e-14);
/// ```
pub fn subtract(
    pair: &Pair,
    max_rank: usize,
    buffers: &mut Buffers,
    cancel: &CancelToken,
) -> Result<Difference> {
    let (rows, cols) = pair.base.shape();
    if pair.tuned.shape() != (rows, cols) {
        let (r, c) = pair.tuned.shape();
        return Err(Error::InvalidInput(format!(
            "the shapes differ: {r}x{c} after the fine-tune, {rows}x{cols} before"
        )));
    }
    let exponent = scaled_difference(pair, buffers, cancel)?;
    let difference = MatRef::from_row_major_slice(&buffers.difference, rows, cols);
    let (rank, unit) = (max_rank.min(rows).min(cols), power_of_two(exponent));
    let energy = difference.squared_norm_l2() * unit * unit;
    let leading_of = |values: &[f64], u: MatRef<'_, f64>, v: MatRef<'_, f64>| {
        let (u, v) = (u.subcols(0, rank), v.subcols(0, rank));
        let next = values.get(rank).copied().unwrap_or(0.0) * unit;
        Ok(Difference { leading: balanced(u, &values[..rank], v, exponent)?, energy, next })
    };
    if rows.min(cols) <= EXACT_UP_TO || rank + OVERSAMPLING >= rows.min(cols) / 2 {
        // Transposed, as the row-major difference is then column-major.
        let (values, v, u) = buffers.space.decompose(difference.transpose())?;
        leading_of(&values, u, v)
    } else {
        let svd = randomized(difference, rank, cancel)?;
        leading_of(&svd.singular_values, svd.u.as_ref(), svd.v.as_ref())
    }
}

/// Computes `(tuned - base) / 2^exponent`, with a largest entry near 1, in the buffers. Returns the exponent.
fn scaled_difference(pair: &Pair, buffers: &mut Buffers, cancel: &CancelToken) -> Result<i32> {
    let (rows, cols) = pair.base.shape();
    let Buffers { buffer, difference, block, .. } = buffers;
    resize(difference, rows.saturating_mul(cols), MEMORY)?;
    pair.tuned.with_view(buffer, cancel, |view| {
        view.max_abs()?; // Reports NaN and infinities.
        view.upcast_rows(0..rows, 1.0, difference);
        Ok(())
    })?;
    pair.base.with_view(buffer, cancel, |view| {
        view.max_abs()?;
        for (k, part) in difference.chunks_mut(BLOCK_ROWS * cols.max(1)).enumerate() {
            let first = k * BLOCK_ROWS;
            resize(block, part.len(), MEMORY)?;
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
    let mut range = orthonormal(product(a, gaussian(a.ncols(), width)?.as_ref())?)?;
    for _ in 0..POWER_ITERATIONS {
        cancel.check()?;
        let back = orthonormal(product(a.transpose(), range.as_ref())?)?;
        range = orthonormal(product(a, back.as_ref())?)?;
    }
    cancel.check()?;
    // A = Q (Q^T A): the transpose of the small factor is tall.
    let small = product(a.transpose(), range.as_ref())?;
    let inner = dense_svd(small.as_ref())?;
    Ok(ThinSvd {
        u: product(range.as_ref(), inner.v.as_ref())?,
        singular_values: inner.singular_values,
        v: inner.u,
    })
}

fn orthonormal(a: Mat<f64>) -> Result<Mat<f64>> {
    let mut q = identity(a.nrows(), a.ncols().min(a.nrows()), MEMORY)?;
    HouseholderQr::new(a)?.apply(q.as_mut())?;
    Ok(q)
}

/// Returns sums of twelve uniform numbers. They are sufficiently Gaussian for a random start, and equal on
/// all machines.
fn gaussian(rows: usize, cols: usize) -> Result<Mat<f64>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    matrix(rows, cols, MEMORY, |_, _| (0..12).map(|_| uniform()).sum::<f64>() - 6.0)
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

    /// Returns a matrix with pseudo-random singular vectors and given values.
    fn with_values(rows: usize, cols: usize, value: impl Fn(usize) -> f64) -> Mat<f64> {
        let k = rows.min(cols);
        // Rows in reverse order, so that the vectors are independent of the random start of the algorithm.
        let swapped = |x: Mat<f64>| x.as_ref().reverse_rows().to_owned();
        let basis = |length| orthonormal(gaussian(length, k).unwrap()).unwrap();
        let (u, v) = (swapped(basis(rows)), swapped(basis(cols)));
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
            // A subspace cannot give a larger value.
            assert!(found.next <= value(rank) * (1.0 + 1e-9), "case {case}");
            assert!(found.next >= value(rank) * 0.95, "case {case}: {} of {}", found.next, value(rank));
        }
    }

    #[test]
    fn product_of_the_factors_is_the_truncation() {
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
    fn invalid_pairs_are_errors() {
        let pair = Pair { tuned: stored(&Mat::zeros(2, 3)), base: stored(&Mat::zeros(3, 2)) };
        let fail = |pair: &Pair| {
            subtract(pair, 1, &mut Buffers::default(), &CancelToken::default()).unwrap_err().to_string()
        };
        assert!(fail(&pair).contains("2x3 after the fine-tune, 3x2 before"));
        let nan = Pair { tuned: stored(&Mat::full(2, 2, f64::NAN)), base: stored(&Mat::zeros(2, 2)) };
        assert!(fail(&nan).contains("NaN"));
    }
}
