//! Low-rank updates and differences of weights, decomposed, results handed over as they come.

use lorank::difference_svd::{Difference, Pair, subtract_all};
use lorank::product_svd::{Decomposition, Term, Values, decompose_all};
use numpy::{IntoPyArray, PyArrayMethods};
use pyo3::prelude::*;

use crate::detached::{detached, hand_over};
use crate::matrix::Matrix;

/// A term as Python hands it over: `B`, `A` and the weight of their product.
type PyTerm<'py> = (Bound<'py, Matrix>, Bound<'py, Matrix>, f64);

/// Decomposes sums of products and calls `on_result(index, outcome)` for each as it finishes, on the
/// calling thread. The outcome is `(columns of B, singular values, rows of A)`, or the exception that
/// the update met.
#[pyfunction]
pub fn decompose<'py>(
    py: Python<'py>,
    updates: Vec<Vec<PyTerm<'py>>>,
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
        |py, (index, result): (usize, lorank::Result<Decomposition>)| {
            hand_over(py, on_result, index, result, |found| factors(py, found))
        },
    )
}

/// Decomposes differences `tuned - base` up to a rank and calls `on_result(index, outcome)` for each
/// as it finishes. The outcome is `((columns of B, singular values, rows of A), energy)`, or the
/// exception that the pair met.
#[pyfunction]
pub fn subtract<'py>(
    py: Python<'py>,
    pairs: Vec<(Bound<'py, Matrix>, Bound<'py, Matrix>)>,
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
            hand_over(py, on_result, index, result, |found| {
                Ok((factors(py, found.leading)?, found.energy).into_pyobject(py)?.into_any())
            })
        },
    )
}

fn factors(py: Python<'_>, found: Decomposition) -> PyResult<Bound<'_, PyAny>> {
    let k = found.singular_values.len();
    let b = values(py, found.b_columns, k)?;
    let a = values(py, found.a_rows, k)?;
    Ok((b, found.singular_values.into_pyarray(py), a).into_pyobject(py)?.into_any())
}

/// A `(k, length)` array.
fn values(py: Python<'_>, values: Values, k: usize) -> PyResult<Bound<'_, PyAny>> {
    let shape = |len: usize| [k, len.checked_div(k).unwrap_or(0)];
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
