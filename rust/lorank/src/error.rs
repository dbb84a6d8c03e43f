//! The error type of the crate.

use std::path::{Path, PathBuf};

/// An error, from a malformed file to a matrix without a spectrum.
///
/// [`Numerical`](Self::Numerical) and [`NoConvergence`](Self::NoConvergence) depend on the values alone: the
/// same input fails again. [`OutOfMemory`](Self::OutOfMemory) and [`NoThreads`](Self::NoThreads) depend on
/// the state of the machine. [`Internal`](Self::Internal) is a defect of this crate.
///
/// Later versions may add variants, each with a kind of [`ErrorKind`]. To cover all errors, match on
/// [`kind`](Self::kind).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system did not open, read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The contents of a file violate its format.
    #[error("{}: {}{reason}", path.display(), tensor.as_ref().map(|t| format!("tensor `{t}`: ")).unwrap_or_default())]
    Format {
        /// Path of the file.
        path: PathBuf,
        /// Name of the malformed tensor, if the error concerns one.
        tensor: Option<String>,
        /// Description of the violation and, where one exists, of the remedy.
        reason: String,
    },
    /// An argument is invalid or does not fit the others (a length, a shape, a negative eigenvalue).
    #[error("{0}")]
    InvalidInput(String),
    /// The values have no spectrum in float64.
    #[error("{0}")]
    Numerical(String),
    /// An iteration did not converge.
    #[error("{0} did not converge")]
    NoConvergence(&'static str),
    /// The operating system did not provide memory.
    #[error("no memory for the {bytes} bytes of {what}")]
    OutOfMemory {
        /// Purpose of the memory.
        what: String,
        /// Requested size in bytes.
        bytes: usize,
    },
    /// The operating system did not start threads.
    #[error("could not start {threads} thread{}: {source}", if *threads == 1 { "" } else { "s" })]
    NoThreads {
        /// Requested number of threads.
        threads: usize,
        /// Error of the operating system.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A panic within this crate or its dependencies.
    #[error("internal error: {0}")]
    Internal(String),
    /// The caller cancelled the work.
    #[error("cancelled")]
    Cancelled,
}

/// The kind of an [`Error`]. The set of kinds is closed, so that a `match` on it needs no wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A file cannot be opened, read or written.
    Io,
    /// The contents of a file violate its format.
    Format,
    /// The arguments of a call do not fit together.
    InvalidInput,
    /// The values of a matrix have no spectrum, or an iteration over them does not converge.
    Numerical,
    /// The system did not provide memory.
    OutOfMemory,
    /// The system did not start threads.
    NoThreads,
    /// A defect of this crate.
    Internal,
    /// The caller cancelled the work.
    Cancelled,
}

/// `Result` with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Returns the kind of the error.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Io,
            Self::Format { .. } => ErrorKind::Format,
            Self::InvalidInput(_) => ErrorKind::InvalidInput,
            Self::Numerical(_) | Self::NoConvergence(_) => ErrorKind::Numerical,
            Self::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Self::NoThreads { .. } => ErrorKind::NoThreads,
            Self::Internal(_) => ErrorKind::Internal,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    pub(crate) fn no_memory(bytes: usize, what: impl Into<String>) -> Self {
        Self::OutOfMemory { what: what.into(), bytes }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), tensor: None, reason: reason.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), tensor: Some(tensor.to_owned()), reason: reason.into() }
    }
}
