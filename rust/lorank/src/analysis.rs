//! Analysis of many matrices in parallel and in bounded memory.

use crate::Result;
use crate::eigen::sampled::sampled_spectrum;
use crate::eigen::{Accuracy, spectrum_in_pool};
use crate::exec::cancel::CancelToken;
use crate::exec::panics::guarded;
use crate::exec::parallel::{Strategy, pieces_of, pool_for, side_by_side};
use crate::exec::scratch::Scratch;
use crate::matrix::MatrixView;
use crate::statistics::hill::{Convention, alpha_hill, alpha_hill_spread};
use crate::statistics::marchenko_pastur::{Scale, marchenko_pastur};
use crate::statistics::metrics::SpectralMetrics;
use crate::statistics::spectrum::Spectrum;
use crate::storage::source::{Buffer, StoredMatrix};

/// The result of the analysis of one matrix.
#[derive(Clone, Debug)]
pub struct Analysis {
    /// Metrics of the spectrum.
    pub metrics: SpectralMetrics,
    /// The eigenvalues of `W^T W`.
    pub spectrum: Spectrum,
    /// The arithmetic that computed the spectrum.
    pub accuracy: Accuracy,
}

/// Largest spread of the exponent, and largest error of the number of spikes, that float32 may leave. A
/// matrix with wider error bounds is analysed again in float64.
const ALPHA_TOLERANCE: f64 = 1e-3;
const SPIKES_TOLERANCE: usize = 1;
/// Reciprocal of the largest share of eigenvalues that float32 may leave indistinguishable from zero. Square
/// weights of full rank have a few such eigenvalues.
const UNRESOLVED: usize = 32;

/// Memory that a worker reuses for every matrix.
#[derive(Default)]
struct Workspace {
    /// Values of a matrix that is not in memory.
    buffer: Buffer,
    /// Temporaries of the decomposition.
    scratch: Scratch,
}

/// Analyses every matrix with up to `threads` threads. Calls `emit` with the index of a matrix and its result
/// as soon as the matrix is finished; several threads call `emit`.
///
/// Large matrices come first, one at a time with all threads. The others follow, costliest first, each on one
/// thread. If there are fewer of them than threads, all threads share each matrix that is large enough to
/// benefit. At most `threads` matrices are in memory at any time. A matrix that fails does not stop the
/// others. The results do not depend on `threads`.
///
/// Under [`Accuracy::Fast`] a matrix is analysed again in float64 in three cases: the error bounds of float32
/// exceed 1e-3 for the exponent or 1 for the number of spikes, or too many eigenvalues are indistinguishable
/// from zero. Under [`Accuracy::Sampled`] the spectra of large matrices are estimated; the other matrices are
/// analysed as under [`Accuracy::Fast`].
///
/// # Errors
/// [`Cancelled`](crate::Error::Cancelled), and [`NoThreads`](crate::Error::NoThreads). `emit` receives the
/// errors of single matrices.
///
/// # Examples
/// ```
/// use std::sync::{Arc, Mutex};
///
/// use lorank::{analysis::analyze, cancel::CancelToken, dtype::DType, eigen::Accuracy, source::StoredMatrix};
///
/// let values: Vec<u8> = (1..=12u8).flat_map(|x| f32::from(x).to_le_bytes()).collect();
/// let matrix = StoredMatrix::in_memory(Arc::new(values), DType::F32, (3, 4), (4, 1)).unwrap();
/// let ranks = Mutex::new(Vec::new());
/// analyze(&[matrix], Accuracy::Exact, 2, &CancelToken::default(), &|index, result| {
///     ranks.lock().unwrap().push((index, result.unwrap().metrics.num_nonzero));
/// })
/// .unwrap();
/// assert_eq!(*ranks.lock().unwrap(), [(0, 2)]); // rows 1..4, 5..8, 9..12: rank 2
/// ```
pub fn analyze(
    matrices: &[StoredMatrix],
    accuracy: Accuracy,
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Analysis>) + Sync),
) -> Result<()> {
    let (mut together, mut alone): (Vec<usize>, Vec<usize>) =
        (0..matrices.len()).partition(|&i| strategy(&matrices[i]) == Strategy::Together);
    if alone.len() < threads {
        // Otherwise some threads would be idle.
        together.extend(alone.extract_if(.., |i| single_strategy(&matrices[*i]) == Strategy::Together));
    }
    let costliest_first = |i: &usize| std::cmp::Reverse(cost(&matrices[*i]));
    together.sort_by_key(costliest_first);
    alone.sort_by_key(costliest_first);

    let analyze_one = |i: usize, strategy, workspace: &mut Workspace| {
        emit(i, guarded(|| analyze_matrix(&matrices[i], accuracy, strategy, cancel, workspace)));
    };
    let pieces = together.iter().map(|&i| pieces_of(matrices[i].shape().0, matrices[i].shape().1));
    let pieces = pieces.max().unwrap_or(0).max(alone.len());
    pool_for(threads, pieces)?.install(|| {
        let mut workspace = Workspace::default();
        for &i in &together {
            cancel.check()?;
            analyze_one(i, Strategy::Together, &mut workspace);
        }
        drop(workspace);
        side_by_side(&alone, threads, cancel, &|i, workspace| analyze_one(i, Strategy::Alone, workspace));
        cancel.check()
    })
}

