//! Masks over the singular values of many modules.

use lorank::cancel::CancelToken;
use lorank::select;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use crate::array_memory::SharedValues;
use crate::detached::detached_quiet;
use crate::list::List;

type Values<'py> = Bound<'py, PyArray1<f64>>;
type Mask<'py> = PyResult<Bound<'py, PyArray1<bool>>>;

/// Keeps the `count` largest scores, or all non-zero ones.
#[pyfunction]
pub fn select_largest<'py>(py: Python<'py>, scores: &Values<'py>, count: usize) -> Mask<'py> {
    masked(py, scores, move |scores, cancel| select::largest_until(scores, count, cancel))
}

/// Keeps the `count` smallest non-zero scores.
#[pyfunction]
pub fn select_smallest<'py>(py: Python<'py>, scores: &Values<'py>, count: usize) -> Mask<'py> {
    masked(py, scores, move |scores, cancel| select::smallest_until(scores, count, cancel))
}

/// Keeps the fewest values whose squares sum to a fraction of the total.
#[pyfunction]
pub fn select_energy<'py>(py: Python<'py>, values: &Values<'py>, fraction: f64) -> Mask<'py> {
    masked(py, values, move |values, cancel| select::energy_until(values, fraction, cancel))
}

/// Keeps values with the most energy within a number of parameters.
#[pyfunction]
pub fn select_budget<'py>(
    py: Python<'py>,
    values: &Values<'py>,
    lengths: List<usize>,
    costs: List<u64>,
    parameters: u64,
) -> Mask<'py> {
    masked(py, values, move |values, cancel| {
        select::budget_until(values, &lengths, &costs, parameters, cancel)
    })
}

fn masked<'py>(
    py: Python<'py>,
    values: &Values<'py>,
    choose: impl FnOnce(&[f64], &CancelToken) -> lorank::Result<Vec<bool>> + Send + 'static,
) -> Mask<'py> {
    let shared = SharedValues::of(values)?;
    Ok(detached_quiet(py, move |cancel| choose(shared.as_ref(), cancel))?.into_pyarray(py))
}
