//! Conversion of Rust errors to Python exceptions, by one exhaustive match of their kinds.

use lorank::{Error, ErrorKind};
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    lorank._core,
    LorankError,
    PyException,
    "Base class of lorank's errors. An error of exactly this class is a defect of lorank."
);
create_exception!(
    lorank._core,
    FormatError,
    LorankError,
    "A file violates its format. The message names the file, the tensor and the reason."
);
create_exception!(
    lorank._core,
    NumericalError,
    LorankError,
    "A matrix has no spectrum: NaN or infinite values, values out of range, or no convergence."
);

/// Returns the exception for an error of the core.
pub fn to_py(error: Error) -> PyErr {
    match error.kind() {
        ErrorKind::Io => io_error(error),
        ErrorKind::Format => FormatError::new_err(error.to_string()),
        ErrorKind::InvalidInput => PyValueError::new_err(error.to_string()),
        ErrorKind::Numerical => NumericalError::new_err(error.to_string()),
        ErrorKind::OutOfMemory => PyMemoryError::new_err(error.to_string()),
        // Without an error number: EAGAIN would make Python raise a BlockingIOError.
        ErrorKind::NoThreads => PyOSError::new_err(error.to_string()),
        ErrorKind::Internal => LorankError::new_err(format!(
            "{error} (a defect of lorank {}: please report this line to the project's issue tracker)",
            env!("CARGO_PKG_VERSION")
        )),
        ErrorKind::Cancelled => PyKeyboardInterrupt::new_err("cancelled"),
    }
}

/// Returns an `OSError` with the error number of the system, from which Python derives
/// `FileNotFoundError`, `PermissionError` and the like.
fn io_error(error: Error) -> PyErr {
    match error {
        Error::Io { path, source } => match source.raw_os_error() {
            Some(code) => {
                let reason = std::io::Error::from_raw_os_error(code).to_string();
                let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
                PyOSError::new_err((code, reason, path))
            }
            None => PyOSError::new_err(format!("{}: {source}", path.display())),
        },
        other => PyOSError::new_err(other.to_string()),
    }
}
