//! Decomposition of low-rank updates and differences of weights, with a callback for every result.

use std::sync::Arc;

use lorank::difference_svd::{Difference, Pair, subtract_all};
use lorank::low_rank::{Term, Values};
use lorank::product_svd::{Decomposition as Decomposed, decompose_all};
use lorank::truncation::{Factors, Truncation, rebuild_all};
use numpy::{IntoPyArray, PyArray1, PyArrayMethods};
use pyo3::prelude::*;

use crate::detached::{detached, hand_over};
use crate::list::List;
use crate::matrix::{Matrix, copied};

/// A term as passed by Python: `B`, `A` and the weight of their product.
type PyTerm<'py> = (Bound<'py, Matrix>, Bound<'py, Matrix>, f64);

/// The singular values of an update, and the data to compute the factors of any selection of them.
#[pyclass(frozen, module = "lorank._core")]
pub struct Decomposition(Arc<Decomposed>);

#[pymethods]
impl Decomposition {
    /// Singular values, descending, float64. Values that are zero up to rounding are 0.
    #[getter]
    fn singular_values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        Ok(copied(self.0.singular_values.iter().copied())?.into_pyarray(py))
    }
}

/// Decomposes sums of products and calls `on_result(index, outcome)` on the calling thread as soon as one is
/// finished. The outcome is a `Decomposition` or an exception.
#[pyfunction]
pub fn decompose<'py>(
    py: Python<'py>,
    updates: List<List<PyTerm<'py>>>,
    threads: usize,
    on_result: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let term =
        |(b, a, weight): &PyTerm<'py>| Term { b: b.get().0.clone(), a: a.get().0.clone(), weight: *weight };
    let terms: Vec<Vec<Term>> = updates.iter().map(|update| update.iter().map(term).collect()).collect();
    drop(updates);
    detached(
        py,
        move |cancel, outbox| {
            decompose_all(&terms, threads, cancel, &|index, result| outbox.send((index, result)))
        },
        |py, (index, result): (usize, lorank::Result<Decomposed>)| {
            hand_over(py, on_result, index, result, |found| {
                Ok(Bound::new(py, Decomposition(Arc::new(found)))?.into_any())
            })
        },
    )
}

/// Truncates decompositions and calls `on_result(index, outcome)` as soon as one is finished. The outcome is
/// `(B, A)` or an exception. Factors of terms in files are computed whenever they are read, those of arrays
/// at once.
#[pyfunction]
pub fn rebuild<'py>(
    py: Python<'py>,
    choices: List<(Bound<'py, Decomposition>, List<bool>)>,
    threads: usize,
    on_result: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let truncation = |(of, keep): &(Bound<'py, Decomposition>, List<bool>)| Truncation {
        decomposition: Arc::clone(&of.get().0),
        keep: keep.to_vec(),
    };
    let truncations: Vec<Truncation> = choices.iter().map(truncation).collect();
    drop(choices);
    detached(
        py,
        move |cancel, outbox| {
            rebuild_all(&truncations, threads, cancel, &|index, result| outbox.send((index, result)))
        },
        |py, (index, result): (usize, lorank::Result<Factors>)| {
            hand_over(py, on_result, index, result, |factors| {
                Ok((Matrix(factors.b), Matrix(factors.a)).into_pyobject(py)?.into_any())
            })
        },
    )
}

/// Decomposes differences `tuned - base` up to a rank and calls `on_result(index, outcome)` as soon as one is
/// finished. The outcome is `((columns of B, singular values, rows of A), energy, next)`, where `next` is the
/// first singular value beyond the rank, or an exception.
#[pyfunction]
pub fn subtract<'py>(
    py: Python<'py>,
    pairs: List<(Bound<'py, Matrix>, Bound<'py, Matrix>)>,
    max_rank: usize,
    threads: usize,
    on_result: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let pair = |(tuned, base): &(Bound<'py, Matrix>, Bound<'py, Matrix>)| Pair {
        tuned: tuned.get().0.clone(),
        base: base.get().0.clone(),
    };
    let stored: Vec<Pair> = pairs.iter().map(pair).collect();
    drop(pairs);
    detached(
        py,
        move |cancel, outbox| {
            subtract_all(&stored, max_rank, threads, cancel, &|index, result| outbox.send((index, result)))
        },
        |py, (index, result): (usize, lorank::Result<Difference>)| {
            hand_over(py, on_result, index, result, |Difference { leading, energy, next }| {
                let k = Some(leading.singular_values.len());
                let (b, a) = (rows(py, leading.b_columns, k, 0)?, rows(py, leading.a_rows, k, 0)?);
                let values = leading.singular_values.into_pyarray(py);
                Ok(((b, values, a), energy, next).into_pyobject(py)?.into_any())
            })
        },
    )
}

/// Returns a 2-D array with the given number of rows, or with `cols` columns if `rows` is `None`.
fn rows(py: Python<'_>, values: Values, rows: Option<usize>, cols: usize) -> PyResult<Bound<'_, PyAny>> {
    let shape = |len: usize| match rows {
        Some(rows) => [rows, len.checked_div(rows).unwrap_or(0)],
        None => [len.checked_div(cols).unwrap_or(0), cols],
    };
    Ok(match values {
        Values::F32(x) => {
            let shape = shape(x.len());
            x.into_pyarray(py).reshape(shape)?.into_any()
        }
        Values::F64(x) => {
            let shape = shape(x.len());
            x.into_pyarray(py).reshape(shape)?.into_any()
        }
    })
}
