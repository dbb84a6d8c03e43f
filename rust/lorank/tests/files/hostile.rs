//! Tests of files that violate the format, one rule at a time.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use lorank::Error;
use lorank::cancel::CancelToken;
use lorank::checkpoint::Checkpoint;
use lorank::safetensors::SafetensorsFile;
use proptest::prelude::*;

use crate::builder::{assert_message, entry, file_bytes, folder, vectors, write};

/// Checks that opening fails with a message that contains the path of the file and the given parts.
fn assert_refused(bytes: &[u8], parts: &[&str]) {
    let folder = folder();
    let path = write(&folder, "hostile.safetensors", bytes);
    let error = SafetensorsFile::open(&path).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    assert_message(&error, &path, parts);
    assert_message(&Checkpoint::open(&path).unwrap_err(), &path, parts);
}

fn assert_header_refused(header: &str, data: usize, parts: &[&str]) {
    assert_refused(&file_bytes(header, &vec![0; data]), parts);
}

#[test]
fn file_shorter_than_eight_bytes_is_refused() {
    for length in 0..8 {
        assert_refused(&vec![1; length], &["not a safetensors file"]);
    }
    assert_refused(&0u64.to_le_bytes(), &["header"]);
}

#[test]
fn header_longer_than_the_file_is_refused() {
    for length in [3u64, 1 << 20, 100_000_001, 1 << 40, 1 << 63, u64::MAX - 7, u64::MAX] {
        assert_refused(&[&length.to_le_bytes()[..], b"{}"].concat(), &["header of"]);
    }
}

#[test]
fn header_beyond_the_limit_is_refused() {
    // The file really has this length; it is sparse, so that nothing is written.
    let folder = folder();
    let path = write(&folder, "hostile.safetensors", 100_000_001u64.to_le_bytes());
    std::fs::File::options().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
    assert_message(&SafetensorsFile::open(&path).unwrap_err(), &path, &["header of 100000001 bytes"]);
}

