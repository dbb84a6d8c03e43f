//! The Python classes of matrices and checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use lorank::cancel::CancelToken;
use lorank::checkpoint::StoredTensor;
use lorank::dtype::DType;
use lorank::safetensors::Reads;
use lorank::source::{Buffer, Computed, Parts, StoredMatrix};
use numpy::{
    IntoPyArray, PyArray1, PyArrayDescrMethods, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::detached::detached_quiet;
use crate::errors::to_py;
use crate::mapped::is_owned;
use crate::reserve;

/// A matrix in memory or in a file.
#[pyclass(frozen, module = "lorank._core")]
pub struct Matrix(pub StoredMatrix);

/// The memory of a `NumPy` array, kept alive by a reference to the array.
pub struct ArrayMemory {
    start: *const u8,
    len: usize,
    _owner: Py<PyUntypedArray>,
}

impl ArrayMemory {
    /// Holds the `len` bytes that start `before` bytes ahead of an array's first element.
    ///
    /// # Safety
    /// The bytes must lie within the buffer of the array.
    pub unsafe fn of(array: &Bound<'_, PyUntypedArray>, before: usize, len: usize) -> Self {
        // SAFETY: the pointer is valid while `array` is borrowed; only its `data` field is read.
        let data: *const u8 = unsafe { (*array.as_array_ptr()).data }.cast_const().cast();
        // The pointer of an empty array may be null, but the pointer of a slice must not.
        let start = if len == 0 { std::ptr::NonNull::dangling().as_ptr() } else { data.wrapping_sub(before) };
        Self { start, len, _owner: array.clone().unbind() }
    }
}

// SAFETY: the memory is only read, and lives as long as `_owner`, which may be released on any thread.
unsafe impl Send for ArrayMemory {}
// SAFETY: as above; shared reads need no synchronisation.
unsafe impl Sync for ArrayMemory {}

impl AsRef<[u8]> for ArrayMemory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the callers of `of` computed the range from the array's own shape and strides, so that it
        // lies within its buffer. NumPy does not move or free the buffer while the array lives. Python code
        // that writes to the array at the same time changes the values read, as for any NumPy function that
        // releases the GIL.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

/// The numbers of a Python array. A contiguous array is not copied. The numbers may outlive the call that
/// passed the array.
pub enum SharedValues {
    InPlace(ArrayMemory),
    Copied(Vec<f64>),
}

impl SharedValues {
    /// Shares or copies the numbers of a float64 array.
    pub fn of(array: &Bound<'_, PyArray1<f64>>) -> PyResult<Self> {
        let values = array.readonly();
        Ok(match values.as_slice() {
            Ok(slice) if slice.as_ptr().is_aligned() => Self::InPlace(ArrayMemory {
                start: slice.as_ptr().cast(),
                len: size_of_val(slice),
                _owner: array.as_untyped().clone().unbind(),
            }),
            _ => Self::Copied(copied(values.as_array().iter().copied())?),
        })
    }
}

/// Collects numbers of an array.
pub fn copied(values: impl ExactSizeIterator<Item = f64>) -> PyResult<Vec<f64>> {
    let mut found = Vec::new();
    found
        .try_reserve_exact(values.len())
        .map_err(|_| PyMemoryError::new_err("no memory for a copy of an array"))?;
    found.extend(values);
    Ok(found)
}

impl AsRef<[f64]> for SharedValues {
    fn as_ref(&self) -> &[f64] {
        match self {
            Self::InPlace(memory) => {
                let (start, len) = (memory.start.cast(), memory.len / size_of::<f64>());
                // SAFETY: `of` found an aligned slice of this many numbers there, which lives as long as its
                // owner. All bit patterns are numbers. For concurrent writes see `ArrayMemory`.
                unsafe { std::slice::from_raw_parts(start, len) }
            }
            Self::Copied(values) => values,
        }
    }
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
            ((rows - 1) * strides.0 + (cols - 1) * strides.1 + 1) * dtype.size()
        };
        // SAFETY: the range is that of the array's elements, by its own shape and strides.
        let memory = unsafe { ArrayMemory::of(array, 0, len) };
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
        if self.0.dtype() == DType::F64 {
            let values = detached_quiet(py, move |cancel| {
                stored.with_view(&mut Buffer::default(), cancel, |view| view.try_to_row_major::<f64>())
            })?;
            Ok(values.into_pyarray(py).reshape([rows, cols])?.into_any())
        } else {
            let values = detached_quiet(py, move |cancel| {
                stored.with_view(&mut Buffer::default(), cancel, |view| view.try_to_row_major::<f32>())
            })?;
            Ok(values.into_pyarray(py).reshape([rows, cols])?.into_any())
        }
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
        py.detach(|| reserve::hold().and_then(|()| lorank::checkpoint::Checkpoint::open_for(&path, reads)))
            .map(Self)
            .map_err(to_py)
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

    /// Returns the metadata in the header of a single file; an empty map for several files.
    fn metadata(&self) -> BTreeMap<String, String> {
        let files: Vec<_> = self.0.tensors.iter().map(|t| &t.file).collect();
        match files.split_first() {
            Some((first, rest)) if rest.iter().all(|file| Arc::ptr_eq(file, first)) => {
                first.metadata().clone()
            }
            _ => BTreeMap::new(),
        }
    }

    /// Returns the `index`-th of the consecutive row-major `(rows, cols)` matrices of a tensor.
    #[pyo3(signature = (position, rows, cols, index=0))]
    fn matrix(&self, position: usize, rows: usize, cols: usize, index: usize) -> PyResult<Matrix> {
        StoredMatrix::in_file(self.tensor(position)?.clone(), (rows, cols), index).map(Matrix).map_err(to_py)
    }

    /// Returns a digest of all tensors and of `seed`, as `write_safetensors` writes it.
    fn digest(&self, py: Python<'_>, seed: Vec<u8>, threads: usize) -> PyResult<String> {
        let checkpoint = self.0.clone();
        detached_quiet(py, move |cancel| checkpoint.digest(&seed, threads, cancel))
    }

    /// Returns the stored bytes of a tensor, whose element type may be unsupported.
    fn stored_bytes<'py>(&self, py: Python<'py>, position: usize) -> PyResult<Bound<'py, PyBytes>> {
        let tensor = self.tensor(position)?.clone();
        let bytes =
            detached_quiet(py, move |cancel| tensor.file.read(&tensor.info, 0, tensor.info.len, cancel))?;
        PyBytes::new_with(py, bytes.len(), |place| {
            place.copy_from_slice(&bytes);
            Ok(())
        })
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
