//! Memory that is mapped from a file, such as `numpy.memmap` and the tensors of `torch.load(mmap=True)`.
//!
//! The system ends a process by a signal if it reads mapped memory in place whose file was cut off. A system
//! call that reads such memory returns an error instead. Mapped matrices are therefore copied by system calls.
//! Linux lists mappings in `/proc/self/maps`; without that file, memory counts as not mapped.

use std::fs::Metadata;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::exec::cancel::CancelToken;
use crate::{Error, Result};

/// Bytes that a pipe always holds without a reader.
const PIPE: usize = 4096;

/// Number of bytes copied between two polls of the cancel token.
const CHUNK: usize = 64 << 20;

/// Age up to which the list of mappings is used again: reading it takes as long as a small matrix.
const FRESH: Duration = Duration::from_millis(20);

/// `EFAULT`, the error of a system call that meets memory without contents.
const BAD_ADDRESS: i32 = 14;

/// A file that a range of memory is mapped from.
#[derive(Clone, Debug)]
pub struct MappedFile {
    path: PathBuf,
    inode: u64,
    /// Size that the file must have for the range to have contents.
    needed: u64,
    /// Time of the last modification, unless this process may write to the file through the mapping.
    modified: Option<SystemTime>,
}

/// One line of `/proc/self/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    is_written: bool,
    offset: u64,
    inode: u64,
    path: PathBuf,
}

impl MappedFile {
    /// Returns the file that some of the bytes are mapped from; `None` for other memory.
    #[must_use]
    pub fn of(memory: &[u8]) -> Option<Self> {
        let (start, end) = (memory.as_ptr().addr(), memory.as_ptr().addr() + memory.len());
        if memory.is_empty() {
            return None;
        }
        let found = mappings(start, end).into_iter().find(|m| m.is_file())?;
        let last = end.min(found.end) - found.start;
        let mut file =
            Self { needed: found.offset + last as u64, inode: found.inode, path: found.path, modified: None };
        if !found.is_written {
            file.modified = file.state().and_then(|state| state.modified().ok());
        }
        Some(file)
    }

    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies mapped bytes.
    ///
    /// # Errors
    /// [`Error::Format`] if the file was cut off or changed, [`Error::Io`] if the system refuses to copy,
    /// [`Error::Cancelled`].
    ///
    /// # Panics
    /// Panics if the lengths differ.
    pub fn copy(&self, from: &[u8], to: &mut [u8], cancel: &CancelToken) -> Result<()> {
        self.copy_parts(from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)), cancel)
    }

    /// Copies several parts of the mapping, as [`copy`](Self::copy) does.
    pub(crate) fn copy_parts<'a>(
        &self,
        parts: impl Iterator<Item = (&'a [u8], &'a mut [u8])>,
        cancel: &CancelToken,
    ) -> Result<()> {
        for (from, to) in parts {
            cancel.check()?;
            assert_eq!(from.len(), to.len());
            let copied = copy_by_system(from, to).or_else(|_| copy_by_pipe(from, to));
            copied.map_err(|e| match e.raw_os_error() {
                Some(BAD_ADDRESS) => self.cut_off(),
                _ => Error::io(&self.path, e),
            })?;
        }
        self.check_unchanged()
    }

    /// Returns an error if the file is too short for the mapping, whose last page then ends with zeros, or was
    /// modified. A path that names another file by now proves nothing.
    fn check_unchanged(&self) -> Result<()> {
        let Some(state) = self.state() else { return Ok(()) };
        if state.len() < self.needed {
            return Err(self.cut_off());
        }
        if self.modified.is_some_and(|before| state.modified().is_ok_and(|now| now != before)) {
            return Err(Error::format(&self.path, "was changed while its mapped values were read"));
        }
        Ok(())
    }

    fn state(&self) -> Option<Metadata> {
        std::fs::metadata(&self.path).ok().filter(|state| state.is_file() && state.ino() == self.inode)
    }

    fn cut_off(&self) -> Error {
        Error::format(&self.path, "was cut off while its mapped values were read")
    }
}

