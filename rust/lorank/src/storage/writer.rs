//! Writing safetensors files that appear whole or not at all ([`whole_file`](crate::storage::atomic_file)).
//!
//! Tensors are converted in small pieces. Where every tensor goes is known from the beginning, so that threads
//! work on different ones.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use faer::MatMut;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::exec::cancel::CancelToken;
use crate::exec::parallel::{guarded, pool, side_by_side};
use crate::matrix::MatrixView;
use crate::matrix::dtype::DType;
use crate::storage::atomic_file::{Pending, Sink, WholeFile};
use crate::storage::checkpoint::StoredTensor;
use crate::storage::rounding::{all_finite, encode};
use crate::storage::safetensors::bits_per_element;
use crate::storage::source::{Buffer, StoredMatrix};
use crate::{Error, Result};

/// Elements converted at a time: they stay in cache.
const PIECE: usize = 1 << 16;

/// Bytes copied at a time: fewer and larger calls, but not seconds without a look at the cancel token.
const COPIED: usize = 1 << 22;

/// Bytes of tensors that one thread writes together.
const RUN: u64 = 1 << 20;

/// The alignment of the data, which other readers expect.
const ALIGNMENT: usize = 8;

/// The header's one key that names no tensor.
const METADATA: &str = "__metadata__";

/// A tensor to be written.
#[derive(Debug)]
pub struct OutTensor<'a> {
    /// Its name.
    pub name: String,
    /// Its shape; for [`Content::Stored`] that of the stored tensor is taken.
    pub shape: Vec<usize>,
    /// Its values.
    pub content: Content<'a>,
}

/// Where a tensor's values come from.
#[derive(Debug)]
pub enum Content<'a> {
    /// Row-major values, rounded as those of [`Values`](Self::Values).
    F64 {
        /// As many as the shape says.
        values: &'a [f64],
        /// What they become.
        dtype: DType,
    },
    /// Row-major values, rounded as those of [`Values`](Self::Values).
    F32 {
        /// As many as the shape says.
        values: &'a [f32],
        /// What they become.
        dtype: DType,
    },
    /// A matrix's rows one after the other, rounded to the nearest of `dtype` (F64, F32, F16 or BF16), halves
    /// to even.
    Values {
        /// As many as the shape says, in any layout of their own.
        matrix: &'a StoredMatrix,
        /// What they become.
        dtype: DType,
    },
    /// Bytes as they are.
    Raw {
        /// As many as shape and type say.
        bytes: &'a [u8],
        /// The type by the header's name.
        dtype: String,
    },
    /// The bytes of another file's tensor, piece by piece.
    Stored(&'a StoredTensor),
}

impl OutTensor<'_> {
    fn dtype(&self) -> &str {
        match &self.content {
            Content::F64 { dtype, .. } | Content::F32 { dtype, .. } | Content::Values { dtype, .. } => {
                match dtype {
                    DType::F64 => "F64",
                    DType::F32 => "F32",
                    DType::F16 => "F16",
                    DType::Bf16 => "BF16",
                    DType::F8E4M3 | DType::F8E5M2 => "",
                }
            }
            Content::Raw { dtype, .. } => dtype,
            Content::Stored(tensor) => &tensor.info.dtype,
        }
    }

    fn shape(&self) -> &[usize] {
        if let Content::Stored(tensor) = &self.content { &tensor.info.shape } else { &self.shape }
    }

    /// Bytes that it takes, if everything about it fits together.
    fn checked_len(&self) -> Result<usize> {
        let fail = |reason: String| Err(Error::InvalidInput(format!("tensor `{}`: {reason}", self.name)));
        if let Content::Stored(tensor) = &self.content {
            return Ok(tensor.info.len);
        }
        let Some(bits) = bits_per_element(self.dtype()) else {
            return fail(format!("cannot be written as `{}`", self.dtype()));
        };
        let elements = self.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let sizes = elements.and_then(|n| Some((n, (n as u64).checked_mul(bits)?.div_ceil(8))));
        let Some((elements, len)) = sizes else {
            return fail(format!("shape {:?} overflows", self.shape));
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let given = match &self.content {
            Content::F64 { values, .. } => values.len() == elements,
            Content::F32 { values, .. } => values.len() == elements,
            Content::Values { matrix, .. } => {
                let (rows, cols) = matrix.shape();
                rows.checked_mul(cols) == Some(elements)
            }
            Content::Raw { bytes, .. } => bytes.len() == len,
            Content::Stored(_) => true,
        };
        if given { Ok(len) } else { fail(format!("its values do not fill shape {:?}", self.shape)) }
    }
}

