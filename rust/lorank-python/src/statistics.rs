//! Spectra and their statistics.

use lorank::Error;
use lorank::cancel::CancelToken;
use lorank::effective_rank;
use lorank::eigen::Accuracy;
use lorank::hill::{self, Convention};
use lorank::marchenko_pastur::{self as mp, Scale};
use lorank::metrics::SpectralMetrics;
use lorank::source::Buffer;
use lorank::spectrum::Spectrum;
use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::array_memory::{Float64s, SharedValues};
use crate::detached::{brief, detached_quiet};
use crate::errors::to_py;
use crate::matrix::Matrix;

type Values<'py> = Float64s<'py>;

/// Number of eigenvalues that are sorted and summed within a millisecond.
const BRIEF: usize = 1 << 14;

/// Number of eigenvalues whose power law is found within some milliseconds, in the worst case.
const BRIEF_FIT: usize = 1 << 10;

/// Runs work on a copy of eigenvalues: without the GIL if there are more than `brief_up_to`.
fn with_values<T: Send + 'static>(
    py: Python<'_>,
    eigenvalues: &Values<'_>,
    brief_up_to: usize,
    work: impl FnOnce(Vec<f64>, &CancelToken) -> lorank::Result<T> + Send + 'static,
) -> PyResult<T> {
    let array = &eigenvalues.0;
    if array.len() <= brief_up_to {
        let values = array.readonly().as_array().to_vec();
        return brief(|cancel| work(values, cancel));
    }
    let shared = SharedValues::of(array)?;
    detached_quiet(py, move |cancel| work(copied(shared.as_ref())?, cancel))
}

/// Runs work on a spectrum: see [`with_values`].
fn with_spectrum<T: Send + 'static>(
    py: Python<'_>,
    eigenvalues: &Values<'_>,
    brief_up_to: usize,
    work: impl FnOnce(&Spectrum, &CancelToken) -> lorank::Result<T> + Send + 'static,
) -> PyResult<T> {
    with_values(py, eigenvalues, brief_up_to, |values, cancel| {
        work(&Spectrum::checked(values, cancel)?, cancel)
    })
}

fn copied(values: &[f64]) -> lorank::Result<Vec<f64>> {
    let mut copy = Vec::new();
    let no_memory = |_| Error::OutOfMemory { what: "eigenvalues".into(), bytes: size_of_val(values) };
    copy.try_reserve_exact(values.len()).map_err(no_memory)?;
    copy.extend_from_slice(values);
    Ok(copy)
}

fn scale(name: &str) -> PyResult<Scale> {
    match name {
        "mean" => Ok(Scale::Mean),
        "median" => Ok(Scale::Median),
        _ => Err(PyValueError::new_err(format!("scale must be 'mean' or 'median', not {name:?}"))),
    }
}

/// Parses an accuracy.
pub fn accuracy(name: &str) -> PyResult<Accuracy> {
    match name {
        "exact" => Ok(Accuracy::Exact),
        "fast" => Ok(Accuracy::Fast),
        "sampled" => Ok(Accuracy::Sampled),
        _ => {
            Err(PyValueError::new_err(format!("accuracy must be 'exact', 'fast' or 'sampled', not {name:?}")))
        }
    }
}

/// Computes the eigenvalues of `W^T W`, ascending.
#[pyfunction]
pub fn spectrum<'py>(
    py: Python<'py>,
    matrix: &Bound<'py, Matrix>,
    accuracy: &str,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let matrix = matrix.get().0.clone();
    let accuracy = self::accuracy(accuracy)?;
    let spectrum = detached_quiet(py, move |cancel| {
        matrix.with_view(&mut Buffer::default(), cancel, |view| {
            lorank::eigen::spectrum(view, accuracy, threads, cancel)
        })
    })?;
    Ok(spectrum.into_eigenvalues().into_pyarray(py))
}

/// Computes the Hill estimator.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 passes extracted arguments by value.
pub fn alpha_hill(py: Python<'_>, eigenvalues: Values<'_>, convention: &str) -> PyResult<f64> {
    let convention = match convention {
        "median" => Convention::Median,
        "xmin_mid" => Convention::XminMid,
        _ => {
            return Err(PyValueError::new_err(format!(
                "convention must be 'median' or 'xmin_mid', not {convention:?}"
            )));
        }
    };
    with_spectrum(py, &eigenvalues, BRIEF, move |spectrum, _| Ok(hill::alpha_hill(spectrum, convention)))
}

