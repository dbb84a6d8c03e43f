//! Tests of files that change after they were opened.

use std::fs;
use std::os::unix::fs::FileExt;

use lorank::cancel::CancelToken;
use lorank::checkpoint::Checkpoint;
use lorank::safetensors::{Reads, SafetensorsFile};

use crate::builder::{assert_message, folder, index, vectors, write};

fn overwrite_last_byte(path: &std::path::Path) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let size = file.metadata().unwrap().len();
    file.write_all_at(&[7], size - 1).unwrap();
}

/// Restores the time of modification after a change, so that only the time of the change of attributes is new.
fn change_keeping_time(path: &std::path::Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    overwrite_last_byte(path);
    fs::OpenOptions::new().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

#[test]
fn change_before_the_first_read_is_an_error() {
    for reads in [Reads::Once, Reads::Repeated] {
        let folder = folder();
        let path = write(&folder, "m.safetensors", vectors(&[("a", &[1.0, 2.0])]));
        let file = SafetensorsFile::open_for(&path, reads).unwrap();
        let (tensor, cancel) = (&file.tensors()[0], CancelToken::default());
        std::thread::sleep(std::time::Duration::from_millis(20)); // longer than the clock's resolution
        change_keeping_time(&path);
        let error = file.read(tensor, 0, tensor.len, &cancel).unwrap_err();
        assert_message(&error, &path, &["`a`", "changed after it was opened: load it again"]);
    }
}

#[test]
fn second_read_is_compared_by_bytes() {
    let folder = folder();
    let path = write(&folder, "m.safetensors", vectors(&[("a", &[1.0, 2.0])]));
    let file = SafetensorsFile::open_for(&path, Reads::Repeated).unwrap();
    let (tensor, cancel) = (&file.tensors()[0], CancelToken::default());
    let before = file.read(tensor, 0, tensor.len, &cancel).unwrap();
    fs::write(&path, vectors(&[("a", &[1.0, 2.0])])).unwrap();
    assert_eq!(file.read(tensor, 0, tensor.len, &cancel).unwrap(), before, "equal bytes are no change");
    overwrite_last_byte(&path);
    let error = file.read(tensor, 0, tensor.len, &cancel).unwrap_err();
    assert_message(&error, &path, &["changed after it was opened"]);
}

#[test]
fn removed_file_stays_readable() {
    let folder = folder();
    let path = write(&folder, "m.safetensors", vectors(&[("a", &[1.0])]));
    let file = SafetensorsFile::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let tensor = &file.tensors()[0];
    assert_eq!(file.read(tensor, 0, 4, &CancelToken::default()).unwrap(), 1f32.to_le_bytes());
}

#[test]
fn digest_depends_on_names_types_shapes_bytes_and_seed() {
    let folder = folder();
    let digest = |tensors: &[(&str, &[f32])], seed: &[u8]| {
        let path = write(&folder, "m.safetensors", vectors(tensors));
        let checkpoint = Checkpoint::open(&path).unwrap();
        let found: Vec<String> =
            [1, 3].map(|threads| checkpoint.digest(seed, threads, &CancelToken::default()).unwrap()).into();
        assert_eq!(found[0], found[1]);
        found[0].clone()
    };
    let base = digest(&[("a", &[1.0, 2.0]), ("b", &[3.0])], b"seed");
    assert_eq!(base, digest(&[("b", &[3.0]), ("a", &[1.0, 2.0])], b"seed"), "order does not count");
    for other in [
        digest(&[("a", &[1.0, 2.0]), ("b", &[3.0])], b"sees"),
        digest(&[("a", &[1.0, 2.0]), ("c", &[3.0])], b"seed"),
        digest(&[("a", &[1.0]), ("b", &[2.0, 3.0])], b"seed"),
        digest(&[("a", &[2.0, 1.0]), ("b", &[3.0])], b"seed"),
        digest(&[("a", &[1.0, 2.0])], b"seed"),
    ] {
        assert_ne!(base, other);
    }
}

#[test]
fn tensor_in_two_shards_or_twice_in_the_index_is_an_error() {
    let folder = folder();
    write(&folder, "1.safetensors", vectors(&[("a", &[1.0])]));
    write(&folder, "2.safetensors", vectors(&[("a", &[2.0]), ("b", &[3.0])]));
    let places = index(&[("a", "1.safetensors"), ("b", "2.safetensors")]);
    let path = write(&folder, "model.safetensors.index.json", places);
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_message(&error, &path, &["`a`", "is also in `2.safetensors`"]);
    write(
        &folder,
        "model.safetensors.index.json",
        index(&[("a", "1.safetensors"), ("a", "2.safetensors"), ("b", "2.safetensors")]),
    );
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_message(&error, &path, &["`a`", "appears twice in the index"]);
}
