//! Reading of untrusted safetensors files.
//!
//! A file consists of eight bytes for the length of the header, a JSON header, and the bytes of the tensors.
//! On opening, the whole header is checked: lengths, names, shapes, and offsets that exceed the file or
//! overlap. Tensors are then read by position into separate buffers. Files are not mapped into memory: memory
//! stays bounded, and a file that shrinks while it is read causes an error instead of a signal.
//!
//! A file that changes after it was opened is an error, so that all values that were read belong together:
//! see [`Reads`].

mod header;

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::exec::aligned_bytes::AlignedBytes;
use crate::exec::cancel::CancelToken;
use crate::exec::memory::{probe, zeros};
use crate::storage::digest::{Digest, PIECE};
use crate::storage::gguf;
use crate::storage::revision::{Revision, Seen};
use crate::storage::safetensors::header::{RawHeader, check};
use crate::{Error, Result};

pub(crate) use header::{bits_per_element, check_apart};

/// Largest length of a header, in bytes. The reference implementation has the same limit.
const MAX_HEADER: usize = 100_000_000;

/// Memory in bytes for a byte of the header: the parsed entries, and copies of them.
const PARSED: usize = 16;

/// Number of bytes read between two polls of the cancel token.
const READ_CHUNK: usize = 64 << 20;

/// How changes of a file are detected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// By the size and the times of the open file, after every read.
    #[default]
    Once,
    /// For bytes that were read before, by a digest of them; for other bytes as under [`Once`](Self::Once).
    /// A program that writes by a memory map may leave the times as they were.
    Repeated,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name of the tensor.
    pub name: String,
    /// Element type as in the header. This crate may not support it.
    pub dtype: String,
    /// Shape of the tensor, empty for a scalar.
    pub shape: Vec<usize>,
    /// Position of the first byte in the file.
    pub offset: u64,
    /// Size in bytes.
    pub len: usize,
}

/// An open safetensors or GGUF file with a checked header.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    revision: Revision,
    /// Digests of what was read, for [`Reads::Repeated`].
    seen: Option<Seen>,
    tensors: Vec<TensorInfo>,
    positions: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    is_gguf: bool,
}