fn strategy(matrix: &StoredMatrix) -> Strategy {
    let (rows, cols) = matrix.shape();
    Strategy::for_shape(rows, cols)
}

fn single_strategy(matrix: &StoredMatrix) -> Strategy {
    let (rows, cols) = matrix.shape();
    Strategy::for_single(rows, cols)
}

/// Returns the number of multiplications of the Gram matrix and its reduction, up to a constant.
fn cost(matrix: &StoredMatrix) -> u128 {
    let (rows, cols) = matrix.shape();
    let (p, q) = (rows.min(cols) as u128, rows.max(cols) as u128);
    p * p * (q + 4 * p)
}

fn analyze_matrix(
    matrix: &StoredMatrix,
    accuracy: Accuracy,
    strategy: Strategy,
    cancel: &CancelToken,
    workspace: &mut Workspace,
) -> Result<Analysis> {
    let Workspace { buffer, scratch } = workspace;
    let (rows, cols) = matrix.shape();
    let accuracy = accuracy.for_shape(rows, cols);
    matrix.with_view(buffer, cancel, |view| {
        if accuracy == Accuracy::Sampled {
            return sampled(view, strategy, cancel);
        }
        let mut with = |accuracy| {
            let spectrum = spectrum_in_pool(view, accuracy, strategy, cancel, scratch)?;
            Ok(Analysis {
                metrics: SpectralMetrics::until(&spectrum, (rows, cols), cancel)?,
                spectrum,
                accuracy,
            })
        };
        let found = with(accuracy)?;
        if accuracy == Accuracy::Exact || suffices(&found) { Ok(found) } else { with(Accuracy::Exact) }
    })
}

/// Analyses a matrix of any size by an estimate of its spectrum. The metrics contain the error of the
/// estimate.
///
/// # Errors
/// The errors of [`sampled_spectrum`], and [`InvalidInput`](crate::Error::InvalidInput) for a matrix without
/// elements.
pub fn sampled(view: &MatrixView<'_>, strategy: Strategy, cancel: &CancelToken) -> Result<Analysis> {
    let shape = (view.rows(), view.cols());
    let sample = sampled_spectrum(view, strategy, cancel)?;
    let spectrum = sample.spectrum.clone();
    let mut metrics = SpectralMetrics::until(&spectrum, shape, cancel)?;
    // The error of a single eigenvalue is unknown.
    metrics.eigenvalue_error = f64::NAN;
    metrics.alpha_hill_error += sample.error(|spectrum| alpha_hill(spectrum, Convention::Median));
    let spikes = |spectrum: &Spectrum| {
        marchenko_pastur(spectrum, shape, Scale::Mean).map_or(f64::NAN, |found| found.spikes as f64)
    };
    let off = sample.error(spikes).min(spectrum.eigenvalues().len() as f64);
    // Rounded up.
    metrics.mp_spikes_error +=
        1 + (0..spectrum.eigenvalues().len()).take_while(|&n| (n as f64) < off).count();
    Ok(Analysis { metrics, spectrum, accuracy: Accuracy::Sampled })
}

/// Returns true if the errors of a fast analysis are small enough.
fn suffices(found: &Analysis) -> bool {
    let Analysis { metrics, spectrum, .. } = found;
    alpha_hill_spread(spectrum, Convention::Median) <= ALPHA_TOLERANCE
        && metrics.mp_spikes_error <= SPIKES_TOLERANCE
        && metrics.num_unresolved * UNRESOLVED <= spectrum.eigenvalues().len()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::Error;
    use crate::matrix::dtype::DType;

    /// Bytes whose second access panics.
    struct Vanishing(std::sync::atomic::AtomicBool);

    impl AsRef<[u8]> for Vanishing {
        fn as_ref(&self) -> &[u8] {
            assert!(!self.0.swap(true, Ordering::Relaxed), "the bytes are gone");
            &[0; 16]
        }
    }

    #[test]
    fn panic_is_the_error_of_its_matrix() {
        let bytes = Arc::new(Vanishing(false.into()));
        let bad = StoredMatrix::in_memory(bytes, DType::F64, (1, 2), (2, 1)).unwrap();
        let good = StoredMatrix::in_memory(Arc::new(vec![0x3f; 16]), DType::F64, (1, 2), (2, 1)).unwrap();
        let failures = std::sync::Mutex::new(Vec::new());
        analyze(&[bad, good], Accuracy::Exact, 2, &CancelToken::default(), &|i, result| {
            if let Err(error) = result {
                assert!(matches!(error, Error::Internal(_)));
                failures.lock().unwrap().push((i, error.to_string()));
            }
        })
        .unwrap();
        assert_eq!(failures.into_inner().unwrap(), [(0, "internal error: the bytes are gone".to_owned())]);
    }

    #[test]
    fn cost_depends_on_both_sides() {
        let matrix = |rows, cols| {
            let bytes = Arc::new(vec![0; rows * cols]);
            StoredMatrix::in_memory(bytes, DType::F8E4M3, (rows, cols), (cols, 1)).unwrap()
        };
        assert_eq!(cost(&matrix(3, 50)), cost(&matrix(50, 3)));
        assert!(cost(&matrix(20, 20)) > cost(&matrix(4, 100)), "the reduction counts, not just the elements");
        assert!(cost(&matrix(20, 30)) > cost(&matrix(20, 20)));
    }
}
