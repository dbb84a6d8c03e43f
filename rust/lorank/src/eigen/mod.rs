//! Eigenvalues of `W^T W`: exact (float64), fast (float32), or estimated.
//!
//! `W` is scaled by a power of two unless its largest entry is near 1, and multiplied into a Gram matrix of
//! order `p = min(out, in)` ([`gram`](mod@gram)). The Gram matrix is reduced to tridiagonal form
//! ([`tridiag`]), whose eigenvalues are always computed in float64 ([`root_free_ql`]). The absolute error of
//! an eigenvalue is a small multiple of `eps * lambda_max`. In float64, eigenvalues down to `1e-6 lambda_max`
//! (singular values down to a thousandth of the largest) have nine or more correct digits. In float32,
//! eigenvalues below `1e-6 lambda_max` are lost, as the Gram matrix squares the condition number; the error
//! bound covers this.

pub(crate) mod band;
pub(crate) mod band_layout;
mod band_updates;
pub(crate) mod bulge;
pub(crate) mod gram;
mod gram_product;
mod one_stage;
mod panel_qr;
mod ql_pipeline;
pub(crate) mod root_free_ql;
pub mod sampled;
pub(crate) mod selected;
pub(crate) mod tridiag;
pub(crate) mod tridiagonal;
mod twisted;

use faer::MatMut;
use faer::prelude::ReborrowMut;

use crate::Result;
use crate::eigen::gram::{gram, gram_scratch, panel_size};
use crate::eigen::root_free_ql::tridiagonal_eigenvalues;
use crate::eigen::sampled::sampled_spectrum;
use crate::eigen::tridiag::{tridiagonalize, tridiagonalize_scratch};
use crate::exec::cancel::CancelToken;
use crate::exec::memory::{probe, zeros};
use crate::exec::parallel::{Strategy, pieces_of, pool_for};
use crate::exec::scratch::Scratch;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::kernels::number::{Number, spaced};
use crate::matrix::MatrixView;
use crate::statistics::spectrum::Spectrum;

/// Least number of rows and columns for which float32 saves time.
const FAST_FROM: usize = 128;

/// Largest ratio of the sides of a matrix for float32. Longer matrices are embeddings. The common direction
/// of their rows dominates the largest eigenvalue, so that error bounds relative to it are useless.
const FAST_RATIO: usize = 32;

/// Least number of rows and columns for which an estimate is several times faster than float32.
const SAMPLED_FROM: usize = 2048;

/// Number of vectors of eigenvalues and of entries of tridiagonal matrices that are alive at a time.
const VECTORS: usize = 8;

/// The arithmetic of a spectrum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accuracy {
    /// float64.
    Exact,
    /// float32 for the Gram matrix and its reduction, which take most of the time.
    Fast,
    /// An estimate from random vectors ([`sampled`]), for matrices whose reduction
    /// takes long.
    Sampled,
}

impl Accuracy {
    /// Returns the arithmetic for a `(rows, cols)` matrix: small matrices are computed in float64 or float32
    /// regardless.
    #[must_use]
    pub const fn for_shape(self, rows: usize, cols: usize) -> Self {
        let (p, m) = if rows < cols { (rows, cols) } else { (cols, rows) };
        match self {
            _ if p < FAST_FROM || m > FAST_RATIO * p => Self::Exact,
            Self::Sampled if p < SAMPLED_FROM => Self::Fast,
            _ => self,
        }
    }
}

/// Computes the eigenvalues of `W^T W` with up to `threads` threads. The result does not depend on `threads`.
///
/// # Errors
/// [`Error::Numerical`](crate::Error::Numerical) if `W` contains NaN or infinite values, or if its entries
/// are so large or small (beyond `2^±480`) that eigenvalues leave the range of float64;
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::Cancelled`](crate::Error::Cancelled).
///
/// # Examples
/// ```
/// use lorank::cancel::CancelToken;
/// use lorank::eigen::{Accuracy, spectrum};
/// use lorank::matrix::MatrixView;
///
/// let view = MatrixView::from_f32(&[3.0, 0.0, 0.0, 0.0, 4.0, 0.0], 2, 3).unwrap();
/// let found = spectrum(&view, Accuracy::Exact, 1, &CancelToken::default()).unwrap();
/// assert!((found.eigenvalues()[0] - 9.0).abs() < 1e-12);
/// assert!((found.eigenvalues()[1] - 16.0).abs() < 1e-12);
/// ```
pub fn spectrum(
    view: &MatrixView<'_>,
    accuracy: Accuracy,
    threads: usize,
    cancel: &CancelToken,
) -> Result<Spectrum> {
    let mut scratch = Scratch::default();
    let strategy = if threads > 1 { Strategy::for_single(view.rows(), view.cols()) } else { Strategy::Alone };
    let mut work = || spectrum_in_pool(view, accuracy, strategy, cancel, &mut scratch);
    match strategy {
        Strategy::Alone => work(),
        Strategy::Together => pool_for(threads, pieces_of(view.rows(), view.cols()))?.install(work),
    }
}

