//! Safetensors files written byte by byte, valid or not.

use std::fs;
use std::path::{Path, PathBuf};

use lorank::Error;
use tempfile::TempDir;

/// Eight bytes of length, the header as it is given, the data as it is given.
pub fn file_bytes(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The header entry of one tensor.
pub fn entry(name: &str, dtype: &str, shape: &[usize], begin: usize, end: usize) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)
}

/// A valid file of float32 vectors.
pub fn vectors(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, values) in tensors {
        let begin = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        entries.push(entry(name, "F32", &[values.len()], begin, data.len()));
    }
    file_bytes(&format!("{{{}}}", entries.join(",")), &data)
}

/// An index that maps tensors to shards.
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

/// Checks that a message is about its file and says what it should.
pub fn assert_says(error: &Error, path: &Path, parts: &[&str]) {
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "{text:?} names {}", path.display());
    for part in parts {
        assert!(text.contains(part), "{text:?} says {part:?}");
    }
}
