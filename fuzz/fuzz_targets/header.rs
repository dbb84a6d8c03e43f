//! Opens arbitrary bytes as a safetensors file and reads all tensors. Every file that the reference
//! implementation reads must be read with the same values, except those that name a tensor twice.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lorank::cancel::CancelToken;
use lorank::checkpoint::{Checkpoint, StoredTensor};
use lorank::dtype::DType;
use lorank::safetensors::SafetensorsFile;
use lorank::source::{Buffer, StoredMatrix};

fuzz_target!(|bytes: &[u8]| {
    let path = lorank_fuzz::file("model.safetensors", bytes);
    let cancel = CancelToken::default();
    let reference = safetensors::SafeTensors::deserialize(bytes);
    let file = match SafetensorsFile::open(&path) {
        Ok(file) => file,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("model.safetensors"), "{text}");
            assert!(reference.is_err() || text.contains("twice"), "{text}");
            return;
        }
    };
    for tensor in file.tensors() {
        let start = usize::try_from(tensor.offset).unwrap();
        let expected = &bytes[start..start + tensor.len];
        assert_eq!(file.read(tensor, 0, tensor.len, &cancel).unwrap(), expected);
        assert!(file.read(tensor, 1, tensor.len, &cancel).is_err());
        if let Ok(reference) = &reference {
            let theirs = reference.tensor(&tensor.name).unwrap();
            assert_eq!((theirs.data(), theirs.shape()), (expected, &tensor.shape[..]));
        }
    }
    let checkpoint = Checkpoint::open(&path).unwrap();
    for StoredTensor { file, info } in checkpoint.tensors {
        let (is_matrix, dtype) = (info.shape.len() == 2, DType::from_safetensors(&info.dtype));
        if is_matrix && dtype.is_some() {
            let shape = (info.shape[0], info.shape[1]);
            let matrix = StoredMatrix::in_file(StoredTensor { file, info: info.clone() }, shape, 0).unwrap();
            if info.len > 0 {
                let mut buffer = Buffer::default();
                let found = matrix.load(&mut buffer, &cancel).unwrap().to_row_major();
                assert_eq!(found.len(), shape.0 * shape.1);
            }
        }
    }
});