/// Computes the number of eigenvalues that hold a share of their sum.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 passes extracted arguments by value.
pub fn energy_rank(py: Python<'_>, eigenvalues: Values<'_>, energy: f64) -> PyResult<usize> {
    with_values(py, &eigenvalues, BRIEF, move |values, cancel| {
        effective_rank::energy_rank(values, energy, cancel)
    })
}

/// Computes the Marchenko-Pastur edge and the number of eigenvalues above it.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 passes extracted arguments by value.
pub fn marchenko_pastur(
    py: Python<'_>,
    eigenvalues: Values<'_>,
    shape: (usize, usize),
    scale: &str,
) -> PyResult<(f64, usize)> {
    let scale = self::scale(scale)?;
    let found = with_spectrum(py, &eigenvalues, BRIEF, move |spectrum, _| {
        mp::marchenko_pastur(spectrum, shape, scale)
    })?;
    Ok((found.edge, found.spikes))
}

/// Computes the median of the Marchenko-Pastur law of mean 1 and ratio `1/Q`.
#[pyfunction]
pub fn marchenko_pastur_median(ratio: f64) -> PyResult<f64> {
    if ratio > 0.0 && ratio <= 1.0 {
        Ok(mp::unit_median(ratio))
    } else {
        Err(PyValueError::new_err(format!("the ratio 1/Q must be in (0, 1], not {ratio}")))
    }
}

/// Computes all metrics of a spectrum, by name.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 passes extracted arguments by value.
pub fn spectral_metrics<'py>(
    py: Python<'py>,
    eigenvalues: Values<'py>,
    shape: (usize, usize),
) -> PyResult<Bound<'py, PyDict>> {
    let metrics = with_spectrum(py, &eigenvalues, BRIEF_FIT, move |spectrum, cancel| {
        SpectralMetrics::until(spectrum, shape, cancel)
    })?;
    metrics_dict(py, &metrics)
}

/// Returns metrics as a dict with the names of their fields.
pub fn metrics_dict<'py>(py: Python<'py>, metrics: &SpectralMetrics) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("num_nonzero", metrics.num_nonzero)?;
    dict.set_item("eigenvalue_error", metrics.eigenvalue_error)?;
    dict.set_item("num_unresolved", metrics.num_unresolved)?;
    dict.set_item("alpha_hill", metrics.alpha_hill)?;
    dict.set_item("alpha_hill_error", metrics.alpha_hill_error)?;
    dict.set_item("alpha_hill_xmin_mid", metrics.alpha_hill_xmin_mid)?;
    dict.set_item("mp_edge", metrics.mp_edge)?;
    dict.set_item("mp_spikes", metrics.mp_spikes)?;
    dict.set_item("mp_spikes_error", metrics.mp_spikes_error)?;
    dict.set_item("mp_edge_median", metrics.mp_edge_median)?;
    dict.set_item("mp_spikes_median", metrics.mp_spikes_median)?;
    dict.set_item("mp_soft_rank", metrics.mp_soft_rank)?;
    dict.set_item("powerlaw_alpha", metrics.powerlaw_alpha)?;
    dict.set_item("powerlaw_xmin", metrics.powerlaw_xmin)?;
    dict.set_item("powerlaw_distance", metrics.powerlaw_distance)?;
    dict.set_item("alpha_weighted", metrics.alpha_weighted)?;
    dict.set_item("frobenius_norm", metrics.frobenius_norm)?;
    dict.set_item("spectral_norm", metrics.spectral_norm)?;
    dict.set_item("stable_rank", metrics.stable_rank)?;
    dict.set_item("effective_rank", metrics.effective_rank)?;
    dict.set_item("participation_ratio", metrics.participation_ratio)?;
    Ok(dict)
}

/// Checks that there is memory for a thread of Python, which never ends its start if memory ends meanwhile.
#[pyfunction]
pub fn check_thread_memory() -> PyResult<()> {
    /// Stacks of the core's threads that take as much memory as a thread of Python.
    const STACKS: usize = 4;
    lorank::parallel::check_stacks(STACKS).map_err(to_py)
}

/// Returns the number of processors available to this process.
#[pyfunction]
pub fn available_threads() -> usize {
    lorank::parallel::available_threads()
}
