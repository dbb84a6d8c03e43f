//! Writing safetensors files that appear whole or not at all.
//!
//! Tensors are converted in small pieces into a hidden file beside the target, which is renamed onto it
//! at the end: an error, a full disk or an interruption leaves the target as it was.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use faer::MatMut;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::cancel::CancelToken;
use crate::checkpoint::StoredTensor;
use crate::dtype::DType;
use crate::matrix::MatrixView;
use crate::safetensors::bits_per_element;
use crate::source::StoredMatrix;
use crate::{Error, Result};

/// Elements converted, and bytes copied, at a time.
const PIECE: usize = 1 << 18;

/// The alignment of the data, which other readers expect.
const ALIGNMENT: usize = 8;

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
    /// Row-major values, rounded to the nearest of `dtype` (F64, F32, F16 or BF16), halves to even.
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
            Content::Values { dtype, .. } => match dtype {
                DType::F64 => "F64",
                DType::F32 => "F32",
                DType::F16 => "F16",
                DType::Bf16 => "BF16",
                DType::F8E4M3 | DType::F8E5M2 => "",
            },
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
        let Some(elements) = elements else {
            return fail(format!("shape {:?} overflows", self.shape));
        };
        let bits = elements as u64 * bits;
        let len = usize::try_from(bits.div_ceil(8)).unwrap_or(usize::MAX);
        let given = match &self.content {
            Content::Values { matrix, .. } => matrix.shape().0 * matrix.shape().1 == elements,
            Content::Raw { bytes, .. } => bytes.len() == len,
            Content::Stored(_) => true,
        };
        if given { Ok(len) } else { fail(format!("its values do not fill shape {:?}", self.shape)) }
    }
}

/// Writes a file of tensors and metadata.
///
/// # Errors
/// [`Error::InvalidInput`] if a tensor is malformed or named twice, [`Error::Numerical`] for a value
/// that its type cannot hold (NaN and infinities included), [`Error::Io`], [`Error::Cancelled`]. The
/// target is then as it was.
pub fn write(
    path: &Path,
    tensors: &[OutTensor<'_>],
    metadata: &BTreeMap<String, String>,
    cancel: &CancelToken,
) -> Result<()> {
    let order = layout(tensors);
    let header = header(tensors, &order, metadata)?;
    let temporary = Temporary::create(path)?;
    let mut out = Sink { path, file: BufWriter::with_capacity(1 << 20, &temporary.file) };
    out.bytes(&(header.len() as u64).to_le_bytes())?;
    out.bytes(&header)?;
    for &i in &order {
        write_tensor(&mut out, &tensors[i], cancel)?;
    }
    out.file.flush().map_err(|e| Error::io(path, e))?;
    drop(out);
    temporary.rename(path)
}

/// Wide elements first, then by name, as the format's own library does: every tensor is aligned.
fn layout(tensors: &[OutTensor<'_>]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let width = |i: usize| bits_per_element(tensors[i].dtype()).unwrap_or(0);
    order.sort_by(|&i, &j| width(j).cmp(&width(i)).then_with(|| tensors[i].name.cmp(&tensors[j].name)));
    order
}

fn header(
    tensors: &[OutTensor<'_>],
    order: &[usize],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0u64;
    for &i in order {
        let tensor = &tensors[i];
        let end = offset + tensor.checked_len()? as u64;
        let entry = json!({"dtype": tensor.dtype(), "shape": tensor.shape(), "data_offsets": [offset, end]});
        if entries.insert(tensor.name.clone(), entry).is_some() {
            return Err(Error::InvalidInput(format!("two tensors are named `{}`", tensor.name)));
        }
        offset = end;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    Ok(header)
}

fn write_tensor(out: &mut Sink<'_>, tensor: &OutTensor<'_>, cancel: &CancelToken) -> Result<()> {
    match &tensor.content {
        Content::Values { matrix, dtype } => {
            let mut buffer = Vec::new();
            matrix.with_view(&mut buffer, cancel, |view| convert(out, tensor, view, *dtype, cancel))
        }
        Content::Raw { bytes, .. } => bytes.chunks(PIECE).try_for_each(|piece| {
            cancel.check()?;
            out.bytes(piece)
        }),
        Content::Stored(stored) => {
            let mut buffer = Vec::new();
            (0..stored.info.len).step_by(PIECE).try_for_each(|start| {
                let len = PIECE.min(stored.info.len - start);
                stored.file.read_into(&mut buffer, &stored.info, start, len, cancel)?;
                out.bytes(&buffer)
            })
        }
    }
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
        return bytes.chunks(PIECE).try_for_each(|piece| {
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
                return Err(Error::Numerical(format!(
                    "{}: tensor `{}`: {bad:e} does not fit into {}",
                    out.path.display(),
                    tensor.name,
                    dtype.name()
                )));
            }
            out.bytes(&bytes)?;
        }
    }
    Ok(())
}

/// Whether no exponent is all ones.
fn all_finite(bytes: &[u8], dtype: DType) -> bool {
    // In blocks without an early exit within, so that the loop vectorises.
    fn none<const N: usize>(bytes: &[u8], is_special: impl Fn([u8; N]) -> bool) -> bool {
        let blocks = bytes.as_chunks::<N>().0.chunks(1024);
        blocks.into_iter().all(|block| !block.iter().fold(false, |any, &b| any | is_special(b)))
    }
    match dtype {
        DType::F64 => none::<8>(bytes, |b| !f64::from_le_bytes(b).is_finite()),
        DType::F32 => none::<4>(bytes, |b| !f32::from_le_bytes(b).is_finite()),
        DType::F16 => none::<2>(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::Bf16 => none::<2>(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::F8E4M3 | DType::F8E5M2 => false,
    }
}

/// Appends one element, rounded once; whether it is finite before and after.
fn encode(x: f64, dtype: DType, out: &mut Vec<u8>) -> bool {
    #[allow(clippy::cast_possible_truncation)] // Rounding is the point.
    match dtype {
        DType::F64 => {
            out.extend_from_slice(&x.to_le_bytes());
            x.is_finite()
        }
        DType::F32 => {
            let y = x as f32;
            out.extend_from_slice(&y.to_le_bytes());
            y.is_finite()
        }
        DType::F16 => {
            let y = f16::from_f32(to_odd(x));
            out.extend_from_slice(&y.to_le_bytes());
            y.is_finite()
        }
        DType::Bf16 => {
            let y = bf16::from_f32(to_odd(x));
            out.extend_from_slice(&y.to_le_bytes());
            y.is_finite()
        }
        DType::F8E4M3 | DType::F8E5M2 => false,
    }
}

/// Float32 with a last bit of 1 wherever it is not exact: rounding that to a type with at least two
/// bits less gives what rounding `x` itself would, where rounding twice would not.
#[allow(clippy::cast_possible_truncation)]
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let is_exact = f64::from(nearest).to_bits() == x.to_bits();
    if is_exact || !nearest.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    // Even and inexact: the odd neighbour on the other side of `x`.
    let away_from_zero = f64::from(nearest).abs() < x.abs();
    f32::from_bits(if away_from_zero { nearest.to_bits() + 1 } else { nearest.to_bits() - 1 })
}

struct Sink<'a> {
    path: &'a Path,
    file: BufWriter<&'a File>,
}

impl Sink<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(self.path, e))
    }
}

