//! Analysis of many matrices, with a callback for every result.

use lorank::analysis::{Analysis, analyze as analyze_matrices, sampled};
use lorank::eigen::Accuracy;
use lorank::parallel::Strategy;
use lorank::source::{Buffer, StoredMatrix};
use numpy::IntoPyArray;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::detached::{detached, detached_quiet, hand_over};
use crate::list::List;
use crate::matrix::Matrix;
use crate::statistics::{accuracy, metrics_dict};

/// Analyses matrices and calls `on_result(index, outcome)` on the calling thread as soon as one is finished.
/// The outcome is `(accuracy, metrics, eigenvalues or None)` with the accuracy that was used, or an
/// exception.
#[pyfunction]
pub fn analyze<'py>(
    py: Python<'py>,
    matrices: List<Bound<'py, Matrix>>,
    accuracy: &str,
    threads: usize,
    keep_eigenvalues: bool,
    on_result: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let accuracy = self::accuracy(accuracy)?;
    let stored: Vec<StoredMatrix> = matrices.iter().map(|m| m.get().0.clone()).collect();
    drop(matrices);
    detached(
        py,
        move |cancel, outbox| {
            analyze_matrices(&stored, accuracy, threads, cancel, &|index, result| {
                outbox.send((index, result));
            })
        },
        |py, (index, result): (usize, lorank::Result<Analysis>)| {
            hand_over(py, on_result, index, result, |analysis| {
                let metrics = metrics_dict(py, &analysis.metrics)?;
                let eigenvalues =
                    keep_eigenvalues.then(|| analysis.spectrum.into_eigenvalues().into_pyarray(py));
                let accuracy = match analysis.accuracy {
                    Accuracy::Exact => "exact",
                    Accuracy::Fast => "fast",
                    Accuracy::Sampled => "sampled",
                };
                Ok((accuracy, metrics, eigenvalues).into_pyobject(py)?.into_any())
            })
        },
    )
}

/// Estimates the metrics of a matrix of any size.
#[pyfunction]
pub fn sample<'py>(py: Python<'py>, matrix: &Bound<'py, Matrix>) -> PyResult<Bound<'py, PyDict>> {
    let matrix = matrix.get().0.clone();
    let found = detached_quiet(py, move |cancel| {
        matrix.with_view(&mut Buffer::default(), cancel, |view| sampled(view, Strategy::Alone, cancel))
    })?;
    metrics_dict(py, &found.metrics)
}
