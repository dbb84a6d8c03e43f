//! Memory that is mapped from a file, such as `numpy.memmap` and the tensors of `torch.load(mmap=True)`.
//!
//! The system ends a process by a signal if it reads mapped memory in place whose file was cut off. A system
//! call that reads such memory returns an error instead. Mapped matrices are therefore copied by system calls.
//! Linux lists mappings in `/proc/self/maps`; without that file, memory counts as not mapped.

use std::fs::Metadata;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::exec::cancel::CancelToken;
use crate::{Error, Result};

/// Bytes that a pipe always holds without a reader.
const PIPE: usize = 4096;

/// Number of bytes copied between two polls of the cancel token.
const CHUNK: usize = 64 << 20;

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
        let found = first_file(start, end)?;
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

/// Returns the first mapping of a file at or after `start`, if it begins before `end`.
fn first_file(start: usize, end: usize) -> Option<Mapping> {
    let found = match query(start) {
        Ok(found) => found,
        // Systems before Linux 6.11 answer no queries.
        Err(_) => all_mappings().into_iter().find(|m| m.end > start && m.is_file()),
    };
    found.filter(|m| m.start < end && m.is_file())
}

fn all_mappings() -> Vec<Mapping> {
    let text = std::fs::read("/proc/self/maps").unwrap_or_default();
    String::from_utf8_lossy(&text).lines().filter_map(Mapping::read).collect()
}

/// The structure `procmap_query` of Linux.
#[cfg(target_os = "linux")]
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name_addr: u64,
    build_id_addr: u64,
}

/// Asks the system for the first mapping of a file at or after `start`, which takes microseconds where the
/// whole list takes a millisecond.
#[cfg(target_os = "linux")]
fn query(start: usize) -> std::io::Result<Option<Mapping>> {
    use std::os::fd::AsRawFd;

    const PROCMAP_QUERY: u64 = 0xC068_6611;
    const COVERING_OR_NEXT: u64 = 0x10;
    const FILE_BACKED: u64 = 0x20;
    const WRITABLE_SHARED: u64 = 0x2 | 0x8;
    const NONE_FOUND: i32 = 2;

    // Opened for each query: after a fork, an open file still describes the memory of the parent.
    let list = std::fs::File::open("/proc/self/maps")?;
    let mut name = [0u8; 4096];
    let mut query = Query {
        size: size_of::<Query>() as u64,
        flags: COVERING_OR_NEXT | FILE_BACKED,
        address: start as u64,
        name_size: 4096,
        name_addr: name.as_mut_ptr() as u64,
        ..Query::default()
    };
    // SAFETY: the request reads and writes a structure of this layout, and at most `name_size` bytes of `name`.
    let status = unsafe { libc::ioctl(list.as_raw_fd(), PROCMAP_QUERY as _, &raw mut query) };
    if status != 0 {
        let error = std::io::Error::last_os_error();
        return if error.raw_os_error() == Some(NONE_FOUND) { Ok(None) } else { Err(error) };
    }
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(0);
    let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    Ok(Some(Mapping {
        start: size(query.vma_start),
        end: size(query.vma_end),
        is_written: query.vma_flags & WRITABLE_SHARED == WRITABLE_SHARED,
        offset: query.vma_offset,
        inode: query.inode,
        path: PathBuf::from(std::ffi::OsStr::from_bytes(&name[..length])),
    }))
}

#[cfg(not(target_os = "linux"))]
fn query(_: usize) -> std::io::Result<Option<Mapping>> {
    Err(std::io::ErrorKind::Unsupported.into())
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

    /// The system's answers to queries and its list of mappings agree.
    #[test]
    fn queries_agree_with_the_list() {
        let files: Vec<Mapping> = all_mappings().into_iter().filter(Mapping::is_file).collect();
        assert!(!files.is_empty());
        for mapping in files {
            if let Ok(found) = query(mapping.start + 1) {
                assert_eq!(found, Some(mapping));
            }
        }
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
