//! Writing of safetensors files, atomically ([`atomic_file`](crate::storage::atomic_file)).
//!
//! Tensors are converted in small pieces. The position of every tensor is fixed in advance, so that threads
//! can write different tensors.

mod header;
mod out_tensor;
mod recorded;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use faer::MatMut;

use crate::exec::cancel::CancelToken;
use crate::exec::memory::{with_capacity, zeros};
use crate::exec::panics::guarded;
use crate::exec::parallel::{pool_for, side_by_side};
use crate::matrix::MatrixView;
use crate::matrix::dtype::DType;
use crate::storage::atomic_file::{AtomicFile, Pending, Sink};
use crate::storage::digest::{self, DigestedTensor};
use crate::storage::rounding::{all_finite, encode, encode_all};
use crate::storage::source::Buffer;
use crate::storage::writer::header::{Header, header, layout};
use crate::storage::writer::recorded::Recorded;
use crate::{Error, Result};

pub use out_tensor::{Content, OutTensor};

/// Purpose of the memory of this module.
const MEMORY: &str = "the conversion of a tensor";

/// Number of elements converted at a time, which stay in cache.
const PIECE: usize = 1 << 16;

/// Number of bytes copied between polls of the cancel token: enough for few system calls, but not for seconds
/// of copying.
const COPIED: usize = 1 << 22;

/// Size in bytes of a run of consecutive tensors, which one thread writes.
const RUN: u64 = 1 << 20;

/// Writes a file of tensors and metadata with up to `threads` threads.
///
/// # Errors
/// [`Error::InvalidInput`] if a tensor is malformed or two have the same name, [`Error::Numerical`] for a
/// value that its type cannot represent (including NaN and infinities), [`Error::Io`],
/// [`Error::OutOfMemory`], [`Error::Cancelled`].
/// After an error the target is unchanged.
///
/// # Examples
/// ```
/// use std::collections::BTreeMap;
///
/// use lorank::cancel::CancelToken;
/// use lorank::dtype::DType;
/// use lorank::safetensors::SafetensorsFile;
/// use lorank::safetensors_writer::{Content, OutTensor, write};
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("w.safetensors");
/// let content = Content::F64 { values: &[1.0, 2.0], dtype: DType::Bf16 };
/// let tensor = OutTensor { name: "w".into(), shape: vec![2], content };
/// write(&path, &[tensor], &BTreeMap::new(), 1, &CancelToken::default()).unwrap();
/// assert_eq!(SafetensorsFile::open(&path).unwrap().tensors()[0].dtype, "BF16");
/// ```
pub fn write(
    path: &Path,
    tensors: &[OutTensor<'_>],
    metadata: &BTreeMap<String, String>,
    threads: usize,
    cancel: &CancelToken,
) -> Result<()> {
    write_all(path, tensors, metadata, None, threads, cancel).map(drop)
}

/// An entry of the metadata that states a digest of the file.
#[derive(Clone, Copy, Debug)]
pub struct Seal<'a> {
    /// The key of the entry.
    pub key: &'a str,
    /// Bytes that the digest covers in addition to the tensors.
    pub seed: &'a [u8],
}

