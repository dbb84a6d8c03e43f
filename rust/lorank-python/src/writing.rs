//! Writing of safetensors files from arrays and from tensors of other files.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lorank::checkpoint::StoredTensor;
use lorank::dtype::DType;
use lorank::safetensors_writer::{Content, OutTensor, Seal, write, write_sealed};
use lorank::source::{StoredMatrix, Streamed};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use crate::detached::detached_quiet;
use crate::errors::to_py;
use crate::list::List;
use crate::matrix::{Checkpoint, Matrix};
use crate::updated::UpdatedMatrix;

/// The source of a tensor's values, as passed by Python.
#[derive(FromPyObject)]
pub enum PyContent<'py> {
    /// A matrix, written with the given element type.
    Matrix(Bound<'py, Matrix>),
    /// A checkpoint, and the position of a tensor in it.
    Stored(Bound<'py, Checkpoint>, usize),
    /// Weights with their updates, one after the other, written with the given element type.
    Updated(Vec<Bound<'py, UpdatedMatrix>>),
    /// Bytes of the given element type.
    Raw(PyBackedBytes),
}

/// The source of a tensor's values, independent of Python.
enum Held {
    Values(StoredMatrix, DType),
    Updated(Vec<Arc<dyn Streamed>>, DType),
    Stored(StoredTensor),
    Raw(PyBackedBytes, String),
}

/// Writes a safetensors file atomically. Tensors are `(name, shape, content, element type as in the header)`.
/// With a seal, `(key, seed)`, the metadata state a digest of the tensors and the seed under that key, and the
/// digest is returned.
#[pyfunction]
#[pyo3(signature = (path, tensors, metadata, threads, seal=None))]
pub fn write_safetensors(
    py: Python<'_>,
    path: PathBuf,
    tensors: List<(String, List<usize>, PyContent<'_>, String)>,
    metadata: BTreeMap<String, String>,
    threads: usize,
    seal: Option<(String, Vec<u8>)>,
) -> PyResult<Option<String>> {
    let held: Vec<(String, Vec<usize>, Held)> = tensors
        .into_iter()
        .map(|(name, shape, content, dtype)| Ok((name, shape.0, hold(content, dtype)?)))
        .collect::<PyResult<_>>()?;
    detached_quiet(py, move |cancel| {
        let out: Vec<OutTensor<'_>> = held
            .iter()
            .map(|(name, shape, values)| OutTensor {
                name: name.clone(),
                shape: shape.clone(),
                content: match values {
                    Held::Values(matrix, dtype) => Content::Values { matrix, dtype: *dtype },
                    Held::Updated(matrices, dtype) => Content::Streamed { matrices, dtype: *dtype },
                    Held::Stored(tensor) => Content::Stored(tensor),
                    Held::Raw(bytes, dtype) => Content::Raw { bytes, dtype: dtype.clone() },
                },
            })
            .collect();
        match &seal {
            Some((key, seed)) => {
                write_sealed(&path, &out, &metadata, Seal { key, seed }, threads, cancel).map(Some)
            }
            None => write(&path, &out, &metadata, threads, cancel).map(|()| None),
        }
    })
}

/// Exchanges the names of two files or folders in one step.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 passes paths by value.
pub fn exchange(a: PathBuf, b: PathBuf) -> PyResult<()> {
    lorank::exchange::exchange(&a, &b).map_err(to_py)
}

fn hold(content: PyContent<'_>, dtype: String) -> PyResult<Held> {
    Ok(match content {
        PyContent::Matrix(matrix) => Held::Values(matrix.get().0.clone(), parsed(&dtype)?),
        PyContent::Updated(parts) => {
            let matrices = parts.iter().map(|part| Arc::new(part.get().0.clone()) as Arc<dyn Streamed>);
            Held::Updated(matrices.collect(), parsed(&dtype)?)
        }
        PyContent::Stored(checkpoint, position) => Held::Stored(checkpoint.get().tensor(position)?.clone()),
        PyContent::Raw(bytes) => Held::Raw(bytes, dtype),
    })
}

fn parsed(dtype: &str) -> PyResult<DType> {
    DType::from_safetensors(dtype)
        .ok_or_else(|| PyValueError::new_err(format!("cannot write values as {dtype}")))
}
