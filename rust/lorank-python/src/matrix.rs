//! The Python classes of matrices and checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use lorank::arranged::{Arrangement, arranged};
use lorank::cancel::CancelToken;
use lorank::checkpoint::StoredTensor;
use lorank::dtype::DType;
use lorank::quantized::{self, Request};
use lorank::safetensors::Reads;
use lorank::source::{Buffer, Computed, Parts, StoredMatrix};
use numpy::{IntoPyArray, PyArrayDescrMethods, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::array_memory::ArrayMemory;
use crate::detached::detached_quiet;
use crate::errors::to_py;
use crate::mapped::is_owned;

/// A matrix in memory or in a file.
#[pyclass(frozen, module = "lorank._core")]
pub struct Matrix(pub StoredMatrix);

/// Collects numbers of an array.
pub fn copied(values: impl ExactSizeIterator<Item = f64>) -> PyResult<Vec<f64>> {
    let mut found = Vec::new();
    found
        .try_reserve_exact(values.len())
        .map_err(|_| PyMemoryError::new_err("no memory for a copy of an array"))?;
    found.extend(values);
    Ok(found)
}

#[pymethods]
impl Matrix {
    /// Creates a view of a 2-D array without a copy. `dtype` names the element type of arrays whose own type
    /// is only a container (uint16 for bfloat16, uint8 for float8).
    #[staticmethod]
    #[pyo3(signature = (array, dtype=None))]
    fn from_array(array: &Bound<'_, PyUntypedArray>, dtype: Option<&str>) -> PyResult<Self> {
        let &[rows, cols] = array.shape() else {
            return Err(PyValueError::new_err(format!(
                "a matrix has 2 dimensions, but the array has shape {:?}",
                array.shape()
            )));
        };
        let dtype = element_type(array, dtype)?;
        let stride = |axis: usize, length: usize| -> PyResult<usize> {
            if length <= 1 {
                return Ok(1); // the stride is not used, and NumPy may store any value
            }
            let bytes = usize::try_from(array.strides()[axis]).ok();
            bytes.filter(|b| b % dtype.size() == 0).map(|b| b / dtype.size()).ok_or_else(|| {
                PyValueError::new_err(
                    "the strides are negative or fractional: pass numpy.ascontiguousarray(W)",
                )
            })
        };
        let strides = (stride(0, rows)?, stride(1, cols)?);
        let len = if rows == 0 || cols == 0 {
            0
        } else {
            // The products are distances in memory that the array has.
            ((rows - 1) * strides.0 + (cols - 1) * strides.1 + 1) * dtype.size()
        };
        // SAFETY: the range is that of the array's elements, by its own shape and strides.
        let memory = unsafe { ArrayMemory::new(array, 0, len)? };
        // Only memory that NumPy did not allocate may be mapped from a file.
        let create = if is_owned(array) { StoredMatrix::in_memory } else { StoredMatrix::in_foreign_memory };
        create(Arc::new(memory), dtype, (rows, cols), strides).map(Self).map_err(to_py)
    }

    /// Shape `(rows, cols)`.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        self.0.shape()
    }

    /// Element type: `float64`, `float32`, `float16`, `bfloat16`, `float8_e4m3fn` or `float8_e5m2`.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    /// Returns the values as a `NumPy` array: float64 for float64, float32 for all other types.
    fn to_array<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (stored, (rows, cols)) = (self.0.clone(), self.shape());
        let is_double = self.0.dtype() == DType::F64;
        let values = detached_quiet(py, move |cancel| {
            stored.with_view(&mut Buffer::default(), cancel, |view| {
                Ok(if is_double { Ok(view.to_f64(cancel)?) } else { Err(view.to_f32(cancel)?) })
            })
        })?;
        Ok(match values {
            Ok(double) => double.into_pyarray(py).reshape([rows, cols])?.into_any(),
            Err(single) => single.into_pyarray(py).reshape([rows, cols])?.into_any(),
        })
    }

    /// Returns the transposed matrix.
    fn transposed(&self) -> Self {
        Self(self.0.clone().transposed())
    }

    /// Returns a matrix of the rows of others, which are arranged whenever it is loaded: `stacked`,
    /// `interleaved`, or `heads`, in each of which the rows of the two halves alternate.
    #[staticmethod]
    #[pyo3(signature = (matrices, by, heads=1))]
    #[allow(clippy::needless_pass_by_value)] // PyO3 passes extracted arguments by value.
    fn arranged(matrices: Vec<PyRef<'_, Self>>, by: &str, heads: usize) -> PyResult<Self> {
        let by = match by {
            "stacked" => Arrangement::Stacked,
            "interleaved" => Arrangement::Interleaved,
            "heads" => Arrangement::Heads(heads),
            _ => return Err(PyValueError::new_err(format!("unknown arrangement {by:?}"))),
        };
        let parts = matrices.iter().map(|matrix| matrix.0.clone()).collect();
        arranged(parts, by).map(Self).map_err(to_py)
    }

    fn __repr__(&self) -> String {
        let (rows, cols) = self.shape();
        format!("Matrix({rows}x{cols}, {})", self.dtype())
    }
}

