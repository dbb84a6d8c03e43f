//! Files that are replaced atomically.
//!
//! Data is written to a hidden file beside the target, which is finally renamed to the target. After an
//! error, a full disk, an interruption or a power failure the target is unchanged or complete: the data
//! reaches the disk before the rename, and the name before the function returns. Disk space for the whole
//! file is reserved at the beginning, so that a full disk is an error before any work is done; reserved space
//! is also written a fifth faster. Several threads may write to different positions.
//!
//! A process holds a lock on its hidden file. Hidden files without a lock belong to killed processes, and the
//! next writer to the folder removes them.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::exec::aligned_bytes::AlignedBytes;
use crate::{Error, Result};

/// Number of bytes that are buffered before they are written. Threads that write to one file block each other
/// in every system call: pieces of 64 KiB take half as long again.
const GATHERED: usize = 1 << 20;

/// Counter for the names of the hidden files of this process.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A hidden file beside its target, which is removed unless it is finished.
#[derive(Debug)]
pub(crate) struct AtomicFile<'a> {
    target: &'a Path,
    path: PathBuf,
    file: File,
    keep: bool,
}

impl<'a> AtomicFile<'a> {
    /// Creates a file of `size` bytes.
    pub(crate) fn create(target: &'a Path, size: u64) -> Result<Self> {
        remove_leftovers(folder_of(target));
        loop {
            // The name omits that of the target, which may have the maximal length already.
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".lorank.{}.{number}.part", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                // Another process may find the file before it is locked, and remove it.
                Ok(file) if !owns(&file, &path) => {}
                Ok(file) => {
                    let created = Self { target, path, file, keep: false };
                    created.reserve(size)?;
                    return Ok(created);
                }
                // A process of another container has the same id and folder, or a killed process had.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(target, e)),
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn reserve(&self, size: u64) -> Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        match fallocate(&self.file, FallocateFlags::empty(), 0, size) {
            Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => {
                Err(Error::io(self.target, error.into()))
            }
            // File systems without this operation are not an error; other failures recur when writing.
            _ => Ok(()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // Same signature as on Linux.
    fn reserve(&self, _size: u64) -> Result<()> {
        Ok(())
    }

    /// Writes bytes at a position.
    pub(crate) fn write_at(&self, position: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, position).map_err(|e| Error::io(self.target, e))
    }

    /// Calls `write` with a [`Sink`] that begins at a position and is buffered in `pending`.
    pub(crate) fn write_from(
        &self,
        position: u64,
        pending: &mut Pending,
        write: impl FnOnce(&mut Sink<'_>) -> Result<()>,
    ) -> Result<()> {
        pending.filled = 0;
        let mut sink = Sink { file: self, position, pending };
        write(&mut sink)?;
        sink.flush()
    }

    /// Renames the file to its target, when the data is on the disk.
    pub(crate) fn finish(mut self) -> Result<()> {
        let rename = || {
            self.file.sync_data()?;
            std::fs::rename(&self.path, self.target)
        };
        rename().map_err(|e| Error::io(self.target, e))?;
        self.keep = true;
        sync_folder(folder_of(self.target)).map_err(|e| Error::io(self.target, e))
    }
}

impl Drop for AtomicFile<'_> {
    fn drop(&mut self) {
        if !self.keep {
            // An error here is ignored, as an earlier error is being returned.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Returns the folder of a file.
fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Writes the names in a folder to the disk, unless the folder cannot be opened or the file system does not
/// write folders on request.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    let Ok(opened) = File::open(folder) else { return Ok(()) };
    match opened.sync_all() {
        Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Err(e),
        _ => Ok(()),
    }
}

/// Locks a hidden file. Returns `false` if another process has locked or removed it. File systems without
/// locks are not an error: no process removes leftover files there.
fn owns(file: &File, path: &Path) -> bool {
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        return false;
    }
    is_at(file, path)
}

/// Returns whether a path names an open file.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(opened), Ok(named)) => (opened.dev(), opened.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

/// Removes the hidden files that killed processes left in a folder. Errors are ignored: leftover files take
/// space, but are no obstacle.
fn remove_leftovers(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || !entry.file_name().to_str().is_some_and(is_hidden_name) {
            continue;
        }
        let path = entry.path();
        let mut options = OpenOptions::new();
        #[cfg(target_os = "linux")]
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
        if let Ok(file) = options.write(true).open(&path)
            && file.try_lock().is_ok()
            && is_at(&file, &path)
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Returns whether a name is that of a hidden file of this module.
fn is_hidden_name(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_prefix(".lorank.")
        .and_then(|rest| rest.strip_suffix(".part"))
        .and_then(|rest| rest.split_once('.'))
        .is_some_and(|(id, number)| is_number(id) && is_number(number))
}

/// A reusable buffer of bytes to be written.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    buffer: AlignedBytes,
    filled: usize,
}

impl Pending {
    /// Returns the next `size` bytes of the buffer, with unspecified contents. `position` is the position in
    /// the file of the first buffered byte. All buffered pieces fit into [`GATHERED`] bytes, except for a
    /// single larger one.
    fn place(&mut self, size: usize, position: u64) -> Option<&mut [u8]> {
        if self.filled == 0 {
            self.buffer.reserve(size.max(GATHERED), position)?;
        }
        Some(&mut self.buffer.bytes_mut()[self.filled..][..size])
    }
}

/// A position in a file, which advances as bytes are written.
pub(crate) struct Sink<'a> {
    file: &'a AtomicFile<'a>,
    position: u64,
    pending: &'a mut Pending,
}

impl<'a> Sink<'a> {
    /// Returns the path of the target.
    pub(crate) const fn path(&self) -> &'a Path {
        self.file.target
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() < GATHERED {
            return self.put(bytes.len(), |place| {
                place.copy_from_slice(bytes);
                Ok(())
            });
        }
        self.flush()?;
        self.write(bytes)
    }

    /// Appends `size` bytes, all of which `fill` must write.
    pub(crate) fn put(&mut self, size: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        if self.pending.filled + size > GATHERED {
            self.flush()?;
        }
        let Some(place) = self.pending.place(size, self.position) else {
            return Err(Error::no_memory(size, format!("a part of {}", self.path().display())));
        };
        fill(place)?;
        self.pending.filled += size;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let pending = std::mem::take(self.pending);
        let result = self.write(&pending.buffer.bytes()[..pending.filled]);
        *self.pending = Pending { filled: 0, ..pending };
        result
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_at(self.position, bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(path: &Path, pieces: &[Vec<u8>]) -> Result<()> {
        let size: usize = pieces.iter().map(Vec::len).sum();
        let file = AtomicFile::create(path, size as u64)?;
        let mut pending = Pending::default();
        pending.place(10, 3).unwrap().copy_from_slice(b"of another");
        pending.filled = 10;
        file.write_from(0, &mut pending, |sink| {
            pieces.iter().enumerate().try_for_each(|(k, piece)| {
                if k % 2 == 0 {
                    return sink.bytes(piece);
                }
                sink.put(piece.len(), |place| {
                    place.copy_from_slice(piece);
                    Ok(())
                })
            })
        })?;
        file.finish()
    }

    #[test]
    fn pieces_of_any_size_are_concatenated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for sizes in [
            vec![],
            vec![0],
            vec![1, 2, 3],
            vec![GATHERED - 1, 1, 1],
            vec![GATHERED, 5, GATHERED + 1, GATHERED - 5, 7],
            vec![5, GATHERED, 5, GATHERED - 4, 3, 2 * GATHERED, 7, 8],
        ] {
            let piece = |(k, size): (usize, &usize)| {
                (0..*size).map(|i| ((i * 7 + k) % 251).try_into().unwrap()).collect()
            };
            let pieces: Vec<Vec<u8>> = sizes.iter().enumerate().map(piece).collect();
            written(&path, &pieces).unwrap();
            assert!(std::fs::read(&path).unwrap() == pieces.concat(), "{sizes:?}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn long_names_and_leftover_files_are_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let next = COUNTER.load(Ordering::Relaxed); // other tests increment the counter, too
        let remains = |number| format!(".lorank.{}.{number}.part", std::process::id());
        let mut locked = Vec::new();
        for number in next..next + 1000 {
            let file = File::create(folder.path().join(remains(number))).unwrap();
            file.try_lock().unwrap();
            locked.push(file);
        }
        let path = folder.path().join("x".repeat(255));
        written(&path, &[vec![1]]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [1]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1001);
    }

    #[test]
    fn leftover_files_of_killed_processes_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let precious = [".lorank.1.part", ".lorank.1.x.part", "lorank.1.2.part", ".lorank.1.2.part~", "mine"];
        for name in [".lorank.1.2.part", ".lorank.77.0.part"].iter().chain(&precious) {
            std::fs::write(at(name), b"old").unwrap();
        }
        std::os::unix::fs::symlink(at("mine"), at(".lorank.3.4.part")).unwrap();
        std::fs::create_dir(at(".lorank.5.6.part")).unwrap();
        written(&at("file"), &[vec![1]]).unwrap();
        let mut found: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        let mut expected = [&precious[..], &["file", ".lorank.3.4.part", ".lorank.5.6.part"]].concat();
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert_eq!(std::fs::read(at("mine")).unwrap(), b"old");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn file_larger_than_the_disk_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"precious").unwrap();
        let error = AtomicFile::create(&path, 1 << 62).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