impl SafetensorsFile {
    /// Opens a file and checks its header. A file that begins with `GGUF` is read as a GGUF file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] if its header is inconsistent,
    /// [`Error::OutOfMemory`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_for(path, Reads::Once)
    }

    /// Opens a file as [`open`](Self::open) does, and selects how its changes are detected.
    ///
    /// # Errors
    /// The errors of [`open`](Self::open).
    pub fn open_for(path: &Path, reads: Reads) -> Result<Self> {
        // Checked before opening, as opening a named pipe would block.
        if !std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_file() {
            return Err(Error::format(path, "is not a regular file"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let metadata = file.metadata().map_err(|e| Error::io(path, e))?;
        let (size, revision) = (metadata.len(), Revision::of(&metadata));
        let is_gguf = gguf::is_gguf(&file).map_err(|e| Error::io(path, e))?;
        let (tensors, metadata) =
            if is_gguf { gguf::header(path, &file, size) } else { header(path, &file, size) }?;
        let mut positions = HashMap::with_capacity(tensors.len());
        for (position, tensor) in tensors.iter().enumerate() {
            if positions.insert(tensor.name.clone(), position).is_some() {
                return Err(Error::tensor(path, &tensor.name, "appears twice in the header"));
            }
        }
        let seen = (reads == Reads::Repeated).then(Seen::default);
        Ok(Self { path: path.to_path_buf(), file, revision, seen, tensors, positions, metadata, is_gguf })
    }

    /// Returns the path that was passed to [`open`](Self::open).
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size in bytes and the time of modification in nanoseconds, at the time of opening.
    #[must_use]
    pub fn size_and_time(&self) -> (u64, i128) {
        self.revision.size_and_time()
    }

    /// Returns true if the path still leads to the open file.
    pub(crate) fn is_in_place(&self) -> bool {
        let identity = |found: std::io::Result<Metadata>| found.ok().map(|m| (m.dev(), m.ino()));
        identity(self.file.metadata()) == identity(std::fs::metadata(&self.path))
    }

    /// Returns the tensors in the order of the header.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Returns true if the file is a GGUF file.
    #[must_use]
    pub const fn is_gguf(&self) -> bool {
        self.is_gguf
    }

    /// Returns the entries of the header under `__metadata__`; the settings of a GGUF file as JSON texts.
    #[must_use]
    pub const fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the index in [`tensors`](Self::tensors) of the tensor with a given name.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    /// Reads `len` bytes of a tensor, starting at its byte `start`.
    ///
    /// # Errors
    /// [`Error::Format`] if the range exceeds the tensor or the file has shrunk, [`Error::Io`],
    /// [`Error::OutOfMemory`], [`Error::Cancelled`].
    pub fn read(
        &self,
        tensor: &TensorInfo,
        start: usize,
        len: usize,
        cancel: &CancelToken,
    ) -> Result<Vec<u8>> {
        self.check_range(tensor, start, len)?;
        let mut bytes = zeros(len, "").map_err(|_| self.no_memory(tensor, len))?;
        self.fill(&mut bytes, tensor, start, cancel)?;
        Ok(bytes)
    }

    /// Reads as many bytes of a tensor as `bytes` has, starting at its byte `start`.
    ///
    /// # Errors
    /// The errors of [`read`](Self::read).
    pub fn read_to(
        &self,
        bytes: &mut [u8],
        tensor: &TensorInfo,
        start: usize,
        cancel: &CancelToken,
    ) -> Result<()> {
        self.check_range(tensor, start, bytes.len())?;
        self.fill(bytes, tensor, start, cancel)
    }

    /// Reads as [`read`](Self::read) does, into a reusable buffer.
    pub(crate) fn read_into<'a>(
        &self,
        buffer: &'a mut AlignedBytes,
        tensor: &TensorInfo,
        start: usize,
        len: usize,
        cancel: &CancelToken,
    ) -> Result<&'a [u8]> {
        self.check_range(tensor, start, len)?;
        let memory = buffer.reserve(len, tensor.offset + start as u64);
        let bytes = &mut memory.ok_or_else(|| self.no_memory(tensor, len))?[..len];
        self.fill(bytes, tensor, start, cancel)?;
        Ok(bytes)
    }

    fn check_range(&self, tensor: &TensorInfo, start: usize, len: usize) -> Result<()> {
        if start.checked_add(len).is_some_and(|end| end <= tensor.len) {
            return Ok(());
        }
        let reason = format!("bytes {start} to {start}+{len} lie outside its {} bytes", tensor.len);
        Err(Error::tensor(&self.path, &tensor.name, reason))
    }

    fn no_memory(&self, tensor: &TensorInfo, len: usize) -> Error {
        Error::no_memory(len, format!("tensor `{}` of {}", tensor.name, self.path.display()))
    }

    fn fill(&self, bytes: &mut [u8], tensor: &TensorInfo, start: usize, cancel: &CancelToken) -> Result<()> {
        let position = tensor.offset + start as u64;
        if self.seen.is_none() {
            self.pieces(bytes, (tensor, position), READ_CHUNK, cancel, |_| ())?;
            return self.check_unchanged(tensor);
        }
        let mut digest = Digest::new();
        self.pieces(bytes, (tensor, position), PIECE, cancel, |piece| digest.update(piece))?;
        self.confirm(tensor, (position, bytes.len()), digest.value())
    }

    /// Returns the digest of a tensor's bytes, which are read into a buffer of fixed size.
    pub(crate) fn digest(
        &self,
        tensor: &TensorInfo,
        buffer: &mut Vec<u8>,
        cancel: &CancelToken,
    ) -> Result<u64> {
        buffer.try_reserve_exact(PIECE).map_err(|_| self.no_memory(tensor, PIECE))?;
        buffer.resize(PIECE, 0);
        let mut digest = Digest::new();
        for start in (0..tensor.len).step_by(PIECE) {
            let piece = &mut buffer[..PIECE.min(tensor.len - start)];
            self.pieces(piece, (tensor, tensor.offset + start as u64), PIECE, cancel, |_| ())?;
            digest.update(piece);
        }
        let found = digest.value();
        self.confirm(tensor, (tensor.offset, tensor.len), found)?;
        Ok(found)
    }

    /// Returns an error unless bytes that were just read are those of an earlier read; for bytes that were not
    /// read before, unless the file is unchanged.
    fn confirm(&self, tensor: &TensorInfo, range: (u64, usize), digest: u64) -> Result<()> {
        match self.seen.as_ref().and_then(|seen| seen.earlier(range)) {
            Some(earlier) if earlier == digest => Ok(()),
            Some(_) => Err(self.changed(tensor)),
            None => {
                self.check_unchanged(tensor)?;
                if let Some(seen) = &self.seen {
                    seen.record(range, digest);
                }
                Ok(())
            }
        }
    }

    /// Reads bytes from a position in the file, and passes every piece of them to `take`.
    fn pieces(
        &self,
        bytes: &mut [u8],
        (tensor, mut position): (&TensorInfo, u64),
        size: usize,
        cancel: &CancelToken,
        mut take: impl FnMut(&[u8]),
    ) -> Result<()> {
        for piece in bytes.chunks_mut(size) {
            cancel.check()?;
            self.file.read_exact_at(piece, position).map_err(|e| match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    Error::tensor(&self.path, &tensor.name, "the file was truncated while it was read")
                }
                _ => Error::io(&self.path, e),
            })?;
            take(piece);
            position += piece.len() as u64;
        }
        Ok(())
    }

    /// Returns an error if the file changed since it was opened. The check follows the read: a writer updates
    /// the times before it copies bytes.
    fn check_unchanged(&self, tensor: &TensorInfo) -> Result<()> {
        let now = self.file.metadata().map_err(|e| Error::io(&self.path, e))?;
        if self.revision.is_same(&Revision::of(&now)) { Ok(()) } else { Err(self.changed(tensor)) }
    }

    fn changed(&self, tensor: &TensorInfo) -> Error {
        Error::tensor(&self.path, &tensor.name, "the file changed after it was opened: load it again")
    }
}

/// Returns the tensors and the metadata of the header of a safetensors file.
fn header(path: &Path, file: &File, size: u64) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>)> {
    let mut length = [0; 8];
    if size < 8 {
        return Err(Error::format(path, format!("is not a safetensors file: only {size} bytes long")));
    }
    file.read_exact_at(&mut length, 0).map_err(|e| Error::io(path, e))?;
    let promised = u64::from_le_bytes(length);
    let fits = |&n: &usize| n <= MAX_HEADER && promised <= size - 8;
    let Some(length) = usize::try_from(promised).ok().filter(fits) else {
        let reason = format!(
            "is not a safetensors file or is truncated: header of {promised} bytes in a file of {size}"
        );
        return Err(Error::format(path, reason));
    };
    probe(length.saturating_mul(PARSED), "the header of a file")?;
    let mut header = zeros(length, "the header of a file")?;
    file.read_exact_at(&mut header, 8).map_err(|e| Error::io(path, e))?;
    let RawHeader { tensors: entries, metadata } = serde_json::from_slice(&header)
        .map_err(|e| Error::format(path, format!("has a malformed header: {e}")))?;
    Ok((check(path, entries, 8 + promised, size)?, metadata))
}