/// A matrix whose computation panics, to test the handling of defects.
struct Defective;

impl Computed for Defective {
    fn compute(&self, _: &mut [u8], _: &mut Parts, _: &CancelToken) -> lorank::Result<()> {
        panic!("a defect\nin two lines")
    }
}

/// Returns a float32 matrix whose computation panics, for tests.
#[pyfunction(name = "_panicking_matrix")]
pub fn panicking_matrix(rows: usize, cols: usize) -> Matrix {
    Matrix(StoredMatrix::computed(Arc::new(Defective), DType::F32, (rows, cols)))
}

fn element_type(array: &Bound<'_, PyUntypedArray>, name: Option<&str>) -> PyResult<DType> {
    let descr = array.dtype();
    let (kind, size) = (descr.kind(), descr.itemsize());
    let dtype = match (name, kind, size) {
        (Some(name), _, _) => DType::from_name(name),
        (None, b'f', 8) => Some(DType::F64),
        (None, b'f', 4) => Some(DType::F32),
        (None, b'f', 2) => Some(DType::F16),
        _ => None,
    };
    match dtype {
        Some(dtype) if dtype.size() == size && descr.is_native_byteorder() != Some(false) => Ok(dtype),
        _ => Err(PyTypeError::new_err(format!(
            "cannot read an array of dtype {descr}{}: pass float64, float32 or float16",
            name.map(|n| format!(" as {n}")).unwrap_or_default()
        ))),
    }
}

/// Returns the names of the block types of GGUF files that can be decoded.
#[pyfunction]
pub fn gguf_types() -> Vec<&'static str> {
    quantized::gguf::types().collect()
}

/// A tensor of a checkpoint: name, safetensors dtype, shape.
type TensorEntry = (String, String, Vec<usize>);

/// An opened safetensors file, index, or folder of shards.
#[pyclass(frozen, module = "lorank._core")]
pub struct Checkpoint(lorank::checkpoint::Checkpoint);

#[pymethods]
impl Checkpoint {
    /// Opens a checkpoint. `repeated` is true if tensors are read more than once, so that changes between two
    /// reads are detected by a digest.
    #[new]
    #[pyo3(signature = (path, *, repeated=false))]
    #[allow(clippy::needless_pass_by_value)] // PyO3 passes extracted arguments by value.
    fn new(py: Python<'_>, path: PathBuf, repeated: bool) -> PyResult<Self> {
        let reads = if repeated { Reads::Repeated } else { Reads::Once };
        detached_quiet(py, move |_| lorank::checkpoint::Checkpoint::open_for(&path, reads)).map(Self)
    }

    /// Returns every tensor as `(name, dtype, shape)`.
    fn tensors(&self) -> Vec<TensorEntry> {
        let entry = |t: &StoredTensor| (t.info.name.clone(), t.info.dtype.clone(), t.info.shape.clone());
        self.0.tensors.iter().map(entry).collect()
    }

    /// Returns the files that contain tensors, sorted by name: path, size, and time of modification in
    /// nanoseconds at the time of opening.
    fn files(&self) -> Vec<(PathBuf, u64, i128)> {
        let stored = |t: &StoredTensor| {
            let (size, time) = t.file.size_and_time();
            (t.file.path().to_path_buf(), size, time)
        };
        let files: BTreeSet<_> = self.0.tensors.iter().map(stored).collect();
        files.into_iter().collect()
    }

