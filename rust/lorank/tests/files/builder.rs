//! Construction of valid and invalid safetensors files, byte by byte.

use std::fs;
use std::path::{Path, PathBuf};

use lorank::Error;
use tempfile::TempDir;

/// Returns the bytes of a file: eight bytes for the length of the header, the header, and the data.
pub fn file_bytes(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Returns the header entry of one tensor.
pub fn entry(name: &str, dtype: &str, shape: &[usize], begin: usize, end: usize) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)
}

/// Returns a valid file of float32 vectors.
pub fn vectors(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, values) in tensors {
        let begin = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        entries.push(entry(name, "F32", &[values.len()], begin, data.len()));
    }
    file_bytes(&format!("{{{}}}", entries.join(",")), &data)
}

/// Returns an index that maps tensors to shards.
pub fn index(weight_map: &[(&str, &str)]) -> String {
    let entries: Vec<String> =
        weight_map.iter().map(|(tensor, shard)| format!(r#""{tensor}":"{shard}""#)).collect();
    format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{}}}}}"#, entries.join(","))
}

pub fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

pub fn write(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// Checks that a message contains the path of its file and the given parts.
pub fn assert_message(error: &Error, path: &Path, parts: &[&str]) {
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "{text:?} names {}", path.display());
    for part in parts {
        assert!(text.contains(part), "{text:?} contains {part:?}");
    }
}
