//! The memory of `NumPy` arrays, read without the GIL.

use numpy::{PyArray1, PyArrayDescrMethods, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods, dtype};
use pyo3::Borrowed;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyWeakrefReference};

/// The memory of a `NumPy` array.
///
/// A reference to the array keeps it alive. `ndarray.resize` could still free its memory: with
/// `refcheck=False` it ignores references. But it refuses arrays with weak references, so that one is held
/// here for the array, and one for every array whose memory it shares. Other owners of memory either count
/// their users (`bytearray`, `mmap`, `memoryview`) or do not resize memory that `NumPy` has seen (torch).
pub struct ArrayMemory {
    start: *const u8,
    len: usize,
    _array: Py<PyUntypedArray>,
    _pins: Vec<Py<PyWeakrefReference>>,
}

// SAFETY: the memory is only read, and lives as long as the references, which may be released on any thread.
unsafe impl Send for ArrayMemory {}
// SAFETY: as above; shared reads need no synchronisation.
unsafe impl Sync for ArrayMemory {}

impl ArrayMemory {
    /// Holds the `len` bytes that start `before` bytes ahead of an array's first element.
    ///
    /// # Safety
    /// The bytes must lie in the array's memory.
    pub unsafe fn new(array: &Bound<'_, PyUntypedArray>, before: usize, len: usize) -> PyResult<Self> {
        let mut pins = Vec::with_capacity(1);
        let mut next = Some(array.clone());
        while let Some(array) = next {
            pins.push(PyWeakrefReference::new(&array)?.unbind());
            // SAFETY: the field is null, or an object that `array` references.
            let base = unsafe { Bound::from_borrowed_ptr_or_opt(array.py(), (*array.as_array_ptr()).base) };
            next = base.and_then(|base| base.cast_into().ok());
        }
        // SAFETY: the pointer is valid while `array` is borrowed; only its `data` field is read.
        let data: *const u8 = unsafe { (*array.as_array_ptr()).data }.cast_const().cast();
        // The pointer of an empty array may be null, but the pointer of a slice must not. The alignment is
        // that of any element.
        let dangling = std::ptr::NonNull::<u64>::dangling().as_ptr().cast_const().cast();
        let start = if len == 0 { dangling } else { data.wrapping_sub(before) };
        Ok(Self { start, len, _array: array.clone().unbind(), _pins: pins })
    }
}

impl AsRef<[u8]> for ArrayMemory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: by the contract of `new` the bytes lie in the memory of the array, which is neither freed
        // nor moved: `_array` keeps the array alive, and `_pins` prevent `ndarray.resize`. There is one
        // exception, which lorank documents: `ndarray.__setstate__` during a call, and in NumPy before 2.4
        // an assignment to `ndarray.data`, free the memory of any array. Code that writes to the array
        // during a call changes the values read, as for any NumPy function that releases the GIL.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

/// An argument that `NumPy` converts to a 1-D array of float64.
pub struct Float64s<'py>(pub Bound<'py, PyArray1<f64>>);

impl<'py> FromPyObject<'_, 'py> for Float64s<'py> {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let py = given.py();
        if let Ok(array) = given.cast::<PyArray1<f64>>() {
            return Ok(Self(array.to_owned()));
        }
        let double = dtype::<f64>(py);
        let converted = if let Ok(array) = given.cast::<PyUntypedArray>()
            && array.dtype().kind() != b'O'
        {
            // Real numbers of any type. NumPy converts them without the GIL.
            let kwargs = PyDict::new(py);
            kwargs.set_item("casting", "same_kind")?;
            array.call_method("astype", (double,), Some(&kwargs))?
        } else {
            PyModule::import(py, "numpy")?.call_method1("asarray", (given, double))?
        };
        let dimensions = converted.cast::<PyUntypedArray>().map_or(0, PyUntypedArrayMethods::ndim);
        let wrong = |_| PyTypeError::new_err(format!("numbers must have 1 dimension, not {dimensions}"));
        converted.cast_into::<PyArray1<f64>>().map(Self).map_err(wrong)
    }
}

/// The numbers of a Python array. A contiguous array is not copied. The numbers may outlive the call that
/// passed the array.
pub struct SharedValues(ArrayMemory);

impl SharedValues {
    /// Shares or copies the numbers of a float64 array.
    pub fn of(array: &Bound<'_, PyArray1<f64>>) -> PyResult<Self> {
        // NumPy copies without the GIL.
        let is_plain = array.is_contiguous() && array.data().is_aligned();
        let array = if is_plain {
            array.clone()
        } else {
            array.call_method0("copy")?.cast_into::<PyArray1<f64>>()?
        };
        if !array.is_contiguous() || !(array.len() == 0 || array.data().is_aligned()) {
            return Err(PyTypeError::new_err("a copy of the array is not contiguous"));
        }
        let len = array.len() * size_of::<f64>();
        // SAFETY: the array is contiguous, with this number of bytes.
        Ok(Self(unsafe { ArrayMemory::new(array.as_untyped(), 0, len)? }))
    }
}

impl AsRef<[f64]> for SharedValues {
    fn as_ref(&self) -> &[f64] {
        let (start, len) = (self.0.start.cast(), self.0.len / size_of::<f64>());
        // SAFETY: `of` found aligned numbers there, and any bit pattern is a number. For their lifetime and
        // concurrent writes see `ArrayMemory`.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}
