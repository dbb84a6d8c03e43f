//! A position in the header of a file, which advances as values are read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{Error, Result};

/// Number of bytes read at once.
const BUFFER: usize = 64 << 10;

/// Largest size of a header. The largest vocabularies take some 20 MB.
const MAX_HEADER: u64 = 256 << 20;

/// Largest length of a key or of the name of a tensor.
const MAX_NAME: usize = 4096;

pub(super) struct Cursor<'a> {
    path: &'a Path,
    file: &'a File,
    /// Number of bytes of the file, or the limit of headers.
    size: u64,
    position: u64,
    buffer: Vec<u8>,
    /// Position in the file of the first byte of the buffer.
    start: u64,
}

impl<'a> Cursor<'a> {
    /// Creates a cursor at the beginning of a file of `size` bytes.
    pub(super) fn new(path: &'a Path, file: &'a File, size: u64) -> Self {
        Self { path, file, size: size.min(MAX_HEADER), position: 0, buffer: Vec::new(), start: 0 }
    }

    pub(super) const fn path(&self) -> &'a Path {
        self.path
    }

    pub(super) const fn position(&self) -> u64 {
        self.position
    }

    /// Returns the number of bytes up to the end of the file or to the limit of headers.
    pub(super) const fn remaining(&self) -> u64 {
        self.size - self.position
    }

    /// Advances by a number of bytes.
    pub(super) fn skip(&mut self, count: u64) -> Result<()> {
        if count > self.remaining() {
            return Err(self.truncated());
        }
        self.position += count;
        Ok(())
    }

    fn truncated(&self) -> Error {
        let reason = if self.size == MAX_HEADER {
            format!("has a header of more than {MAX_HEADER} bytes: it is damaged")
        } else {
            format!("has a header that ends beyond its {} bytes: it is truncated or damaged", self.size)
        };
        Error::format(self.path, reason)
    }

    /// Returns the next `count` bytes, at most [`BUFFER`].
    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let from = self.position;
        self.skip(count as u64)?;
        if from < self.start || self.position > self.start + self.buffer.len() as u64 {
            let available = usize::try_from(self.size - from).unwrap_or(BUFFER).min(BUFFER);
            self.buffer.resize(available, 0);
            self.start = from;
            self.file.read_exact_at(&mut self.buffer, from).map_err(|e| Error::io(self.path, e))?;
        }
        let at = usize::try_from(from - self.start).unwrap_or(usize::MAX);
        self.buffer.get(at..at + count).ok_or_else(|| Error::Internal("a position outside a buffer".into()))
    }

    fn array<const SIZE: usize>(&mut self) -> Result<[u8; SIZE]> {
        let mut bytes = [0; SIZE];
        bytes.copy_from_slice(self.take(SIZE)?);
        Ok(bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads a text of at most `longest` bytes; returns `None` for a longer one, which is passed over.
    pub(super) fn text(&mut self, longest: usize) -> Result<Option<Vec<u8>>> {
        let length = self.u64()?;
        match usize::try_from(length) {
            Ok(length) if length <= longest.min(BUFFER) => Ok(Some(self.take(length)?.to_vec())),
            _ => {
                self.skip(length)?;
                Ok(None)
            }
        }
    }

    /// Reads the key of a setting or the name of a tensor.
    pub(super) fn name(&mut self, of: &str) -> Result<String> {
        let found = self.text(MAX_NAME)?.and_then(|bytes| String::from_utf8(bytes).ok());
        let fail = || format!("has a {of} whose name is not UTF-8 or has more than {MAX_NAME} bytes");
        found.ok_or_else(|| Error::format(self.path, fail()))
    }
}