/// Copies memory of this process as a debugger reads that of another. Some containers forbid it.
#[cfg(target_os = "linux")]
fn copy_by_system(from: &[u8], to: &mut [u8]) -> std::io::Result<()> {
    let mut done = 0;
    while done < from.len() {
        let (part, out) = (&from[done..], &mut to[done..]);
        let source = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
        let target = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
        // SAFETY: both vectors describe slices of the same length; the system writes to the second alone, and
        // returns an error for memory without contents.
        let count =
            unsafe { libc::process_vm_readv(libc::getpid(), &raw const target, 1, &raw const source, 1, 0) };
        match usize::try_from(count) {
            Ok(0) => return Err(std::io::Error::from_raw_os_error(BAD_ADDRESS)),
            Ok(count) => done += count,
            Err(_) => return Err(std::io::Error::last_os_error()),
        }
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn copy_by_system(_: &[u8], _: &mut [u8]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Copies memory through a pipe.
fn copy_by_pipe(from: &[u8], to: &mut [u8]) -> std::io::Result<()> {
    let (mut reader, mut writer) = std::io::pipe()?;
    let mut done = 0;
    while done < from.len() {
        let count = match writer.write(&from[done..from.len().min(done + PIPE)]) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        reader.read_exact(&mut to[done..done + count])?;
        done += count;
    }
    Ok(())
}

impl Mapping {
    /// Reads a line such as `7f00-8f00 r--s 00001000 fe:00 1234   /folder/x.npy`.
    fn read(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let (access, offset, _device, inode) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some(Self {
            start: usize::from_str_radix(start, 16).ok()?,
            end: usize::from_str_radix(end, 16).ok()?,
            is_written: access.contains('w') && access.ends_with('s'),
            offset: u64::from_str_radix(offset, 16).ok()?,
            inode: inode.parse().ok()?,
            path: PathBuf::from(fields.next().unwrap_or_default().trim_start()),
        })
    }

    fn is_file(&self) -> bool {
        let is_device = self.path.starts_with("/dev") && !self.path.starts_with("/dev/shm");
        self.inode != 0 && self.path.is_absolute() && !is_device
    }
}

/// Returns the mappings of a range of memory.
fn mappings(start: usize, end: usize) -> Vec<Mapping> {
    static KNOWN: Mutex<Option<(Instant, Vec<Mapping>)>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((read, all)) = &*known {
        let within = overlapping(all, start, end);
        let covered: usize = within.iter().map(|m| m.end.min(end) - m.start.max(start)).sum();
        if read.elapsed() < FRESH && covered == end - start {
            return within;
        }
    }
    let Ok(text) = std::fs::read("/proc/self/maps") else { return Vec::new() };
    let all: Vec<Mapping> = String::from_utf8_lossy(&text).lines().filter_map(Mapping::read).collect();
    let within = overlapping(&all, start, end);
    *known = Some((Instant::now(), all));
    within
}

/// Returns those of sorted mappings that overlap a range.
fn overlapping(all: &[Mapping], start: usize, end: usize) -> Vec<Mapping> {
    let first = all.partition_point(|m| m.end <= start);
    all[first..].iter().take_while(|m| m.start < end).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_list_are_read() {
        let line = "7f0000001000-7f0000003000 rw-s 00002000 fe:00 77                         /a b/x y.npy";
        let found = Mapping::read(line).unwrap();
        assert_eq!((found.start, found.end), (0x7f00_0000_1000, 0x7f00_0000_3000));
        assert_eq!((found.is_written, found.offset, found.inode), (true, 0x2000, 77));
        assert_eq!(found.path, Path::new("/a b/x y.npy"));
        assert!(found.is_file());
        for line in [
            "7f0000001000-7f0000003000 rw-p 00000000 00:00 0",
            "55d5f0000000-55d5f0021000 rw-p 00000000 00:00 0                          [heap]",
            "7f0000001000-7f0000003000 rw-s 00000000 00:01 1024   /dev/zero (deleted)",
        ] {
            assert!(!Mapping::read(line).unwrap().is_file(), "{line}");
        }
        assert_eq!(Mapping::read("nothing"), None);
    }

    #[test]
    fn memory_of_the_process_is_not_mapped_from_a_file() {
        let memory = vec![1u8; 1 << 20];
        assert!(MappedFile::of(&memory).is_none());
        assert!(MappedFile::of(&[]).is_none());
    }

    #[test]
    fn bytes_are_copied_and_a_short_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let from: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &from).unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let file = MappedFile { path: path.clone(), inode, needed: 100_000, modified: None };
        let mut to = vec![0; from.len()];
        file.copy(&from, &mut to, &CancelToken::default()).unwrap();
        assert_eq!(to, from);
        to.fill(0);
        copy_by_pipe(&from, &mut to).unwrap();
        assert_eq!(to, from);
        std::fs::write(&path, &from[..99_999]).unwrap();
        let error = file.copy(&from, &mut to, &CancelToken::default()).unwrap_err();
        assert!(error.to_string().ends_with("x: was cut off while its mapped values were read"), "{error}");
    }
}
