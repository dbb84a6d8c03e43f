//! Tests of whole matrices: every scheme on every instruction set, against scalar formulas, and refusals.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::exec::cancel::CancelToken;
use crate::kernels::simd::tests::on_every_path;
use crate::quantized::float_codes::{e2m1, e4m3};
use crate::storage::checkpoint::Checkpoint;
use crate::storage::source::Buffer;

type Tensor<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

fn written(folder: &Path, tensors: &[Tensor<'_>]) -> Checkpoint {
    let (mut entries, mut bytes) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, content) in tensors {
        let start = bytes.len();
        bytes.extend_from_slice(content);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, bytes.len()]});
        entries.insert((*name).to_owned(), entry);
    }
    let header = serde_json::to_vec(&entries).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    file.extend_from_slice(&bytes);
    let path = folder.join("model.safetensors");
    std::fs::write(&path, file).unwrap();
    Checkpoint::open(&path).unwrap()
}

fn request(
    scheme: &str,
    checkpoint: &Checkpoint,
    shape: (usize, usize),
    settings: &[(&str, f64)],
) -> Request {
    let parts = checkpoint.tensors.iter().map(|t| (t.info.name.clone(), t.clone())).collect();
    let settings: BTreeMap<_, _> = settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    Request { scheme: scheme.to_owned(), parts, settings, shape, index: 0 }
}

fn decoded(request: &Request) -> Result<Vec<f32>> {
    let matrix = open(request, 1, request.shape)?;
    let mut buffer = Buffer::default();
    let view = matrix.load(&mut buffer, &CancelToken::default())?;
    view.to_f32(&CancelToken::default())
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..count).map(|_| next()).collect()
}

fn scales(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| (0.37f32 + i as f32).to_le_bytes()).collect()
}

fn assert_same(found: &[f32], expected: impl Fn(usize) -> f32, what: &str) {
    for (i, &x) in found.iter().enumerate() {
        let y = expected(i);
        assert!(x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan()), "{what}: {x} at {i}, expected {y}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn floats_of_eight_bits_equal_the_scalar_formula(rows in 1usize..70, cols in 1usize..200, seed: u64,
                                                     height in 1usize..40, width in 1usize..140) {
        let folder = tempfile::tempdir().unwrap();
        let grid = (rows.div_ceil(height), cols.div_ceil(width));
        let codes = bytes(seed, rows * cols);
        let file = written(folder.path(), &[
            ("codes", "F8_E4M3", &[rows, cols], codes.clone()),
            ("scales", "F32", &[grid.0, grid.1], scales(grid.0 * grid.1)),
        ]);
        let settings = [("block_rows", height as f64), ("block_cols", width as f64)];
        on_every_path(|path| {
            let found = decoded(&request("fp8", &file, (rows, cols), &settings)).unwrap();
            let expected = |i: usize| {
                let at = i / cols / height * grid.1 + i % cols / width;
                e4m3(codes[i]) * (0.37 + at as f32)
            };
            assert_same(&found, expected, &format!("{path:?}"));
        });
    }

    #[test]
    fn transposed_floats_of_four_bits_equal_the_scalar_formula(rows in 1usize..150, groups in 1usize..5, seed: u64) {
        let folder = tempfile::tempdir().unwrap();
        let cols = 32 * groups;
        let (codes, exponents) = (bytes(seed, rows * cols / 2), bytes(seed ^ 1, rows * groups));
        let file = written(folder.path(), &[
            ("codes", "U8", &[rows, groups, 16], codes.clone()),
            ("scales", "U8", &[rows, groups], exponents.clone()),
        ]);
        on_every_path(|path| {
            let found = decoded(&request("mxfp4", &file, (cols, rows), &[("transposed", 1.0)])).unwrap();
            let expected = |i: usize| {
                let (row, col) = (i % rows, i / rows);
                let value = e2m1(codes[row * cols / 2 + col / 2] >> (4 * (col % 2)) & 15);
                value * numbers::ScaleType::Exponent.at(&exponents, row * groups + col / 32)
            };
            assert_same(&found, expected, &format!("{path:?}"));
        });
    }

    #[test]
    fn gptq_equals_the_scalar_formula(words in 1usize..12, blocks in 1usize..5, seed: u64,
                                      bits in prop::sample::select(vec![2usize, 3, 4, 8])) {
        let folder = tempfile::tempdir().unwrap();
        let (rows, cols) = (32 * words, 32 * blocks);
        let (codes, zeros) = (bytes(seed, rows * cols * bits / 8), bytes(seed ^ 1, words * cols * bits / 8));
        let file = written(folder.path(), &[
            ("codes", "I32", &[rows * bits / 32, cols], codes.clone()),
            ("zeros", "I32", &[words, cols * bits / 32], zeros.clone()),
            ("scales", "F32", &[words, cols], scales(words * cols)),
        ]);
        // The code at a position of consecutive bits, of which every word is `step` words after the last.
        let code = |bytes: &[u8], first: usize, step: usize, at: usize| -> f32 {
            let bit = |b: usize| bytes[4 * (first + b / 32 * step) + b % 32 / 8] >> (b % 8) & 1;
            (0..bits).map(|i| f32::from(bit(at * bits + i) << i)).sum()
        };
        on_every_path(|path| {
            let found = decoded(&request("gptq", &file, (cols, rows), &[("bits", bits as f64)])).unwrap();
            let expected = |i: usize| {
                let (col, row) = (i / rows, i % rows);
                let group = row / 32;
                let q = code(&codes, col, cols, row);
                let z = code(&zeros, group * cols * bits / 32, 1, col) + 1.0;
                (q - z) * (0.37 + (group * cols + col) as f32)
            };
            assert_same(&found, expected, &format!("{path:?} {bits} bits"));
        });
    }

    #[test]
    fn nf4_equals_the_scalar_formula(rows in 1usize..40, cols in 1usize..90, index in 0usize..3, seed: u64) {
        let folder = tempfile::tempdir().unwrap();
        let size = 3 * rows * cols;
        let codes = bytes(seed, size.div_ceil(2));
        let file = written(folder.path(), &[
            ("codes", "U8", &[codes.len(), 1], codes.clone()),
            ("absmax", "F32", &[size.div_ceil(64)], scales(size.div_ceil(64))),
            ("map", "F32", &[16], scales(16)),
        ]);
        let request = Request { index, ..request("bitsandbytes-4bit", &file, (rows, cols), &[("block_size", 64.0)]) };
        on_every_path(|path| {
            let expected = |i: usize| {
                let at = index * rows * cols + i;
                let code = if at.is_multiple_of(2) { codes[at / 2] >> 4 } else { codes[at / 2] & 15 };
                (0.37 + f32::from(code)) * (0.37 + (at / 64) as f32)
            };
            assert_same(&decoded(&request).unwrap(), expected, &format!("{path:?}"));
        });
    }
}

