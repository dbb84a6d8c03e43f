//! Tests of valid files: the header, and the bytes of the tensors.

use std::fs;

use lorank::Error;
use lorank::cancel::CancelToken;
use lorank::checkpoint::Checkpoint;
use lorank::dtype::DType;
use lorank::safetensors::{SafetensorsFile, TensorInfo};
use lorank::source::{Buffer, StoredMatrix};

use crate::builder::{assert_message, entry, file_bytes, folder, vectors, write};

fn read(file: &SafetensorsFile, tensor: &TensorInfo) -> Vec<u8> {
    file.read(tensor, 0, tensor.len, &CancelToken::default()).unwrap()
}

#[test]
fn tensors_keep_the_order_of_the_header() {
    let folder = folder();
    let data: Vec<u8> = (0..48).collect();
    // Metadata of any type is ignored; gaps and padding belong to no tensor.
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt","__metadata__":[1,{{"a":null}}]}},{},{},{}}}    "#,
        entry("z", "F32", &[2, 3], 8, 32),
        entry("a", "BF16", &[], 0, 2),
        entry("m.ä", "I64", &[1], 32, 40)
    );
    let path = write(&folder, "model.safetensors", file_bytes(&header, &data));
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.path(), path);
    let names: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["z", "a", "m.ä"]);
    let z = &file.tensors()[0];
    assert_eq!((z.dtype.as_str(), z.shape.as_slice(), z.len), ("F32", &[2, 3][..], 24));
    assert_eq!(z.offset, 8 + header.len() as u64 + 8);
    assert_eq!(read(&file, z), data[8..32]);
    assert_eq!(file.position("a"), Some(1));
    assert_eq!(file.position("__metadata__"), None);
    assert!(file.tensors()[1].shape.is_empty());
    assert_eq!(read(&file, &file.tensors()[1]), data[..2]);

    // Parts of a tensor can be read, but nothing beyond it.
    let cancel = CancelToken::default();
    assert_eq!(file.read(z, 4, 5, &cancel).unwrap(), data[12..17]);
    assert!(file.read(z, 24, 0, &cancel).unwrap().is_empty());
    for (start, len) in [(0, 25), (24, 1), (25, 0), (usize::MAX, 2), (1, usize::MAX)] {
        assert_message(&file.read(z, start, len, &cancel).unwrap_err(), &path, &["`z`"]);
    }
    cancel.cancel();
    assert!(matches!(file.read(z, 0, 24, &cancel), Err(Error::Cancelled)));
}

#[test]
fn data_at_unaligned_offsets_are_read() {
    let folder = folder();
    let values = [1.5f32, -2.25, 1e-30, 3e30];
    let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for padding in 0..8 {
        let header = format!("{{{}}}{}", entry("w", "F32", &[2, 2], 0, 16), " ".repeat(padding));
        let path = write(&folder, "model.safetensors", file_bytes(&header, &data));
        let tensor = Checkpoint::open(&path).unwrap().tensors.remove(0);
        let matrix = StoredMatrix::in_file(tensor, (2, 2), 0).unwrap();
        matrix
            .with_view(&mut Buffer::default(), &CancelToken::default(), |view| {
                assert_eq!(view.to_row_major(), values.map(f64::from));
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn tensors_without_elements_are_read() {
    let folder = folder();
    // Empty tensors may share an offset and lie at the edge of other tensors.
    let header = format!(
        "{{{},{},{},{}}}",
        entry("none", "F32", &[0], 0, 0),
        entry("wide", "F16", &[0, usize::MAX], 4, 4),
        entry("one", "F32", &[1], 0, 4),
        entry("deep", "F8_E4M3", &[3, 0, 7], 2, 2)
    );
    let file = SafetensorsFile::open(&write(&folder, "x.safetensors", file_bytes(&header, &[0; 4]))).unwrap();
    assert_eq!(file.tensors().len(), 4);
    assert!(read(&file, &file.tensors()[1]).is_empty());

    let empty = write(&folder, "empty.safetensors", file_bytes("{}", &[]));
    assert!(SafetensorsFile::open(&empty).unwrap().tensors().is_empty());
}

#[test]
fn types_without_a_spectrum_are_listed() {
    let folder = folder();
    let header = format!(
        "{{{},{},{},{}}}",
        entry("new", "F7_X", &[100, 100], 0, 3),
        entry("packed", "F4", &[3], 3, 5),
        entry("mask", "BOOL", &[2], 5, 7),
        entry("half", "F8_E5M2", &[1], 7, 8)
    );
    let path = write(&folder, "model.safetensors", file_bytes(&header, &[0; 8]));
    let tensors = Checkpoint::open(&path).unwrap().tensors;
    let dtypes: Vec<&str> = tensors.iter().map(|t| t.info.dtype.as_str()).collect();
    assert_eq!(dtypes, ["F7_X", "F4", "BOOL", "F8_E5M2"]);
    for tensor in &tensors[..3] {
        let error = StoredMatrix::in_file(tensor.clone(), (1, 1), 0).unwrap_err();
        assert_message(&error, &path, &[&format!("`{}`", tensor.info.name), &tensor.info.dtype]);
    }
    assert_eq!(StoredMatrix::in_file(tensors[3].clone(), (1, 1), 0).unwrap().dtype(), DType::F8E5M2);
}

#[test]
fn matrix_beyond_its_tensor_is_an_error() {
    let folder = folder();
    let path = write(&folder, "model.safetensors", vectors(&[("w", &[1.0; 12])]));
    let tensor = Checkpoint::open(&path).unwrap().tensors.remove(0);
    assert!(StoredMatrix::in_file(tensor.clone(), (2, 3), 1).is_ok());
    assert!(StoredMatrix::in_file(tensor.clone(), (0, 3), usize::MAX - 1).is_ok());
    for (shape, index) in [
        ((2, 3), 2),
        ((13, 1), 0),
        ((usize::MAX, 2), 0),
        ((usize::MAX / 4 + 1, 1), 0),
        ((2, 3), usize::MAX),
        ((2, 3), usize::MAX / 24 + 1),
    ] {
        let error = StoredMatrix::in_file(tensor.clone(), shape, index).unwrap_err();
        assert_message(&error, &path, &["`w`"]);
    }
}

#[test]
fn file_that_shrinks_after_opening_is_an_error() {
    let folder = folder();
    let path = write(&folder, "model.safetensors", vectors(&[("kept", &[1.0; 4]), ("lost", &[2.0; 1000])]));
    let file = SafetensorsFile::open(&path).unwrap();
    let size = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(size - 1).unwrap();
    // The bytes are complete, but nothing shows that they are still the old ones.
    let kept = &file.tensors()[0];
    let error = file.read(kept, 0, kept.len, &CancelToken::default()).unwrap_err();
    assert_message(&error, &path, &["`kept`", "changed after it was opened"]);
    let lost = &file.tensors()[1];
    let error = file.read(lost, 0, lost.len, &CancelToken::default()).unwrap_err();
    assert_message(&error, &path, &["`lost`", "truncated"]);
}