#[test]
fn header_of_another_json_type_is_refused() {
    for header in
        ["", " ", "nonsense", "{", r#"{"a""#, "{}{}", "[]", "3", "null", r#""text""#, "[[[[", "\0\0"]
    {
        assert_header_refused(header, 0, &["malformed header"]);
    }
    assert_refused(&[&4u64.to_le_bytes()[..], &[b'{', 0xff, 0xfe, b'}']].concat(), &["malformed header"]);
    // Deep enough to overflow the stack of a parser without a recursion limit.
    assert_header_refused(&format!(r#"{{"a":{}"#, "[".repeat(1_000_000)), 0, &["malformed header", "`a`"]);
    assert_header_refused(
        &format!(r#"{{"__metadata__":{}"#, "[".repeat(1_000_000)),
        0,
        &["malformed header"],
    );
}

#[test]
fn entries_of_the_wrong_type_are_refused() {
    for body in [
        "3",
        "null",
        r#""F32""#,
        "{}",
        r#"{"dtype":"F32","shape":[1]}"#,
        r#"{"dtype":"F32","data_offsets":[0,4]}"#,
        r#"{"shape":[1],"data_offsets":[0,4]}"#,
        r#"{"dtype":7,"shape":[1],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":1,"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[null],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":{"begin":0,"end":4}}"#,
        r#"{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
    ] {
        let good = entry("good", "F32", &[1], 4, 8);
        assert_header_refused(
            &format!(r#"{{{good},"bad.weight":{body}}}"#),
            8,
            &["malformed header", "`bad.weight`"],
        );
    }
}

#[test]
fn invalid_offsets_are_refused() {
    let max = usize::MAX;
    for (shape, begin, end) in [
        (&[1][..], 4, 0),     // reversed
        (&[0], 8, 4),         // reversed and empty
        (&[1], 5, 9),         // ends beyond the file
        (&[1], 100, 104),     // begins beyond the file
        (&[0], 9, 9),         // begins beyond the file and is empty
        (&[1], max - 4, max), // would overflow if the start of the data were added first
        (&[1], max - 3, 1),   // wraps around to the right length
        (&[2], 0, 4),         // too few bytes for its shape
        (&[1], 0, 8),         // too many bytes for its shape
        (&[], 0, 8),          // a scalar has one element
        (&[1, 0], 0, 4),      // this shape has no elements
    ] {
        let header = format!("{{{}}}", entry("liar", "F32", shape, begin, end));
        assert_header_refused(&header, 8, &["`liar`"]);
    }
}

#[test]
fn overflowing_shapes_are_refused() {
    let half = 1 << 32;
    for dtype in ["F32", "BOOL", "F4", "UNKNOWN"] {
        for shape in [&[half, half][..], &[half, half, 0], &[usize::MAX, 2], &[3, usize::MAX / 2]] {
            let header = format!("{{{}}}", entry("vast", dtype, shape, 0, 0));
            assert_header_refused(&header, 0, &["`vast`", "overflows"]);
        }
    }
    // The number of elements fits into 64 bits, the number of bits does not, or wraps around to 0.
    for elements in [usize::MAX, 1 << 59, 1 << 58] {
        let header = format!("{{{}}}", entry("vast", "F64", &[elements], 0, 0));
        assert_header_refused(&header, 0, &["`vast`", "overflows"]);
    }
}

#[test]
fn overlapping_tensors_are_refused() {
    for (first, second) in [((0, 8), (0, 8)), ((0, 8), (4, 12)), ((4, 12), (0, 8)), ((0, 16), (4, 8))] {
        let tensor = |name, (begin, end)| entry(name, "F32", &[(end - begin) / 4], begin, end);
        let between = entry("between", "F32", &[1], 16, 20);
        let header = format!("{{{},{between},{}}}", tensor("a", first), tensor("b", second));
        assert_header_refused(&header, 20, &["overlap", "`a`", "`b`"]);
    }
}

#[test]
fn duplicate_names() {
    let entries =
        [entry("w", "F32", &[1], 0, 4), entry("v", "F32", &[1], 4, 8), entry("w", "F32", &[1], 8, 12)];
    assert_header_refused(&format!("{{{}}}", entries.join(",")), 12, &["`w`", "twice"]);
    // The same name with JSON escapes.
    let escaped = r#""\u0077":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#;
    assert_header_refused(&format!("{{{},{escaped}}}", entries[0]), 8, &["`w`", "twice"]);
}

#[test]
fn truncation_at_every_length_is_refused() {
    let bytes = vectors(&[("first", &[1.0, 2.0]), ("second", &[3.0])]);
    for length in 0..bytes.len() {
        assert_refused(&bytes[..length], &[]);
    }
}

#[test]
fn missing_paths_and_folders_are_errors() {
    let folder = folder();
    let missing = folder.path().join("missing.safetensors");
    for error in [SafetensorsFile::open(&missing).unwrap_err(), Checkpoint::open(&missing).unwrap_err()] {
        assert!(matches!(error, Error::Io { .. }));
        assert_message(&error, &missing, &[]);
    }
    assert_message(&SafetensorsFile::open(folder.path()).unwrap_err(), folder.path(), &["regular file"]);
    assert_message(
        &SafetensorsFile::open(Path::new("/dev/null")).unwrap_err(),
        Path::new("/dev/null"),
        &["regular"],
    );
}

#[test]
fn named_pipe_is_an_error_without_blocking() {
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        let folder = folder();
        let path = folder.path().join(name);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        for opened in [path.clone(), folder.path().to_path_buf()] {
            let (sender, receiver) = mpsc::channel();
            std::thread::spawn(move || sender.send(Checkpoint::open(&opened)));
            let result = receiver.recv_timeout(Duration::from_secs(10)).expect("open returns");
            assert_message(&result.unwrap_err(), &path, &["regular file"]);
        }
    }
}

fn valid_header() -> String {
    format!(
        r#"{{"__metadata__":{{"format":"pt"}},{},{},{}}}"#,
        entry("layer.0.weight", "F32", &[2, 3], 0, 24),
        entry("layer.0.bias", "BF16", &[4], 24, 32),
        entry("scale", "F64", &[], 32, 40)
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Checks for damaged headers that opening returns, and that every accepted tensor can be read.
    #[test]
    fn damaged_headers_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
            any::<u8>(), prop::sample::select(&b"0123456789-+.eE[]{}\",: "[..])]), 1..6),
        with_length in any::<bool>(),
    ) {
        let header = valid_header();
        let mut bytes = file_bytes(&header, &[7; 40]);
        let first = if with_length { 0 } else { 8 };
        for (position, byte) in damage {
            bytes[first + position.index(8 + header.len() - first)] = byte;
        }
        let folder = folder();
        let path = write(&folder, "damaged.safetensors", &bytes);
        match SafetensorsFile::open(&path) {
            Err(error) => assert_message(&error, &path, &[]),
            Ok(file) => {
                for tensor in file.tensors() {
                    let read = file.read(tensor, 0, tensor.len, &CancelToken::default()).unwrap();
                    prop_assert_eq!(read.len(), tensor.len);
                }
            }
        }
    }
}

#[test]
fn undamaged_header_is_valid() {
    let folder = folder();
    let path = write(&folder, "fine.safetensors", file_bytes(&valid_header(), &[7; 40]));
    assert_eq!(SafetensorsFile::open(&path).unwrap().tensors().len(), 3);
}
