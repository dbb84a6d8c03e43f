//! Weights with low-rank updates, and their comparison with stored weights.

use lorank::low_rank::Term;
use lorank::replay::{Comparison, Replayed, compare_all};
use lorank::updated::{Addend, Magnitude};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::detached::{detached, hand_over};
use crate::errors::to_py;
use crate::list::List;
use crate::matrix::Matrix;

/// A weight with its update, which is computed in blocks of rows when it is written or compared.
#[pyclass(frozen, module = "lorank._core")]
pub struct UpdatedMatrix(pub lorank::updated::UpdatedMatrix);

#[pymethods]
impl UpdatedMatrix {
    /// Combines a weight and its terms `(B, A, weight, is_transposed)`. `magnitude` gives norms to all rows, or to
    /// all columns if its flag is true.
    #[new]
    #[pyo3(signature = (base, terms, magnitude=None))]
    fn new(
        base: &Bound<'_, Matrix>,
        terms: List<(Bound<'_, Matrix>, Bound<'_, Matrix>, f64, bool)>,
        magnitude: Option<(List<f64>, bool)>,
    ) -> PyResult<Self> {
        let addend = |(b, a, weight, is_transposed): (Bound<'_, Matrix>, Bound<'_, Matrix>, f64, bool)| {
            let term = Term { b: b.get().0.clone(), a: a.get().0.clone(), weight };
            Addend { term, is_transposed }
        };
        let magnitude =
            magnitude.map(|(values, is_of_columns)| Magnitude { values: values.0, is_of_columns });
        let addends = terms.into_iter().map(addend).collect();
        lorank::updated::UpdatedMatrix::new(base.get().0.clone(), addends, magnitude).map(Self).map_err(to_py)
    }
}

/// Compares weights with their expected values and calls `on_result(index, outcome)` as soon as one is finished.
/// The outcome is a dictionary of the fields of `Comparison`, or an exception.
#[pyfunction]
pub fn compare<'py>(
    py: Python<'py>,
    pairs: List<(Bound<'py, UpdatedMatrix>, Bound<'py, Matrix>)>,
    threads: usize,
    on_result: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let replayed = |(expected, found): &(Bound<'py, UpdatedMatrix>, Bound<'py, Matrix>)| Replayed {
        expected: expected.get().0.clone(),
        found: found.get().0.clone(),
    };
    let held: Vec<Replayed> = pairs.iter().map(replayed).collect();
    drop(pairs);
    detached(
        py,
        move |cancel, outbox| {
            compare_all(&held, threads, cancel, &|index, result| outbox.send((index, result)))
        },
        |py, (index, result): (usize, lorank::Result<Comparison>)| {
            hand_over(py, on_result, index, result, |found| fields(py, &found).map(Bound::into_any))
        },
    )
}

fn fields<'py>(py: Python<'py>, found: &Comparison) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    fields.set_item("elements", found.elements)?;
    fields.set_item("update", found.update)?;
    fields.set_item("rounded_update", found.rounded_update)?;
    fields.set_item("change", found.change)?;
    fields.set_item("overlap", found.overlap)?;
    fields.set_item("rounded_error", found.rounded_error)?;
    fields.set_item("error", found.error)?;
    fields.set_item("rounding", found.rounding)?;
    fields.set_item("exact", found.exact)?;
    fields.set_item("unchanged", found.unchanged)?;
    fields.set_item("largest_error", found.largest_error)?;
    Ok(fields)
}