#[test]
fn stacks_are_read_whole_or_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let codes = bytes(1, 3 * 6 * 4);
    let file = written(
        folder.path(),
        &[("codes", "F8_E5M2", &[3, 6, 4], codes), ("scales", "F32", &[3, 6, 1], scales(18))],
    );
    let single = request("fp8", &file, (6, 4), &[]);
    let mut all = Vec::new();
    for index in 0..3 {
        all.extend(decoded(&Request { index, ..single.clone() }).unwrap());
    }
    let whole = open(&single, 3, (1, 72)).unwrap();
    let mut buffer = Buffer::default();
    let found =
        whole.load(&mut buffer, &CancelToken::default()).unwrap().to_f32(&CancelToken::default()).unwrap();
    assert_same(&found, |i| all[i], "whole");
    for (count, view) in [(0, (0, 0)), (4, (4, 24)), (3, (3, 23)), (usize::MAX, (1, 72))] {
        assert!(open(&single, count, view).is_err(), "{count} {view:?}");
    }
    let cancel = CancelToken::default();
    cancel.cancel();
    assert!(matches!(whole.load(&mut buffer, &cancel), Err(Error::Cancelled)));
}

/// Scheme, tensors as `role:type:shape`, shape, settings, and the role of the tensor that does not fit.
type Case = (&'static str, &'static str, (usize, usize), &'static [(&'static str, f64)], &'static str);

const BITS: &[(&str, f64)] = &[("bits", 4.0)];
const BLOCK: &[(&str, f64)] = &[("block_size", 64.0)];

