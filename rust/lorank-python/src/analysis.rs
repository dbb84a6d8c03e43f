//! The analysis of many matrices, results handed over as they come.

use lorank::analysis::{Analysis, analyze as analyze_matrices};
use lorank::eigen::Accuracy;
use lorank::source::StoredMatrix;
use numpy::IntoPyArray;
use pyo3::prelude::*;

use crate::detached::{detached, hand_over};
use crate::matrix::Matrix;
use crate::statistics::{accuracy, metrics_dict};

/// Analyses matrices and calls `on_result(index, outcome)` for each as it finishes, on the calling
/// thread. The outcome is `(accuracy, metrics, eigenvalues or None)`, where the accuracy is the one that it
/// took, or the exception that the matrix met.
#[pyfunction]
pub fn analyze<'py>(
    py: Python<'py>,
    matrices: Vec<Bound<'py, Matrix>>,
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
                };
                Ok((accuracy, metrics, eigenvalues).into_pyobject(py)?.into_any())
            })
        },
    )
}
