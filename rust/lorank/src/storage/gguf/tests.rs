use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;

/// Returns a setting with an integer value.
fn number(key: &str, value: u32) -> Vec<u8> {
    [text(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat()
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

/// Returns the entry of a tensor.
fn entry(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend(u32::try_from(dimensions.len()).unwrap().to_le_bytes());
    for n in dimensions {
        bytes.extend(n.to_le_bytes());
    }
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// Returns a file with `data` bytes of tensors.
fn file(settings: &[Vec<u8>], entries: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((entries.len() as u64).to_le_bytes());
    bytes.extend((settings.len() as u64).to_le_bytes());
    bytes.extend(settings.concat());
    bytes.extend(entries.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn read(bytes: &[u8]) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>)> {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    header(file.path(), file.as_file(), bytes.len() as u64)
}

/// Returns a small valid file.
fn valid() -> Vec<u8> {
    let array = [text("a"), 9u32.to_le_bytes().to_vec(), 4u32.to_le_bytes().to_vec()].concat();
    let array = [array, 2u64.to_le_bytes().to_vec(), vec![1, 0, 0, 0, 2, 0, 0, 0]].concat();
    let entries = [entry("x", &[32, 3], 2, 0), entry("y", &[2], 0, 64), entry("z", &[5, 1], 77, 96)];
    file(&[number("n", 7), array], &entries, 110)
}

#[test]
fn settings_and_tensors_are_read() {
    let (tensors, settings) = read(&valid()).unwrap();
    let found: Vec<_> = tensors.iter().map(|t| (&t.name[..], &t.dtype[..], &t.shape[..], t.len)).collect();
    assert_eq!(
        found,
        [("x", "Q4_0", &[3, 32][..], 54), ("y", "F32", &[2], 8), ("z", "GGML type 77", &[1, 5], 14)]
    );
    assert_eq!(settings["n"], "7");
    assert_eq!(settings["a"], "[1,2]");
}

#[test]
fn damaged_headers_are_errors() {
    let one = |entry: Vec<u8>| file(&[], &[entry], 64);
    let mut many = valid();
    many[8..16].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let mut settings = valid();
    settings[16..24].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let mut long = text("k");
    long.extend(8u32.to_le_bytes());
    long.extend((1u64 << 60).to_le_bytes());
    let mut nested = text("k");
    nested.extend(9u32.to_le_bytes());
    nested.extend([&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(20));
    let mut huge_array = text("k");
    huge_array.extend([9u32.to_le_bytes(), 10u32.to_le_bytes()].concat());
    huge_array.extend((1u64 << 60).to_le_bytes());
    let cases: [(&str, Vec<u8>); 17] = [
        ("announces 1152921504606846976 tensors", many),
        ("announces 1152921504606846976 settings", settings),
        ("ends beyond", file(&[long], &[], 0)),
        ("arrays in arrays", file(&[nested], &[], 0)),
        ("ends beyond", file(&[huge_array], &[], 0)),
        ("`n` twice", file(&[number("n", 1), number("n", 1)], &[], 0)),
        ("alignment 24", file(&[number("general.alignment", 24)], &[], 0)),
        ("alignment 0", file(&[number("general.alignment", 0)], &[], 0)),
        ("blocks of 32", one(entry("x", &[31, 3], 2, 0))),
        ("overflows", one(entry("x", &[1 << 40, 1 << 40], 0, 0))),
        ("end beyond", one(entry("x", &[32], 0, 0))),
        ("end beyond", one(entry("x", &[2], 0, 1 << 40))),
        ("end beyond", one(entry("x", &[2], 0, u64::MAX - 40))),
        ("no multiple", one(entry("x", &[2], 0, 8))),
        ("9 dimensions", one(entry("x", &[1; 9], 0, 0))),
        ("overlap", file(&[], &[entry("x", &[16], 0, 0), entry("y", &[16], 0, 32)], 128)),
        ("type 13", file(&[[text("k"), 13u32.to_le_bytes().to_vec()].concat()], &[], 0)),
    ];
    for (reason, bytes) in cases {
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    for version in [0u32, 1, 4, 3 << 24] {
        let mut bytes = valid();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        assert!(matches!(read(&bytes), Err(Error::Format { .. })), "{version}");
    }
}

#[test]
fn truncated_files_are_errors() {
    let bytes = valid();
    for length in 0..bytes.len() {
        assert!(read(&bytes[..length]).is_err() || length + 14 >= bytes.len(), "{length}");
    }
}

#[test]
fn empty_tensors_hold_no_bytes() {
    let (tensors, _) = read(&file(&[], &[entry("x", &[32, 0], 2, 0), entry("y", &[8], 0, 0)], 32)).unwrap();
    assert_eq!([tensors[0].len, tensors[1].len], [0, 32]);
}

#[test]
fn parts_of_a_model_have_numbered_names() {
    let parts = split::parts(Path::new("a/m-00002-of-00003.gguf")).unwrap();
    assert_eq!(parts[0], Path::new("a/m-00001-of-00003.gguf"));
    assert_eq!(parts.len(), 3);
    for name in
        ["m.gguf", "m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-1-of-3.gguf", "m-00001-of-00003"]
    {
        assert!(split::parts(Path::new(name)).is_none(), "{name}");
    }
}

proptest! {
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..6)) {
        let mut bytes = valid();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok((tensors, _)) = read(&bytes) {
            prop_assert!(tensors.iter().all(|t| t.offset + t.len as u64 <= bytes.len() as u64));
        }
    }
}