    /// Returns the metadata in the header of a single safetensors file; an empty map for several files. Returns
    /// the settings of a GGUF model as JSON texts, without long texts and arrays.
    fn metadata(&self) -> BTreeMap<String, String> {
        self.0.metadata()
    }

    /// Returns the `index`-th of the consecutive row-major `(rows, cols)` matrices of a tensor.
    #[pyo3(signature = (position, rows, cols, index=0))]
    fn matrix(&self, position: usize, rows: usize, cols: usize, index: usize) -> PyResult<Matrix> {
        StoredMatrix::in_file(self.tensor(position)?.clone(), (rows, cols), index).map(Matrix).map_err(to_py)
    }

    /// Returns a quantized matrix, which is decoded to float32 whenever it is loaded. `parts` are positions of
    /// tensors by their role, `shape` is that of the matrix, and `index` its position in a stack. With a
    /// `view`, as many consecutive matrices as it has elements for become one matrix of that shape.
    #[pyo3(signature = (scheme, parts, settings, shape, index=0, view=None))]
    fn dequantized(
        &self,
        scheme: String,
        parts: BTreeMap<String, usize>,
        settings: BTreeMap<String, f64>,
        shape: (usize, usize),
        index: usize,
        view: Option<(usize, usize)>,
    ) -> PyResult<Matrix> {
        let part = |(role, position)| Ok((role, self.tensor(position)?.clone()));
        let parts = parts.into_iter().map(part).collect::<PyResult<_>>()?;
        let view = view.unwrap_or(shape);
        let count = view.0.saturating_mul(view.1) / shape.0.saturating_mul(shape.1).max(1);
        quantized::open(&Request { scheme, parts, settings, shape, index }, count, view)
            .map(Matrix)
            .map_err(to_py)
    }

    /// Returns a digest of all tensors and of `seed`, as `write_safetensors` writes it.
    fn digest(&self, py: Python<'_>, seed: Vec<u8>, threads: usize) -> PyResult<String> {
        let checkpoint = self.0.clone();
        detached_quiet(py, move |cancel| checkpoint.digest(&seed, threads, cancel))
    }

    /// Returns the stored bytes of a tensor, whose element type may be unsupported.
    fn stored_bytes<'py>(&self, py: Python<'py>, position: usize) -> PyResult<Bound<'py, PyBytes>> {
        let tensor = self.tensor(position)?.clone();
        let mut memory = NewBytes::new(py, tensor.info.len)?;
        let filled = detached_quiet(py, move |cancel| {
            tensor.file.read_to(memory.zeroed(), &tensor.info, 0, cancel)?;
            Ok(memory)
        })?;
        Ok(filled.object.into_bound(py))
    }
}

/// A new bytes object that is filled without the GIL, before other code can see it.
struct NewBytes {
    object: Py<PyBytes>,
    start: *mut u8,
    len: usize,
}

// SAFETY: nothing else refers to the object, whose memory lives as long as `object`.
unsafe impl Send for NewBytes {}

impl NewBytes {
    /// Allocates a bytes object with unspecified contents.
    fn new(py: Python<'_>, len: usize) -> PyResult<Self> {
        let size = ffi::Py_ssize_t::try_from(len)?;
        // SAFETY: with a null pointer the function returns a new object of this size, or null after an error.
        let object = unsafe {
            let object = ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
            Bound::from_owned_ptr_or_err(py, object)?.cast_into::<PyBytes>()?
        };
        // SAFETY: `object` is a bytes object.
        let start = unsafe { ffi::PyBytes_AsString(object.as_ptr()) }.cast();
        Ok(Self { object: object.unbind(), start, len })
    }

    /// Returns the bytes, after setting them to zero.
    fn zeroed(&mut self) -> &mut [u8] {
        // SAFETY: the object has `len` bytes there, to which nothing else has access until it is returned to
        // Python. The empty bytes object is shared, but has no bytes to write.
        unsafe {
            std::ptr::write_bytes(self.start, 0, self.len);
            std::slice::from_raw_parts_mut(self.start, self.len)
        }
    }
}

impl Checkpoint {
    /// Returns the tensor at an index of [`tensors`](Self::tensors).
    pub fn tensor(&self, position: usize) -> PyResult<&StoredTensor> {
        self.0
            .tensors
            .get(position)
            .ok_or_else(|| PyIndexError::new_err(format!("no tensor at position {position}")))
    }
}
