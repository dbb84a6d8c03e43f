//! Arrays whose memory is mapped from a file.

use lorank::mapped::MappedFile;
use numpy::npyffi::NPY_ARRAY_OWNDATA;
use numpy::{IntoPyArray, PyArray1, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::array_memory::ArrayMemory;
use crate::detached::detached_quiet;

/// Returns true if `NumPy` allocated the memory of an array or of the arrays that it is a view of.
pub fn is_owned(array: &Bound<'_, PyUntypedArray>) -> bool {
    // SAFETY: the pointer is valid while `array` is borrowed; only its `flags` field is read.
    let flags = unsafe { (*array.as_array_ptr()).flags };
    if flags & NPY_ARRAY_OWNDATA != 0 {
        return true;
    }
    array.getattr("base").is_ok_and(|base| base.cast::<PyUntypedArray>().is_ok_and(is_owned))
}

/// Copies the memory of an array that is mapped from a file. Returns `None` for other arrays, else the bytes and
/// the position of the first element among them.
#[pyfunction]
pub fn copy_mapped<'py>(
    py: Python<'py>,
    array: &Bound<'py, PyUntypedArray>,
) -> PyResult<Option<(Bound<'py, PyArray1<u8>>, usize)>> {
    if is_owned(array) || array.is_empty() {
        return Ok(None);
    }
    let (mut before, mut after) = (0, array.dtype().itemsize());
    for (&length, &stride) in array.shape().iter().zip(array.strides()) {
        let reach = (length - 1)
            .checked_mul(stride.unsigned_abs())
            .ok_or_else(|| PyValueError::new_err("the strides of the array overflow"))?;
        if stride < 0 {
            before += reach;
        } else {
            after += reach;
        }
    }
    // SAFETY: the range is that of the array's elements, by its own shape and strides.
    let memory = unsafe { ArrayMemory::new(array, before, before + after)? };
    let Some(file) = MappedFile::of(memory.as_ref()) else { return Ok(None) };
    let copy = detached_quiet(py, move |cancel| {
        let memory = memory.as_ref();
        let mut copy = Vec::new();
        copy.try_reserve_exact(memory.len())
            .map_err(|_| lorank::Error::OutOfMemory { what: "a mapped array".into(), bytes: memory.len() })?;
        copy.resize(memory.len(), 0);
        file.copy(memory, &mut copy, cancel)?;
        Ok(copy)
    })?;
    Ok(Some((copy.into_pyarray(py), before)))
}