/// Writes a file as [`write()`] does, with a digest of its tensors in the metadata; returns the digest, which
/// [`Checkpoint::digest`](crate::storage::checkpoint::Checkpoint::digest) computes from the file.
///
/// # Errors
/// The errors of [`write()`].
pub fn write_sealed(
    path: &Path,
    tensors: &[OutTensor<'_>],
    metadata: &BTreeMap<String, String>,
    seal: Seal<'_>,
    threads: usize,
    cancel: &CancelToken,
) -> Result<String> {
    let mut metadata = metadata.clone();
    metadata.insert(seal.key.to_owned(), NO_DIGEST.to_owned());
    let digest = write_all(path, tensors, &metadata, Some(seal), threads, cancel)?;
    digest.ok_or_else(|| Error::Internal("a sealed file has no digest".into()))
}

/// Takes the place of a digest until all tensors are written.
const NO_DIGEST: &str = "0000000000000000";

fn write_all(
    path: &Path,
    tensors: &[OutTensor<'_>],
    metadata: &BTreeMap<String, String>,
    seal: Option<Seal<'_>>,
    threads: usize,
    cancel: &CancelToken,
) -> Result<Option<String>> {
    let order = layout(tensors);
    let Header { text, offsets, size } = header(tensors, &order, metadata)?;
    let start = text.len() as u64;
    let file = AtomicFile::create(path, start + size)?;
    file.write_at(0, &text)?;
    let runs = runs(&order, &offsets);
    let digests: Vec<AtomicU64> = tensors.iter().map(|_| AtomicU64::new(0)).collect();
    let failure = Mutex::new(None);
    pool_for(threads, runs.len())?.install(|| {
        let stop = CancelToken::default();
        let all: Vec<usize> = (0..runs.len()).collect();
        side_by_side(&all, threads, &stop, &|k, Space { buffer, pending }: &mut Space| {
            let run = &order[runs[k].clone()];
            let mut write = |sink: &mut Sink<'_>| {
                run.iter().try_for_each(|&i| {
                    let mut out = Recorded::new(sink, seal.is_some());
                    write_tensor(&mut out, &tensors[i], buffer, cancel)?;
                    digests[i].store(out.digest(), Ordering::Relaxed);
                    Ok(())
                })
            };
            if let Err(error) = guarded(|| file.write_from(start + offsets[run[0]], pending, &mut write)) {
                stop.cancel();
                // Only the first error is returned: later errors follow from it or would recur.
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => return Err(error),
        None => cancel.check()?,
    }
    let digest = seal.map(|seal| stamped(&file, &text, seal, tensors, &digests)).transpose()?;
    file.finish()?;
    Ok(digest)
}

/// Writes the digest of all tensors to its place in the header, and returns it.
fn stamped(
    file: &AtomicFile<'_>,
    header: &[u8],
    seal: Seal<'_>,
    tensors: &[OutTensor<'_>],
    digests: &[AtomicU64],
) -> Result<String> {
    let digested = tensors.iter().zip(digests).map(|(tensor, digest)| DigestedTensor {
        name: &tensor.name,
        dtype: tensor.dtype(),
        shape: tensor.shape(),
        digest: digest.load(Ordering::Relaxed),
    });
    let digest = digest::of_file(seal.seed, digested.collect());
    // Within a text of the header, the quotation marks of this pattern would be escaped.
    let entry = format!("{}:\"{NO_DIGEST}\"", serde_json::Value::from(seal.key));
    let at = header.windows(entry.len()).position(|bytes| bytes == entry.as_bytes());
    let at = at.ok_or_else(|| Error::Internal("a sealed header has no place for the digest".into()))?;
    file.write_at((at + entry.len() - 1 - NO_DIGEST.len()) as u64, digest.as_bytes())?;
    Ok(digest)
}

/// Memory that a thread reuses for every tensor.
#[derive(Default)]
struct Space {
    buffer: Buffer,
    pending: Pending,
}

/// Divides the tensors into runs, each written by one thread. A run is a range of `order`. Long runs need few
/// writes; every write blocks the other threads.
fn runs(order: &[usize], offsets: &[u64]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (place, &i) in order.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if offsets[i] - offsets[order[run.start]] < RUN => run.end = place + 1,
            _ => runs.push(place..place + 1),
        }
    }
    runs
}

fn write_tensor(
    out: &mut Recorded<'_, '_>,
    tensor: &OutTensor<'_>,
    buffer: &mut Buffer,
    cancel: &CancelToken,
) -> Result<()> {
    match &tensor.content {
        Content::F64 { values, dtype } => {
            convert(out, tensor, &MatrixView::from_f64(values, 1, values.len())?, *dtype, cancel)
        }
        Content::F32 { values, dtype } => {
            convert(out, tensor, &MatrixView::from_f32(values, 1, values.len())?, *dtype, cancel)
        }
        Content::Values { matrix, dtype } => match matrix.computation() {
            Some(values) if matrix.dtype() == *dtype => {
                let path = out.path();
                out.put(matrix.size(), |place| {
                    values.compute(place, &mut buffer.parts, cancel)?;
                    if all_finite(place, *dtype) { Ok(()) } else { Err(not_finite(path, tensor)) }
                })
            }
            _ => matrix.with_view(buffer, cancel, |view| convert(out, tensor, view, *dtype, cancel)),
        },
        Content::Streamed { matrices, dtype } => {
            let (path, mut is_named) = (out.path(), false);
            let mut emit = |values: &[f64]| {
                let written = stream_out(out, tensor, values, *dtype);
                is_named = written.is_err();
                written
            };
            let streamed = matrices.iter().try_for_each(|matrix| matrix.stream(buffer, cancel, &mut emit));
            streamed.map_err(|error| match error {
                Error::Numerical(reason) if !is_named => {
                    Error::Numerical(format!("{}: tensor `{}`: {reason}", path.display(), tensor.name))
                }
                other => other,
            })
        }
        Content::Raw { bytes, .. } => bytes.chunks(COPIED).try_for_each(|piece| {
            cancel.check()?;
            out.bytes(piece)
        }),
        Content::Stored(stored) => (0..stored.info.len).step_by(COPIED).try_for_each(|start| {
            let len = COPIED.min(stored.info.len - start);
            out.bytes(stored.file.read_into(&mut buffer.bytes, &stored.info, start, len, cancel)?)
        }),
    }
}

fn not_finite(path: &Path, tensor: &OutTensor<'_>) -> Error {
    let (path, name) = (path.display(), &tensor.name);
    Error::Numerical(format!("{path}: tensor `{name}`: holds NaN or infinite values"))
}

/// Writes values, rounded once.
fn stream_out(
    out: &mut Recorded<'_, '_>,
    tensor: &OutTensor<'_>,
    values: &[f64],
    dtype: DType,
) -> Result<()> {
    let path = out.path();
    out.put(values.len() * dtype.size(), |place| {
        if encode_all(values, dtype, place) {
            return Ok(());
        }
        match values.iter().find(|x| !encode(**x, dtype, &mut Vec::new())) {
            Some(bad) if bad.is_finite() => Err(unfitting(path, tensor, *bad, dtype)),
            _ => Err(not_finite(path, tensor)),
        }
    })
}

fn unfitting(path: &Path, tensor: &OutTensor<'_>, bad: f64, dtype: DType) -> Error {
    let (path, name) = (path.display(), &tensor.name);
    Error::Numerical(format!("{path}: tensor `{name}`: {bad:e} does not fit into {}", dtype.name()))
}

/// Writes the rows of a view, piece by piece.
fn convert(
    out: &mut Recorded<'_, '_>,
    tensor: &OutTensor<'_>,
    view: &MatrixView<'_>,
    dtype: DType,
    cancel: &CancelToken,
) -> Result<()> {
    if let Some(bytes) = view.as_row_major_bytes()
        && view.dtype() == dtype
        && all_finite(bytes, dtype)
    {
        return bytes.chunks(COPIED).try_for_each(|piece| {
            cancel.check()?;
            out.bytes(piece)
        });
    }
    let (rows, cols) = (view.rows(), view.cols());
    let width = cols.clamp(1, PIECE);
    let height = PIECE / width;
    let mut values = zeros(width * height.min(rows), MEMORY)?;
    let mut bytes = with_capacity(values.len() * dtype.size(), MEMORY)?;
    for top in (0..rows).step_by(height) {
        for left in (0..cols).step_by(width) {
            cancel.check()?;
            let (block_rows, block_cols) = (top..rows.min(top + height), left..cols.min(left + width));
            let piece = &mut values[..block_rows.len() * block_cols.len()];
            let block = MatMut::from_row_major_slice_mut(&mut *piece, block_rows.len(), block_cols.len());
            view.upcast(block_rows, block_cols, 1.0, block);
            bytes.clear();
            if let Some(bad) = piece.iter().find(|&&x| !encode(x, dtype, &mut bytes)) {
                if !bad.is_finite() {
                    return Err(not_finite(out.path(), tensor));
                }
                return Err(unfitting(out.path(), tensor, *bad, dtype));
            }
            out.bytes(&bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