#[rustfmt::skip]
const MISFITS: &[Case] = &[
    ("fp8", "codes:F8_E4M3:8x8 scales:F32:3x3", (8, 8), &[], "scales"),
    ("fp8", "codes:F8_E4M3:8x8 scales:I32:8x1", (8, 8), &[], "scales"),
    ("fp8", "codes:U8:8x8 scales:F32:8x1", (8, 8), &[], "codes"),
    ("fp8", "codes:F8_E4M3:8x8 scales:F32:2x2", (8, 8), &[("block_rows", 128.0), ("block_cols", 128.0)], "scales"),
    ("fp8", "codes:F8_E4M3:8x8", (8, 8), &[], "codes"),
    ("fp8", "codes:F8_E4M3:8x8 scales:F32:1", (1 << 31, 1 << 31), &[], "codes"),
    ("int8", "codes:I8:8x8 scales:F32:8x1 zeros:I8:4", (8, 8), &[], "zeros"),
    ("mxfp4", "codes:U8:8x16 scales:U8:8x3", (8, 32), &[], "scales"),
    ("nvfp4-divide", "codes:U8:8x16 scales:F8_E4M3:8x2 overall:F32:5", (8, 32), &[], "overall"),
    ("packed-integers", "codes:I32:8x4 scales:F32:8x1 zeros:I32:3x1", (8, 32), BITS, "zeros"),
    ("packed-integers", "codes:I32:8x4 scales:F32:8x1", (8, 32), &[("bits", 9.0)], "codes"),
    ("packed-integers", "codes:I32:8x4 scales:F32:8x2 order:I32:31", (8, 32), BITS, "order"),
    ("gptq", "codes:I32:8x32 scales:F32:5x32 zeros:I32:5x4", (32, 64), BITS, "scales"),
    ("gptq", "codes:I32:8x32 scales:F32:2x32 zeros:I32:1x4", (32, 64), BITS, "zeros"),
    ("awq", "codes:I32:8x2 scales:F32:2x16 zeros:I32:2x1", (16, 8), &[], "zeros"),
    ("bitsandbytes-4bit", "codes:U8:64x1 absmax:F32:1 map:F32:16", (8, 16), BLOCK, "absmax"),
    ("bitsandbytes-4bit", "codes:U8:63x1 absmax:F32:2 map:F32:16", (8, 16), BLOCK, "codes"),
    ("bitsandbytes-int8", "codes:I8:8x8 scales:F32:7", (8, 8), &[], "scales"),
    ("unknown", "codes:I8:8x8", (8, 8), &[], "codes"),
];

#[test]
fn parts_that_do_not_fit_are_refused_with_their_names() {
    let folder = tempfile::tempdir().unwrap();
    for &(scheme, tensors, shape, settings, name) in MISFITS {
        let fields: Vec<Vec<&str>> = tensors.split(' ').map(|tensor| tensor.split(':').collect()).collect();
        let shapes: Vec<Vec<usize>> =
            fields.iter().map(|f| f[2].split('x').map(|n| n.parse().unwrap()).collect()).collect();
        let tensor = |(f, shape): (&Vec<&'static str>, &'static [usize])| -> Tensor<'static> {
            let size = if f[1].ends_with("32") { 4 } else { 1 };
            (f[0], f[1], shape, vec![0; size * shape.iter().product::<usize>()])
        };
        let shapes: Vec<&'static [usize]> = shapes.into_iter().map(|shape| &*shape.leak()).collect();
        let tensors: Vec<Tensor<'_>> = fields.iter().zip(shapes).map(tensor).collect();
        let file = written(folder.path(), &tensors);
        let error = decoded(&request(scheme, &file, shape, settings)).unwrap_err().to_string();
        let expected = format!("model.safetensors: tensor `{name}`: ");
        assert!(error.contains(&expected) && error.contains(scheme), "{scheme}: {error}");
    }
}

#[test]
fn groups_that_do_not_exist_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for bad in [2i32, -2, i32::MAX, i32::MIN] {
        let order: Vec<u8> = (0..64).flat_map(|i| if i == 40 { bad } else { i / 32 }.to_le_bytes()).collect();
        let file = written(
            folder.path(),
            &[
                ("codes", "I32", &[8, 32], vec![0; 1024]),
                ("scales", "F32", &[2, 32], vec![0; 256]),
                ("zeros", "I32", &[2, 4], vec![0; 32]),
                ("order", "I32", &[64], order),
            ],
        );
        let error = decoded(&request("gptq", &file, (32, 64), &[("bits", 4.0)])).unwrap_err();
        let expected = format!("tensor `order`: has group {bad} at position 40, but there are 2 groups");
        assert!(error.to_string().contains(&expected), "{error}");
    }
}