/// A hidden file beside the target, removed unless it is renamed.
struct Temporary {
    path: PathBuf,
    file: File,
    keep: bool,
}

impl Temporary {
    fn create(target: &Path) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = target.with_file_name(format!(".{name}.{}.{number}", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        Ok(Self { file: file.map_err(|e| Error::io(target, e))?, path, keep: false })
    }

    fn rename(mut self, target: &Path) -> Result<()> {
        std::fs::rename(&self.path, target).map_err(|e| Error::io(target, e))?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed cannot be helped: the error that led here is on its way.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::safetensors::SafetensorsFile;

    fn stored(values: &[f32]) -> StoredMatrix {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        StoredMatrix::in_memory(Arc::new(bytes), DType::F32, (1, values.len()), (values.len(), 1)).unwrap()
    }

    fn f32s<'a>(name: &str, matrix: &'a StoredMatrix, dtype: DType) -> OutTensor<'a> {
        let shape = vec![matrix.shape().1];
        OutTensor { name: name.into(), shape, content: Content::Values { matrix, dtype } }
    }

    fn read(file: &SafetensorsFile, name: &str) -> Vec<u8> {
        let info = &file.tensors()[file.position(name).unwrap()];
        file.read(info, 0, info.len, &CancelToken::default()).unwrap()
    }

