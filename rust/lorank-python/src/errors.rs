//! Rust errors as Python exceptions, by one exhaustive match.

use lorank::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    lorank._core,
    LorankError,
    PyException,
    "Base class of lorank's own errors; an error of exactly this class is a defect of lorank."
);
create_exception!(
    lorank._core,
    FormatError,
    LorankError,
    "A file is not what its format promises. The message names the file, the tensor and the reason."
);
create_exception!(
    lorank._core,
    NumericalError,
    LorankError,
    "A matrix has no spectrum: NaN or infinite values, values beyond float64, no convergence."
);

/// The exception for an error of the core.
pub fn to_py(error: Error) -> PyErr {
    match error {
        Error::Io { path, source } => match source.raw_os_error() {
            // Python picks FileNotFoundError, PermissionError, ... by the number.
            Some(code) => {
                let reason = std::io::Error::from_raw_os_error(code).to_string();
                let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
                PyOSError::new_err((code, reason, path))
            }
            None => PyOSError::new_err(format!("{}: {source}", path.display())),
        },
        Error::Format { .. } => FormatError::new_err(error.to_string()),
        Error::InvalidInput(reason) => PyValueError::new_err(reason),
        Error::Numerical(_) | Error::NoConvergence(_) => NumericalError::new_err(error.to_string()),
        Error::OutOfMemory { .. } => PyMemoryError::new_err(error.to_string()),
        // From the number, EAGAIN, Python would make a BlockingIOError.
        Error::NoThreads { .. } => PyOSError::new_err(error.to_string()),
        Error::Internal(_) => LorankError::new_err(format!(
            "{error} (a defect of lorank {}: please report this line to the project's issue tracker)",
            env!("CARGO_PKG_VERSION")
        )),
        Error::Cancelled => PyKeyboardInterrupt::new_err("cancelled"),
    }
}
