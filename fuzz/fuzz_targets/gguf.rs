//! Opens arbitrary bytes as a GGUF file, and decodes all tensors of types that have a formula.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use lorank::cancel::CancelToken;
use lorank::checkpoint::{Checkpoint, StoredTensor};
use lorank::quantized::{self, Request, gguf};
use lorank::source::{Buffer, StoredMatrix};

fuzz_target!(|bytes: &[u8]| {
    let whole = [b"GGUF", bytes].concat();
    let path = lorank_fuzz::file("model.gguf", &whole);
    let cancel = CancelToken::default();
    let checkpoint = match Checkpoint::open(&path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("model.gguf"), "{text}");
            return;
        }
    };
    let mut buffer = Buffer::default();
    for tensor in checkpoint.tensors {
        let StoredTensor { file, info } = &tensor;
        let start = usize::try_from(info.offset).unwrap();
        let stored = file.read(info, 0, info.len, &cancel).unwrap();
        assert_eq!(stored, &whole[start..start + info.len]);
        let elements: usize = info.shape.iter().product();
        let is_block = gguf::types().any(|name| name == info.dtype);
        if !is_block {
            let _ = StoredMatrix::in_file(tensor, (1, elements), 0);
            continue;
        }
        let parts = BTreeMap::from([("codes".to_owned(), tensor.clone())]);
        let request =
            Request { scheme: "gguf".into(), parts, settings: BTreeMap::new(), shape: (1, elements), index: 0 };
        // Only empty tensors are refused.
        let Ok(matrix) = quantized::open(&request, 1, (1, elements)) else {
            assert_eq!(elements, 0);
            continue;
        };
        assert_eq!(matrix.load(&mut buffer, &cancel).unwrap().cols(), elements);
    }
});