    fn written(folder: &Path, tensors: &[OutTensor<'_>]) -> SafetensorsFile {
        let metadata = BTreeMap::from([("format".to_owned(), "pt \"quoted\"".to_owned())]);
        let path = folder.join("out.safetensors");
        write(&path, tensors, &metadata, &CancelToken::default()).unwrap();
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
        let file = written(folder.path(), &[raw, scalar, empty, wide]);
        assert_eq!(read(&file, "ids"), [1, 0, 2, 0, 3, 0, 4, 0]);
        let expected: Vec<u8> = [0.1f64, -2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(read(&file, "wide \u{1f600}"), expected);
        assert_eq!(read(&file, "alpha"), 8f32.to_le_bytes());
        assert_eq!(file.tensors()[file.position("alpha").unwrap()].shape, Vec::<usize>::new());
        for tensor in file.tensors() {
            assert_eq!(tensor.offset % 2, 0, "aligned");
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

    #[test]
    fn failures_leave_the_target_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        std::fs::write(&path, b"precious").unwrap();
        let cancelled = CancelToken::default();
        cancelled.cancel();
        let good = stored(&[1.0]);
        let fail = |tensors: &[OutTensor<'_>], cancel: &CancelToken| {
            let error = write(&path, tensors, &BTreeMap::new(), cancel).unwrap_err();
            assert_eq!(std::fs::read(&path).unwrap(), b"precious");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
            error
        };
        let go = CancelToken::default();
        assert!(matches!(fail(&[f32s("a", &good, DType::F32)], &cancelled), Error::Cancelled));
        for (value, dtype) in [(65520.0, DType::F16), (f32::MAX, DType::Bf16), (f32::NAN, DType::F32)] {
            let error = fail(&[f32s("big", &stored(&[value]), dtype)], &go).to_string();
            assert!(
                error.contains("out.safetensors: tensor `big`") && error.contains(dtype.name()),
                "{error}"
            );
        }
        let twice = [f32s("a", &good, DType::F32), f32s("a", &good, DType::F16)];
        assert!(fail(&twice, &go).to_string().contains("two tensors are named `a`"));
        let short = OutTensor { shape: vec![2, 2], ..f32s("a", &good, DType::F32) };
        assert!(fail(&[short], &go).to_string().contains("do not fill shape [2, 2]"));
        let huge = OutTensor { shape: vec![usize::MAX, 2], ..f32s("a", &good, DType::F32) };
        assert!(fail(&[huge], &go).to_string().contains("overflows"));
        assert!(fail(&[f32s("a", &good, DType::F8E4M3)], &go).to_string().contains("cannot be written"));
        let nowhere = folder.path().join("none/out.safetensors");
        assert!(matches!(write(&nowhere, &[], &BTreeMap::new(), &go), Err(Error::Io { .. })));
    }

    #[test]
    fn halfway_cases_go_to_even_and_nothing_is_rounded_twice() {
        let encoded = |x: f64, dtype| {
            let mut out = Vec::new();
            assert!(encode(x, dtype, &mut out));
            u16::from_le_bytes([out[0], out[1]])
        };
        let ulp = 2f64.powi(-10); // of float16 at 1
        assert_eq!(encoded(1.0 + ulp / 2.0, DType::F16), f16::from_f32(1.0).to_bits());
        assert_eq!(encoded(1.0 + 1.5 * ulp, DType::F16), f16::from_f64(1.0 + 2.0 * ulp).to_bits());
        // Just above halfway, by less than float32 shows: rounded by way of float32 it would fall to 1.
        assert_eq!(encoded(1.0 + ulp / 2.0 + 1e-12, DType::F16), f16::from_f32(1.0).to_bits() + 1);
        assert_eq!(encoded(1.0 + ulp / 2.0 - 1e-12, DType::F16), f16::from_f32(1.0).to_bits());
        let ulp = 2f64.powi(-7);
        assert_eq!(encoded(1.0 + ulp / 2.0 + 1e-12, DType::Bf16), bf16::from_f32(1.0).to_bits() + 1);
        assert_eq!(encoded(2f64.powi(-25) * (1.0 + 1e-12), DType::F16), 1, "the smallest subnormal");
    }

    proptest! {
        /// Against the nearest of all values of the type.
        #[test]
        fn narrow_types_hold_the_nearest_value(x in prop_oneof![-70000f64..70000.0, -1f64..1.0, -1e-6f64..1e-6]) {
            let mut out = Vec::new();
            if encode(x, DType::F16, &mut out) {
                let got = f16::from_le_bytes([out[0], out[1]]);
                for step in [-1i32, 1] {
                    let neighbour = f16::from_bits(u16::try_from(i32::from(got.to_bits()) + step).unwrap_or(0));
                    let (mine, other) = ((got.to_f64() - x).abs(), (neighbour.to_f64() - x).abs());
                    prop_assert!(!neighbour.is_finite() || mine < other || (mine <= other && got.to_bits() & 1 == 0)
                        || got.to_f64() == 0.0, "{x:e} {got}");
                }
            } else {
                prop_assert!(x.abs() >= 65520.0);
            }
        }

        #[test]
        fn any_names_and_values(tensors in prop::collection::btree_map(".{1,12}",
            prop::collection::vec(-1e30f32..1e30, 0..40), 1..8))
        {
            prop_assume!(!tensors.contains_key("__metadata__"));
            let folder = tempfile::tempdir().unwrap();
            let held: Vec<(&String, StoredMatrix)> = tensors.iter().map(|(name, x)| (name, stored(x))).collect();
            let out: Vec<OutTensor<'_>> = held.iter().map(|(name, x)| f32s(name, x, DType::F32)).collect();
            let file = written(folder.path(), &out);
            for (name, values) in &tensors {
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                prop_assert_eq!(read(&file, name), bytes);
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