/// Computes a [`spectrum`] for a caller that already runs in the thread pool and reuses memory.
///
/// # Errors
/// The errors of [`spectrum`].
pub fn spectrum_in_pool(
    view: &MatrixView<'_>,
    accuracy: Accuracy,
    strategy: Strategy,
    cancel: &CancelToken,
    scratch: &mut Scratch,
) -> Result<Spectrum> {
    let accuracy = accuracy.for_shape(view.rows(), view.cols());
    if accuracy == Accuracy::Sampled {
        return Ok(sampled_spectrum(view, strategy, cancel)?.spectrum);
    }
    let p = view.rows().min(view.cols());
    let largest = view.max_abs_until(cancel)?;
    if largest == 0.0 {
        return Spectrum::new(zeros(p, "eigenvalues")?);
    }
    probe(VECTORS * p * size_of::<f64>(), "eigenvalues")?;
    let exponent = scaling_exponent(largest)?;
    let scale = power_of_two(-exponent);
    let is_fast = accuracy == Accuracy::Fast;
    let mut eigenvalues = if is_fast {
        gram_eigenvalues::<f32>(view, scale, strategy, cancel, scratch)?
    } else {
        gram_eigenvalues::<f64>(view, scale, strategy, cancel, scratch)?
    };
    let error = if is_fast {
        // The trace reveals rounding errors that do not average out, as in sums of equal numbers.
        let (trace, expected) = (eigenvalues.iter().sum::<f64>(), view.sum_of_squares(scale));
        let largest = eigenvalues.last().copied().unwrap_or(0.0);
        error_bound::<f32>(view, &eigenvalues) + (trace / expected - 1.0).abs() * largest
    } else {
        error_bound::<f64>(view, &eigenvalues)
    };
    let unit = power_of_two(2 * exponent);
    for value in &mut eigenvalues {
        // W^T W has no negative eigenvalues, but rounding may make some slightly negative.
        *value = value.max(0.0) * unit;
    }
    let spectrum = Spectrum::checked(eigenvalues, cancel)?.with_error(error * unit);
    Ok(if is_fast { spectrum.with_unresolved() } else { spectrum })
}

/// Computes the eigenvalues of `scale^2 W^T W`, ascending, with the Gram matrix and its reduction in type
/// `T`.
fn gram_eigenvalues<T: Number>(
    view: &MatrixView<'_>,
    scale: f64,
    strategy: Strategy,
    cancel: &CancelToken,
    scratch: &mut Scratch,
) -> Result<Vec<f64>> {
    let (rows, cols) = (view.rows(), view.cols());
    let (p, stride) = (rows.min(cols), spaced::<T>(rows.min(cols)));
    let request = gram_scratch(rows, cols).or(tridiagonalize_scratch::<T>(p));
    let (numbers, stack) = scratch.numbers::<T>(p * stride + panel_size::<T>(rows, cols), request)?;
    let (matrix, panel) = numbers.split_at_mut(p * stride);
    let mut a = MatMut::from_column_major_slice_with_stride_mut(matrix, p, p, stride);
    gram(view, scale, strategy, cancel, a.rb_mut(), panel, stack)?;
    cancel.check()?;
    let tridiagonal = tridiagonalize(a, strategy, cancel, stack);
    cancel.check()?;
    tridiagonal_eigenvalues(&tridiagonal, cancel)
}

/// Returns a bound on the error of every eigenvalue. Rounding errors grow like a random walk: over the `m`
/// columns of a sum of the Gram matrix, and over the reflections of its reduction. Measured errors are at
/// least five times smaller.
fn error_bound<T: Number>(view: &MatrixView<'_>, eigenvalues: &[f64]) -> f64 {
    let (p, m) = (view.rows().min(view.cols()) as f64, view.rows().max(view.cols()) as f64);
    let largest = eigenvalues.last().copied().unwrap_or(0.0);
    (4.0 + p.sqrt() / 4.0 + m.sqrt() / 16.0) * T::EPSILON * largest
}

/// Returns the exponent by which a matrix with largest entry `x` is scaled down. It is 0 if float32
/// arithmetic has sufficient range, so that entries can be used in place.
fn scaling_exponent(x: f64) -> Result<i32> {
    const LARGEST_UNSCALED: i32 = 12;
    binary_exponent(x).map(|exponent| if exponent.abs() <= LARGEST_UNSCALED { 0 } else { exponent })
}
