//! Sequences as arguments.

use pyo3::Borrowed;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PySequence, PyString};

/// The elements of a Python sequence.
///
/// `Vec` as an argument allocates memory for as many elements as `len()` promises, which ends the process if
/// an object promises billions.
pub struct List<T>(pub Vec<T>);

impl<'a, 'py, T: FromPyObjectOwned<'py>> FromPyObject<'a, 'py> for List<T> {
    type Error = PyErr;

    fn extract(given: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if given.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("a sequence is required, not a string"));
        }
        let elements = given.cast::<PySequence>()?.try_iter()?;
        elements.map(|element| element?.extract().map_err(Into::into)).collect::<PyResult<Vec<T>>>().map(Self)
    }
}

impl<T> IntoIterator for List<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T> std::ops::Deref for List<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}
