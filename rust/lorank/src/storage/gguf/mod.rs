//! Reading of the headers of untrusted GGUF files, as llama.cpp writes them.
//!
//! A file begins with the letters `GGUF`, a version, the number of tensors, and the number of settings. Settings
//! have a key, a type, and a value; tensors have a name, dimensions from the innermost to the outermost, a type,
//! and a position. The bytes of the tensors follow at a multiple of the alignment. Everything is little-endian.
//!
//! A model may be split into files `NAME-00001-of-00003.gguf`: see [`split`].

mod cursor;
mod settings;
pub(crate) mod split;
mod types;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::exec::memory::probe;
use crate::storage::gguf::cursor::Cursor;
use crate::storage::gguf::settings::Settings;
use crate::storage::safetensors::{TensorInfo, check_apart};
use crate::{Error, Result};

/// The first bytes of every file.
const MAGIC: &[u8; 4] = b"GGUF";

/// Versions with lengths of 64 bits. Version 1 was in use for a few weeks.
const VERSIONS: [u32; 2] = [2, 3];

/// Largest number of dimensions. llama.cpp has 4.
const MAX_DIMENSIONS: u32 = 8;

/// Largest number of tensors. Stacks of experts are one tensor each, so that models have a few thousands.
const MAX_TENSORS: u64 = 1 << 20;

/// Smallest size of the entry of a tensor in the header.
const ENTRY: u64 = 24;

/// Memory in bytes for the entry of a tensor, and copies of it.
const PARSED: usize = 512;

const ALIGNMENT: u64 = 32;

/// Returns true if a file begins as a GGUF file does.
pub(crate) fn is_gguf(file: &File) -> std::io::Result<bool> {
    let mut first = [0; MAGIC.len()];
    match file.read_exact_at(&mut first, 0) {
        Ok(()) => Ok(first == *MAGIC),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

/// Returns the tensors in file order, and the settings as JSON texts, after checking the whole header.
///
/// Long arrays and long texts are not among the settings: vocabularies take most of a header.
pub(crate) fn header(
    path: &Path,
    file: &File,
    size: u64,
) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>)> {
    let mut cursor = Cursor::new(path, file, size);
    cursor.skip(MAGIC.len() as u64)?;
    let version = cursor.u32()?;
    if VERSIONS.iter().any(|&known| known.swap_bytes() == version) {
        return Err(Error::format(path, "is a big-endian GGUF file: convert it with gguf-convert-endian"));
    }
    if !VERSIONS.contains(&version) {
        let reason = format!("has version {version} of GGUF, expected 2 or 3: convert the model again");
        return Err(Error::format(path, reason));
    }
    let (tensors, settings) = (cursor.u64()?, cursor.u64()?);
    if tensors > MAX_TENSORS || tensors.saturating_mul(ENTRY) > cursor.remaining() {
        let reason = format!("announces {tensors} tensors in {size} bytes: it is truncated or damaged");
        return Err(Error::format(path, reason));
    }
    let settings = Settings::read(&mut cursor, settings)?;
    let alignment = settings.alignment(path)?.unwrap_or(ALIGNMENT);
    probe(usize::try_from(tensors).unwrap_or(usize::MAX).saturating_mul(PARSED), "the header of a file")?;
    let mut found = Vec::new();
    for _ in 0..tensors {
        found.push(tensor(&mut cursor)?);
    }
    let start = cursor.position().next_multiple_of(alignment);
    for info in &mut found {
        info.offset = start.saturating_add(info.offset);
    }
    delimit(&mut found, size);
    for info in &found {
        let end = info.offset.checked_add(info.len as u64);
        if end.is_none_or(|end| end > size) {
            let reason = format!(
                "its {} bytes at {} end beyond the {size} bytes of the file, which is truncated or damaged",
                info.len, info.offset
            );
            return Err(Error::tensor(path, &info.name, reason));
        }
        if !info.offset.is_multiple_of(alignment) {
            let reason = format!("begins at {}, which is no multiple of {alignment}", info.offset);
            return Err(Error::tensor(path, &info.name, reason));
        }
    }
    check_apart(path, &found)?;
    Ok((found, settings.texts))
}

/// Reads the entry of a tensor. Its offset is relative to the first tensor.
fn tensor(cursor: &mut Cursor<'_>) -> Result<TensorInfo> {
    let path = cursor.path();
    let name = cursor.name("tensor")?;
    let fail = |reason: String| Error::tensor(path, &name, reason);
    let dimensions = cursor.u32()?;
    if dimensions > MAX_DIMENSIONS {
        return Err(fail(format!("has {dimensions} dimensions, expected at most {MAX_DIMENSIONS}")));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let dimension = cursor.u64()?;
        let fits = usize::try_from(dimension).map_err(|_| fail(format!("dimension {dimension} overflows")));
        shape.push(fits?);
    }
    shape.reverse();
    let (dtype, sizes) = types::named(cursor.u32()?);
    let offset = cursor.u64()?;
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    let Some(elements) = elements else { return Err(fail(format!("shape {shape:?} overflows"))) };
    let Some((values, bytes)) = sizes else {
        return Ok(TensorInfo { name, dtype, shape, offset, len: UNKNOWN });
    };
    if !shape.last().unwrap_or(&1).is_multiple_of(values) {
        return Err(fail(format!("has shape {shape:?}, but {dtype} has blocks of {values} values of a row")));
    }
    let Some(len) = (elements / values).checked_mul(bytes).filter(|&len| len < UNKNOWN) else {
        return Err(fail(format!("shape {shape:?} overflows")));
    };
    Ok(TensorInfo { name, dtype, shape, offset, len })
}

/// Length of tensors of types whose size is not known, until [`delimit`] replaces it.
const UNKNOWN: usize = usize::MAX;

/// Ends tensors of types whose size is not known where the next tensor or the end of the file is.
fn delimit(tensors: &mut [TensorInfo], size: u64) {
    if tensors.iter().all(|info| info.len != UNKNOWN) {
        return;
    }
    let mut starts: Vec<u64> = tensors.iter().map(|info| info.offset).collect();
    starts.push(size);
    starts.sort_unstable();
    for info in tensors.iter_mut().filter(|info| info.len == UNKNOWN) {
        let next = starts[starts.partition_point(|&start| start <= info.offset).min(starts.len() - 1)];
        info.len = usize::try_from(next.saturating_sub(info.offset)).unwrap_or(UNKNOWN);
    }
}

#[cfg(test)]
mod tests;
