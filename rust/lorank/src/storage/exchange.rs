//! Exchange of two files or folders in one step.

use std::path::Path;

use crate::{Error, Result};

/// Exchanges the names of two files or folders: no process sees one name without a file, or both with one.
///
/// # Errors
/// [`Error::Io`] if a path does not exist or may not be renamed, if the paths are on different file systems,
/// or if the system or the file system has no such operation.
///
/// # Examples
/// ```
/// use lorank::exchange::exchange;
///
/// let folder = tempfile::tempdir().unwrap();
/// let (a, b) = (folder.path().join("a"), folder.path().join("b"));
/// std::fs::write(&a, "1").unwrap();
/// std::fs::write(&b, "2").unwrap();
/// if exchange(&a, &b).is_ok() {
///     assert_eq!(std::fs::read(&a).unwrap(), b"2");
/// }
/// ```
pub fn exchange(a: &Path, b: &Path) -> Result<()> {
    exchanged(a, b).map_err(|e| Error::io(b, e))
}

#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn exchanged(a: &Path, b: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn exchanged(_a: &Path, _b: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}
