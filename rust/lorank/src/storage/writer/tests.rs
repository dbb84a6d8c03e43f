use std::sync::Arc;

use proptest::prelude::*;

use super::header::METADATA;
use super::*;
use crate::matrix::dtype::DType;
use crate::storage::checkpoint::Checkpoint;
use crate::storage::safetensors::{SafetensorsFile, bits_per_element};
use crate::storage::source::{Computed, Parts, StoredMatrix};

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
fn every_kind_of_content_is_read_back() {
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
    // A tensor can be copied into the file that it is read from.
    let checkpoint = Checkpoint::open(file.path()).unwrap();
    let ids = checkpoint.tensors.iter().find(|t| t.info.name == "ids").unwrap();
    let copy = OutTensor { name: "copied".into(), shape: vec![], content: Content::Stored(ids) };
    let again = written(folder.path(), &[copy]);
    assert_eq!(again.tensors()[0].shape, [2, 2]);
    assert_eq!(read(&again, "copied"), [1, 0, 2, 0, 3, 0, 4, 0]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

/// Checks that metadata comes first, and that wide elements precede others whatever the names are.
#[test]
fn header_has_the_order_of_the_data() {
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

/// Rewrites a file from its own tensors, and fails after some of them have been written.
#[test]
fn file_is_unchanged_after_a_failed_rewrite_from_itself() {
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
fn failures_leave_the_target_unchanged() {
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

/// Computes threes, followed by a given last number.
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
fn computed_values_are_written() {
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
        let error = write(file.path(), &tensors, &BTreeMap::new(), 1, &CancelToken::default()).unwrap_err();
        let said = "out.safetensors: tensor `bad`: holds NaN or infinite values";
        assert!(matches!(error, Error::Numerical(_)) && error.to_string().contains(said), "{error}");
        assert!(std::fs::read(file.path()).unwrap() == before);
    }
}

proptest! {
    #[test]
    fn any_tensors_are_read_back(tensors in prop::collection::btree_map("(?s).{0,12}|[\"\\\\\n{}]{1,3}",
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
fn tensor_of_several_pieces_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    #[allow(clippy::cast_precision_loss)]
    let values: Vec<f32> = (0..2 * PIECE + 7).map(|i| i as f32).collect();
    let file = Arc::new(written(folder.path(), &[f32s("a", &stored(&values), DType::F32)]));
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert!(read(&file, "a") == bytes);
}

#[test]
fn sealed_file_states_its_digest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sealed.safetensors");
    let values: Vec<f32> = (0..60_000u16).cycle().take(300_000).map(f32::from).chain([0.5; 7]).collect();
    let (cancel, seal) = (CancelToken::default(), Seal { key: "digest", seed: b"seed" });
    let tensors = [
        OutTensor {
            name: "large".into(),
            shape: vec![values.len()],
            content: Content::F32 { values: &values, dtype: DType::F32 },
        },
        OutTensor {
            name: "raw".into(),
            shape: vec![3],
            content: Content::Raw { bytes: &[1, 2, 3], dtype: "U8".into() },
        },
    ];
    // A text that resembles the entry does not take its place.
    let decoy = BTreeMap::from([("a".to_owned(), r#""digest":"0000000000000000""#.to_owned())]);
    let mut stated = Vec::new();
    for threads in [1, 3] {
        let digest = write_sealed(&path, &tensors, &decoy, seal, threads, &cancel).unwrap();
        let checkpoint = crate::storage::checkpoint::Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.tensors[0].file.metadata()["digest"], digest);
        assert_eq!(checkpoint.tensors[0].file.metadata()["a"], decoy["a"]);
        assert_eq!(checkpoint.digest(b"seed", threads, &cancel).unwrap(), digest);
        assert_ne!(checkpoint.digest(b"other", threads, &cancel).unwrap(), digest);
        stated.push(digest);
    }
    assert_eq!(stated[0], stated[1]);
}
