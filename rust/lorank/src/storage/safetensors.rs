//! Reading of untrusted safetensors files.
//!
//! A file consists of eight bytes for the length of the header, a JSON header, and the bytes of the tensors.
//! On opening, the whole header is checked: lengths, names, shapes, and offsets that exceed the file or
//! overlap. Tensors are then read by position into separate buffers. Files are not mapped into memory: memory
//! stays bounded, and a file that shrinks while it is read causes an error instead of a signal.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::exec::aligned_bytes::AlignedBytes;
use crate::exec::cancel::CancelToken;
use crate::{Error, Result};

/// Largest length of a header, in bytes. The reference implementation has the same limit.
const MAX_HEADER: usize = 100_000_000;

/// Number of bytes read between two polls of the cancel token.
const READ_CHUNK: usize = 64 << 20;

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

/// An open file with a checked header.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    tensors: Vec<TensorInfo>,
    positions: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The entries of the header in file order, including duplicates, which a map would hide.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), BTreeMap::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        metadata = texts(map.next_value()?);
                    } else {
                        let tensor = map
                            .next_value()
                            .map_err(|e| serde::de::Error::custom(format!("tensor `{name}`: {e}")))?;
                        tensors.push((name, tensor));
                    }
                }
                Ok(RawHeader { tensors, metadata })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Returns the entries that are strings. The format allows no others, but they are harmless and are ignored.
fn texts(metadata: serde_json::Value) -> BTreeMap<String, String> {
    let serde_json::Value::Object(entries) = metadata else { return BTreeMap::new() };
    let text = |(name, value)| match value {
        serde_json::Value::String(text) => Some((name, text)),
        _ => None,
    };
    entries.into_iter().filter_map(text).collect()
}

impl SafetensorsFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] if its header is inconsistent.
    pub fn open(path: &Path) -> Result<Self> {
        // Checked before opening, as opening a named pipe would block.
        if !std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_file() {
            return Err(Error::format(path, "is not a regular file"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
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
        let mut header = vec![0; length];
        file.read_exact_at(&mut header, 8).map_err(|e| Error::io(path, e))?;
        let RawHeader { tensors: entries, metadata } = serde_json::from_slice(&header)
            .map_err(|e| Error::format(path, format!("has a malformed header: {e}")))?;
        let tensors = check(path, entries, 8 + promised, size)?;
        let mut positions = HashMap::with_capacity(tensors.len());
        for (position, tensor) in tensors.iter().enumerate() {
            if positions.insert(tensor.name.clone(), position).is_some() {
                return Err(Error::tensor(path, &tensor.name, "appears twice in the header"));
            }
        }
        Ok(Self { path: path.to_path_buf(), file, tensors, positions, metadata })
    }

    /// Returns the path that was passed to [`open`](Self::open).
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the tensors in the order of the header.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Returns the entries of the header under `__metadata__`.
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
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| self.no_memory(tensor, len))?;
        bytes.resize(len, 0);
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
        let mut position = tensor.offset + start as u64;
        for chunk in bytes.chunks_mut(READ_CHUNK) {
            cancel.check()?;
            self.file.read_exact_at(chunk, position).map_err(|e| match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    Error::tensor(&self.path, &tensor.name, "the file was truncated while it was read")
                }
                _ => Error::io(&self.path, e),
            })?;
            position += chunk.len() as u64;
        }
        Ok(())
    }
}

/// Converts header entries to tensors, and checks that their bytes lie in the file and do not overlap.
fn check(
    path: &Path,
    entries: Vec<(String, RawTensor)>,
    data_start: u64,
    size: u64,
) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, raw) in entries {
        let fail = |reason: String| Err(Error::tensor(path, &name, reason));
        let (begin, end) = raw.data_offsets;
        let available = size - data_start;
        if begin > end || end > available {
            return fail(format!(
                "offsets {begin} to {end} in {available} bytes of data: the file is truncated or damaged"
            ));
        }
        let elements = raw.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
        let bits = elements.and_then(|n| n.checked_mul(bits_per_element(&raw.dtype).unwrap_or(0)));
        let Some(bits) = bits else {
            return fail(format!("shape {:?} overflows", raw.shape));
        };
        if bits_per_element(&raw.dtype).is_some() && bits.div_ceil(8) != end - begin {
            return fail(format!(
                "{} of shape {:?} needs {} bytes, its offsets span {}",
                raw.dtype,
                raw.shape,
                bits.div_ceil(8),
                end - begin
            ));
        }
        let Ok(len) = usize::try_from(end - begin) else {
            return fail(format!("its {} bytes are too many for this machine", end - begin));
        };
        let offset = data_start + begin;
        tensors.push(TensorInfo { dtype: raw.dtype, shape: raw.shape, offset, len, name });
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|t| t.len > 0).collect();
    by_offset.sort_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].len as u64 > pair[1].offset {
            let reason = format!("its bytes overlap those of `{}`", pair[0].name);
            return Err(Error::tensor(path, &pair[1].name, reason));
        }
    }
    Ok(tensors)
}

/// Returns the number of bits of an element, or `None` for unknown types. Tensors of unknown types can be
/// listed, but not loaded.
pub(crate) fn bits_per_element(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    })
}
