//! Files that appear whole or not at all.
//!
//! What is written goes into a hidden file beside the target, which is renamed onto it at the end: an error, a
//! full disk or an interruption leaves the target as it was. Room for all of it is reserved at the beginning:
//! a disk that is too full is an error before any work is done, and writing into what is reserved takes a fifth
//! less time. Several threads may write to different places.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::exec::aligned_bytes::AlignedBytes;
use crate::{Error, Result};

/// Bytes that are gathered before they are written. Threads that write to one file wait for each other, at every
/// call of the system: in pieces of 64 KiB, they take half as long again.
const GATHERED: usize = 1 << 20;

/// Tells the hidden files of one process apart.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A hidden file beside its target, removed unless it is finished.
#[derive(Debug)]
pub(crate) struct WholeFile<'a> {
    target: &'a Path,
    path: PathBuf,
    file: File,
    keep: bool,
}

impl<'a> WholeFile<'a> {
    /// A file that will have so many bytes.
    pub(crate) fn create(target: &'a Path, size: u64) -> Result<Self> {
        loop {
            // Without the target's name, which may be as long as a name can be.
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".lorank.{}.{number}.part", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let whole = Self { target, path, file, keep: false };
                    whole.reserve(size)?;
                    return Ok(whole);
                }
                // Left by a killed process of the same id: in containers they are alike.
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
            // Not every file system can; what is wrong otherwise shows up in writing.
            _ => Ok(()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // As on Linux.
    fn reserve(&self, _size: u64) -> Result<()> {
        Ok(())
    }

    /// Writes bytes to a place.
    pub(crate) fn write_at(&self, position: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, position).map_err(|e| Error::io(self.target, e))
    }

    /// Lets `write` put bytes from a place on, which are gathered in `pending`.
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

    /// Puts the file in its place.
    pub(crate) fn finish(mut self) -> Result<()> {
        std::fs::rename(&self.path, self.target).map_err(|e| Error::io(self.target, e))?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for WholeFile<'_> {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed cannot be helped: the error that led here is on its way.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Bytes that are gathered for a file, in memory that is used again and again.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    buffer: AlignedBytes,
    filled: usize,
}

impl Pending {
    /// The next bytes, whatever they hold: pieces together fill [`GATHERED`] at most, or there is but one. `position`
    /// is that of the first of them.
    fn place(&mut self, size: usize, position: u64) -> Option<&mut [u8]> {
        if self.filled == 0 {
            self.buffer.room(size.max(GATHERED), position)?;
        }
        Some(&mut self.buffer.bytes_mut()[self.filled..][..size])
    }
}

/// A place in a file, which moves on with what is written there.
pub(crate) struct Sink<'a> {
    file: &'a WholeFile<'a>,
    position: u64,
    pending: &'a mut Pending,
}

impl<'a> Sink<'a> {
    /// What the file will be called.
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

    /// So many bytes that `fill` writes, all of them, to where they are gathered.
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

    fn whole(path: &Path, pieces: &[Vec<u8>]) -> Result<()> {
        let size: usize = pieces.iter().map(Vec::len).sum();
        let file = WholeFile::create(path, size as u64)?;
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
    fn pieces_of_any_size_come_one_after_the_other() {
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
            whole(&path, &pieces).unwrap();
            assert!(std::fs::read(&path).unwrap() == pieces.concat(), "{sizes:?}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn any_name_will_do_and_remains_are_not_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let next = COUNTER.load(Ordering::Relaxed); // other tests count on meanwhile
        for number in next..next + 1000 {
            let remains = format!(".lorank.{}.{number}.part", std::process::id());
            std::fs::write(folder.path().join(remains), b"").unwrap();
        }
        let path = folder.path().join("x".repeat(255));
        whole(&path, &[vec![1]]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [1]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1001);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn more_than_the_disk_holds_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"precious").unwrap();
        let error = WholeFile::create(&path, 1 << 62).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