/// Writes a file of tensors and metadata with up to `threads` threads.
///
/// # Errors
/// [`Error::InvalidInput`] if a tensor is malformed or named twice, [`Error::Numerical`] for a value
/// that its type cannot hold (NaN and infinities included), [`Error::Io`], [`Error::Cancelled`]. The
/// target is then as it was.
pub fn write(
    path: &Path,
    tensors: &[OutTensor<'_>],
    metadata: &BTreeMap<String, String>,
    threads: usize,
    cancel: &CancelToken,
) -> Result<()> {
    let order = layout(tensors);
    let Header { text, offsets, size } = header(tensors, &order, metadata)?;
    let start = text.len() as u64;
    let file = WholeFile::create(path, start + size)?;
    file.write_at(0, &text)?;
    let runs = runs(&order, &offsets);
    let failure = Mutex::new(None);
    pool(threads.min(runs.len()))?.install(|| {
        let stop = CancelToken::default();
        let all: Vec<usize> = (0..runs.len()).collect();
        side_by_side(&all, threads, &stop, &|k, Space { buffer, pending }: &mut Space| {
            let run = &order[runs[k].clone()];
            let mut write = |sink: &mut Sink<'_>| {
                run.iter().try_for_each(|&i| write_tensor(sink, &tensors[i], buffer, cancel))
            };
            if let Err(error) = guarded(|| file.write_from(start + offsets[run[0]], pending, &mut write)) {
                stop.cancel();
                // The first is the one to tell of; what others meet follows from it, or will be met again.
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => return Err(error),
        None => cancel.check()?,
    }
    file.finish()
}

/// What a thread keeps from one tensor to the next.
#[derive(Default)]
struct Space {
    buffer: Buffer,
    pending: Pending,
}

/// Neighbours in the file that one thread writes, as ranges of `order`: few and large writes, as every one
/// holds up the other threads.
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

/// Wide elements first, then by name, as the format's own library does: every tensor is aligned.
fn layout(tensors: &[OutTensor<'_>]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let width = |i: usize| bits_per_element(tensors[i].dtype()).unwrap_or(0);
    order.sort_by(|&i, &j| width(j).cmp(&width(i)).then_with(|| tensors[i].name.cmp(&tensors[j].name)));
    order
}

/// A JSON object in the order given; a map of `serde_json` would sort its keys.
struct Entries<'a>(Vec<(&'a str, Value)>);

impl Serialize for Entries<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// What a file begins with.
struct Header {
    /// With its own length before it.
    text: Vec<u8>,
    /// Where the bytes of every tensor begin after it.
    offsets: Vec<u64>,
    /// Of all of them.
    size: u64,
}

fn header(tensors: &[OutTensor<'_>], order: &[usize], metadata: &BTreeMap<String, String>) -> Result<Header> {
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push((METADATA, json!(metadata)));
    }
    let mut names = HashSet::with_capacity(tensors.len());
    let mut offset = 0u64;
    let mut offsets = vec![0; tensors.len()];
    for &i in order {
        offsets[i] = offset;
        let tensor = &tensors[i];
        if tensor.name == METADATA {
            // A reader would take its entry for metadata, and the tensor would be lost.
            return Err(Error::InvalidInput(format!("tensor `{METADATA}`: the format reserves that name")));
        }
        if !names.insert(tensor.name.as_str()) {
            return Err(Error::InvalidInput(format!("two tensors are named `{}`", tensor.name)));
        }
        let end = offset + tensor.checked_len()? as u64;
        let entry = json!({"dtype": tensor.dtype(), "shape": tensor.shape(), "data_offsets": [offset, end]});
        entries.push((&tensor.name, entry));
        offset = end;
    }
    let mut text = vec![0; size_of::<u64>()];
    serde_json::to_writer(&mut text, &Entries(entries)).map_err(|e| Error::InvalidInput(e.to_string()))?;
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    let len = (text.len() - size_of::<u64>()) as u64;
    text[..size_of::<u64>()].copy_from_slice(&len.to_le_bytes());
    Ok(Header { text, offsets, size: offset })
}

fn write_tensor(
    out: &mut Sink<'_>,
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

/// Writes the rows of a view, piece by piece.
fn convert(
    out: &mut Sink<'_>,
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
    let mut values = vec![0.0; width * height.min(rows)];
    let mut bytes = Vec::with_capacity(values.len() * dtype.size());
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
                let (path, name) = (out.path().display(), &tensor.name);
                let reason = format!("{bad:e} does not fit into {}", dtype.name());
                return Err(Error::Numerical(format!("{path}: tensor `{name}`: {reason}")));
            }
            out.bytes(&bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::storage::checkpoint::Checkpoint;
    use crate::storage::safetensors::SafetensorsFile;
    use crate::storage::source::{Computed, Parts};

    fn stored(values: &[f32]) -> StoredMatrix {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        StoredMatrix::in_memory(Arc::new(bytes), DType::F32, (1, values.len()), (values.len(), 1)).unwrap()
    }

    fn f32s<'a>(name: &str, matrix: &'a StoredMatrix, dtype: DType) -> OutTensor<'a> {
        let shape = vec![matrix.shape().1];
        OutTensor { name: name.into(), shape, content: Content::Values { matrix, dtype } }
    }

    fn f64s<'a>(name: &str, values: &'a [f64], dtype: DType) -> OutTensor<'a> {
        OutTensor { name: name.into(), shape: vec![values.len()], content: Content::F64 { values, dtype } }
    }

    fn read(file: &SafetensorsFile, name: &str) -> Vec<u8> {
        let info = &file.tensors()[file.position(name).unwrap()];
        file.read(info, 0, info.len, &CancelToken::default()).unwrap()
    }

    fn written(folder: &Path, tensors: &[OutTensor<'_>]) -> SafetensorsFile {
        let metadata = BTreeMap::from([("format".to_owned(), "pt \"quoted\"".to_owned())]);
        let path = folder.join("out.safetensors");
        write(&path, tensors, &metadata, 3, &CancelToken::default()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.metadata(), &metadata);
        file
    }

    #[test]
    fn every_content_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let raw = OutTensor {
            name: "ids".into(),
            shape: vec![2, 2],
            content: Content::Raw { bytes: &[1, 0, 2, 0, 3, 0, 4, 0], dtype: "I16".into() },
        };
        // Two columns of a 2 x 2 matrix, swapped by its strides.
        let bytes: Vec<u8> = [0.1f64, 3.0, -2.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let transposed = StoredMatrix::in_memory(Arc::new(bytes), DType::F64, (2, 2), (1, 2)).unwrap();
        let content = Content::Values { matrix: &transposed, dtype: DType::F64 };
        let wide = OutTensor { name: "wide \u{1f600}".into(), shape: vec![2, 1, 2], content };
        let (eight, nothing) = (stored(&[8.0]), stored(&[]));
        let scalar = OutTensor { shape: vec![], ..f32s("alpha", &eight, DType::F32) };
        let empty = OutTensor { shape: vec![0, 3], ..f32s("none", &nothing, DType::F32) };
        let singles = Content::F32 { values: &[0.1, -0.5], dtype: DType::F64 };
        let singles = OutTensor { name: "singles".into(), shape: vec![1, 2, 1], content: singles };
        let doubles = f64s("doubles", &[0.1, 1.0], DType::F32);
        let file = written(folder.path(), &[raw, scalar, empty, wide, singles, doubles]);
        let expected: Vec<u8> = [0.1f32, -0.5].iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
        assert_eq!(read(&file, "singles"), expected);
        assert_eq!(read(&file, "doubles"), [0.1f32, 1.0].map(f32::to_le_bytes).concat());
        assert_eq!(read(&file, "ids"), [1, 0, 2, 0, 3, 0, 4, 0]);
        let expected: Vec<u8> = [0.1f64, -2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(read(&file, "wide \u{1f600}"), expected);
        assert_eq!(read(&file, "alpha"), 8f32.to_le_bytes());
        assert_eq!(file.tensors()[file.position("alpha").unwrap()].shape, Vec::<usize>::new());
        for tensor in file.tensors() {
            assert_eq!(tensor.offset * 8 % bits_per_element(&tensor.dtype).unwrap(), 0, "aligned");
        }
        // A copy of a file's tensor, even onto the file itself.
        let checkpoint = Checkpoint::open(file.path()).unwrap();
        let ids = checkpoint.tensors.iter().find(|t| t.info.name == "ids").unwrap();
        let copy = OutTensor { name: "copied".into(), shape: vec![], content: Content::Stored(ids) };
        let again = written(folder.path(), &[copy]);
        assert_eq!(again.tensors()[0].shape, [2, 2]);
        assert_eq!(read(&again, "copied"), [1, 0, 2, 0, 3, 0, 4, 0]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }

    /// Metadata first, then wide elements first, whatever the alphabet says.
    #[test]
    fn the_header_is_in_the_order_of_the_data() {
        let folder = tempfile::tempdir().unwrap();
        let file = written(
            folder.path(),
            &[
                f64s("A", &[1.0, 2.0], DType::F16),
                f64s("d", &[3.0], DType::F32),
                f64s("c", &[4.0], DType::F32),
                f64s("z", &[5.0], DType::F64),
            ],
        );
        let names: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["z", "c", "d", "A"]);
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(bytes[8..].starts_with(b"{\"__metadata__\":{\"format\""));
        let mut next = file.tensors()[0].offset;
        assert_eq!(next % 8, 0);
        for tensor in file.tensors() {
            assert_eq!(tensor.offset, next);
            next += tensor.len as u64;
        }
        assert_eq!(next, bytes.len() as u64);
    }

    /// Late enough for earlier tensors to be on disk, in the very file that is copied from.
    #[test]
    fn a_file_survives_a_failed_rewrite_of_itself() {
        let folder = tempfile::tempdir().unwrap();
        let values = vec![1.5; 2 * PIECE];
        let file = written(folder.path(), &[f64s("a", &values, DType::F32)]);
        let before = std::fs::read(file.path()).unwrap();
        let kept = Checkpoint::open(file.path()).unwrap().tensors.remove(0);
        let mut bad = vec![1.0; PIECE + 1];
        bad[PIECE] = -1e300;
        let tensors = [
            OutTensor { name: "kept".into(), shape: vec![], content: Content::Stored(&kept) },
            f64s("bad", &bad, DType::F16),
        ];
        let error = write(file.path(), &tensors, &BTreeMap::new(), 2, &CancelToken::default()).unwrap_err();
        assert!(matches!(error, Error::Numerical(_)));
        assert!(error.to_string().contains("out.safetensors: tensor `bad`: -1e300"), "{error}");
        assert!(std::fs::read(file.path()).unwrap() == before, "bit by bit");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn failures_leave_the_target_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        std::fs::write(&path, b"precious").unwrap();
        let cancelled = CancelToken::default();
        cancelled.cancel();
        let good = stored(&[1.0]);
        let fail = |tensors: &[OutTensor<'_>], cancel: &CancelToken| {
            let error = write(&path, tensors, &BTreeMap::new(), 2, cancel).unwrap_err();
            assert_eq!(std::fs::read(&path).unwrap(), b"precious");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
            error
        };
        let go = CancelToken::default();
        assert!(matches!(fail(&[f32s("a", &good, DType::F32)], &cancelled), Error::Cancelled));
        for (value, dtype, reason) in [
            (65520.0, DType::F16, "does not fit into float16"),
            (f32::MAX, DType::Bf16, "does not fit into bfloat16"),
            (f32::NAN, DType::F32, "holds NaN or infinite values"),
        ] {
            let error = fail(&[f32s("big", &stored(&[value]), dtype)], &go).to_string();
            assert!(error.contains("out.safetensors: tensor `big`") && error.contains(reason), "{error}");
        }
        let twice = [f32s("a", &good, DType::F32), f32s("a", &good, DType::F16)];
        assert!(fail(&twice, &go).to_string().contains("two tensors are named `a`"));
        let short = OutTensor { shape: vec![2, 2], ..f32s("a", &good, DType::F32) };
        assert!(fail(&[short], &go).to_string().contains("do not fill shape [2, 2]"));
        for shape in [vec![usize::MAX, 2], vec![usize::MAX], vec![1 << 62]] {
            let huge = OutTensor { shape, ..f32s("a", &good, DType::F32) };
            let error = fail(&[huge], &go).to_string();
            assert!(error.contains("`a`: shape") && error.contains("overflows"), "{error}");
        }
        let reserved = fail(&[f32s("__metadata__", &good, DType::F32)], &go);
        assert!(matches!(reserved, Error::InvalidInput(ref reason) if reason.contains("reserves")));
        assert!(fail(&[f32s("a", &good, DType::F8E4M3)], &go).to_string().contains("cannot be written"));
        let nowhere = folder.path().join("none/out.safetensors");
        assert!(matches!(write(&nowhere, &[], &BTreeMap::new(), 1, &go), Err(Error::Io { .. })));
    }

    /// As many threes, and a last number.
    struct Threes(f32);

    impl Computed for Threes {
        fn compute(&self, out: &mut [u8], _: &mut Parts, cancel: &CancelToken) -> Result<()> {
            cancel.check()?;
            let (last, others) = out.as_chunks_mut().0.split_last_mut().unwrap();
            others.fill(3f32.to_le_bytes());
            *last = self.0.to_le_bytes();
            Ok(())
        }
    }

    #[test]
    fn values_are_computed_as_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let computed = |last| StoredMatrix::computed(Arc::new(Threes(last)), DType::F32, (2, 2));
        let (good, bad) = (computed(5.0), computed(f32::INFINITY));
        let tensor = |name: &str, matrix, dtype| OutTensor {
            name: name.into(),
            shape: vec![2, 2],
            content: Content::Values { matrix, dtype },
        };
        let given =
            [tensor("a", &good, DType::F32), tensor("b", &good, DType::F16), tensor("c", &good, DType::F32)];
        let file = written(folder.path(), &given);
        let expected = [3f32, 3.0, 3.0, 5.0];
        assert_eq!(read(&file, "a"), expected.map(f32::to_le_bytes).concat());
        assert_eq!(read(&file, "b"), expected.map(|x| half::f16::from_f32(x).to_le_bytes()).concat());
        assert_eq!(read(&file, "c"), read(&file, "a"));
        let before = std::fs::read(file.path()).unwrap();
        for dtype in [DType::F32, DType::Bf16] {
            let tensors = [tensor("a", &good, DType::F32), tensor("bad", &bad, dtype)];
            let error =
                write(file.path(), &tensors, &BTreeMap::new(), 1, &CancelToken::default()).unwrap_err();
            let said = "out.safetensors: tensor `bad`: holds NaN or infinite values";
            assert!(matches!(error, Error::Numerical(_)) && error.to_string().contains(said), "{error}");
            assert!(std::fs::read(file.path()).unwrap() == before);
        }
    }

    proptest! {
        #[test]
        fn any_names_shapes_and_values(tensors in prop::collection::btree_map("(?s).{0,12}|[\"\\\\\n{}]{1,3}",
            (prop::collection::vec(0usize..4, 0..4), prop::array::uniform27(-1e30f64..1e30)), 1..8),
            metadata in prop::collection::btree_map("(?s).{0,5}", "(?s).{0,9}", 0..3))
        {
            let folder = tempfile::tempdir().unwrap();
            let tensors: Vec<_> = tensors.iter().filter(|(name, _)| *name != METADATA).collect();
            let out: Vec<OutTensor<'_>> = tensors.iter().map(|(name, (shape, values))| {
                let values = &values[..shape.iter().product()];
                let content = Content::F64 { values, dtype: DType::F64 };
                OutTensor { name: (*name).clone(), shape: shape.clone(), content }
            }).collect();
            let path = folder.path().join("any");
            write(&path, &out, &metadata, 3, &CancelToken::default()).unwrap();
            let file = SafetensorsFile::open(&path).unwrap();
            prop_assert_eq!(file.metadata(), &metadata);
            prop_assert_eq!(file.tensors().len(), tensors.len());
            for (name, (shape, values)) in &tensors {
                let found = &file.tensors()[file.position(name).unwrap()];
                let values = &values[..shape.iter().product()];
                prop_assert_eq!((&found.shape, found.offset % 8), (shape, 0));
                prop_assert_eq!(read(&file, name), values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
            }
        }
    }

    #[test]
    fn many_pieces_are_one_tensor() {
        let folder = tempfile::tempdir().unwrap();
        #[allow(clippy::cast_precision_loss)]
        let values: Vec<f32> = (0..2 * PIECE + 7).map(|i| i as f32).collect();
        let file = Arc::new(written(folder.path(), &[f32s("a", &stored(&values), DType::F32)]));
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(read(&file, "a") == bytes);
    }
}
