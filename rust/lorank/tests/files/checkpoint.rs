//! Tests of folders: single files, shards with an index, and invalid contents.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use lorank::Error;
use lorank::cancel::CancelToken;
use lorank::checkpoint::Checkpoint;
use tempfile::TempDir;

use crate::builder::{assert_message, folder, index, vectors, write};

const INDEX: &str = "model.safetensors.index.json";

/// Returns names and first values in the order of the checkpoint.
fn contents(path: &Path) -> Vec<(String, f32)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let first = |tensor: &lorank::checkpoint::StoredTensor| {
        let bytes = tensor.file.read(&tensor.info, 0, 4, &CancelToken::default()).unwrap();
        (tensor.info.name.clone(), f32::from_le_bytes(bytes.try_into().unwrap()))
    };
    checkpoint.tensors.iter().map(first).collect()
}

fn named(pairs: &[(&str, f32)]) -> Vec<(String, f32)> {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

/// Creates two shards and an index. Shard `b` has two tensors, which are not in alphabetical order.
fn sharded() -> TempDir {
    let folder = folder();
    write(&folder, "a.safetensors", vectors(&[("w3", &[3.0])]));
    write(&folder, "b.safetensors", vectors(&[("w2", &[2.0]), ("w1", &[1.0]), ("unlisted", &[9.0])]));
    let map = [("w1", "b.safetensors"), ("w2", "b.safetensors"), ("w3", "a.safetensors")];
    write(&folder, INDEX, index(&map));
    folder
}

#[test]
fn file_and_folder_with_one_file_have_the_same_tensors() {
    let folder = folder();
    let path = write(&folder, "model.safetensors", vectors(&[("y", &[1.0]), ("x", &[2.0])]));
    let expected = named(&[("y", 1.0), ("x", 2.0)]);
    assert_eq!(contents(&path), expected);
    assert_eq!(contents(folder.path()), expected);
    // The file with the standard name takes precedence over other files.
    write(&folder, "optimizer.safetensors", vectors(&[("state", &[5.0])]));
    assert_eq!(contents(folder.path()), expected);
}

#[test]
fn shards_are_found_by_folder_and_by_index() {
    let folder = sharded();
    let expected = named(&[("w3", 3.0), ("w2", 2.0), ("w1", 1.0)]);
    assert_eq!(contents(folder.path()), expected);
    assert_eq!(contents(&folder.path().join(INDEX)), expected);
    // Each shard is opened once.
    let tensors = Checkpoint::open(folder.path()).unwrap().tensors;
    assert!(std::sync::Arc::ptr_eq(&tensors[1].file, &tensors[2].file));
}

#[test]
fn index_of_another_name() {
    let folder = folder();
    write(&folder, "a.safetensors", vectors(&[("w", &[1.0]), ("v", &[2.0])]));
    write(&folder, "diffusion.safetensors.index.json", index(&[("w", "a.safetensors")]));
    assert_eq!(contents(folder.path()), named(&[("w", 1.0)]));
    write(&folder, "second.safetensors.index.json", index(&[("v", "a.safetensors")]));
    assert_message(&Checkpoint::open(folder.path()).unwrap_err(), folder.path(), &["several checkpoints"]);
}

#[test]
fn symbolic_links_are_followed() {
    let (blobs, snapshot) = (sharded(), folder());
    for name in ["a.safetensors", "b.safetensors", INDEX] {
        symlink(blobs.path().join(name), snapshot.path().join(name)).unwrap();
    }
    assert_eq!(contents(snapshot.path()), contents(blobs.path()));
    fs::remove_file(blobs.path().join("b.safetensors")).unwrap();
    let dangling = snapshot.path().join("b.safetensors");
    assert_message(&Checkpoint::open(snapshot.path()).unwrap_err(), &dangling, &[]);
}

#[test]
fn index_may_only_name_files_in_its_folder() {
    let outside = folder();
    let secret = write(&outside, "secret.safetensors", vectors(&[("w", &[1.0])]));
    let folder = folder();
    fs::create_dir(folder.path().join("a")).unwrap();
    write(&folder, "a/b", vectors(&[("w", &[1.0])]));
    let up = format!("../{}/secret.safetensors", outside.path().file_name().unwrap().display());
    for shard in [up.as_str(), "../x", "..", ".", "", "a/b", "./a", "a\\\\b", secret.to_str().unwrap()] {
        let path = write(&folder, INDEX, index(&[("layer.w", shard)]));
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert_message(&error, &path, &["`layer.w`", "not a plain file name"]);
    }
    // A plain name of something that is not a file.
    write(&folder, INDEX, index(&[("layer.w", "a")]));
    assert_message(
        &Checkpoint::open(folder.path()).unwrap_err(),
        &folder.path().join("a"),
        &["regular file"],
    );
}

#[test]
fn missing_shard_and_missing_tensor_are_errors() {
    let folder = sharded();
    let path = write(&folder, INDEX, index(&[("w3", "a.safetensors"), ("gone", "a.safetensors")]));
    assert_message(&Checkpoint::open(folder.path()).unwrap_err(), &path, &["`gone`", "`a.safetensors`"]);
    write(&folder, INDEX, index(&[("w3", "a.safetensors"), ("w1", "c.safetensors")]));
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    assert_message(&error, &folder.path().join("c.safetensors"), &[]);
}

#[test]
fn error_names_the_malformed_shard() {
    let folder = sharded();
    let path = write(&folder, "b.safetensors", b"short");
    assert_message(&Checkpoint::open(folder.path()).unwrap_err(), &path, &["not a safetensors file"]);
}

#[test]
fn malformed_index_is_an_error() {
    let folder = sharded();
    for text in ["", "nonsense", "[]", "{}", r#"{"weight_map":[]}"#, r#"{"weight_map":{"w1":7}}"#, "\u{0}"] {
        let path = write(&folder, INDEX, text);
        assert_message(&Checkpoint::open(folder.path()).unwrap_err(), &path, &["not a shard index"]);
    }
    let path = write(&folder, "config.json", r#"{"hidden_size":768}"#);
    assert_message(&Checkpoint::open(&path).unwrap_err(), &path, &["weight_map"]);
    write(&folder, INDEX, index(&[]));
    assert!(Checkpoint::open(folder.path()).unwrap().tensors.is_empty());
}

#[test]
fn folders_without_an_index_are_sorted_or_refused() {
    let folder = folder();
    write(&folder, "pytorch_model.bin", b"pickle");
    assert_message(&Checkpoint::open(folder.path()).unwrap_err(), folder.path(), &[".safetensors"]);
    write(&folder, "part2.safetensors", vectors(&[("x", &[2.0])]));
    write(&folder, "part1.safetensors", vectors(&[("y", &[1.0])]));
    assert_eq!(contents(folder.path()), named(&[("y", 1.0), ("x", 2.0)]));
    let path = write(&folder, "part3.safetensors", vectors(&[("z", &[3.0]), ("y", &[4.0])]));
    assert_message(&Checkpoint::open(folder.path()).unwrap_err(), &path, &["`y`", "another file"]);
}
