//! Writes arbitrary tensors, and reads them with the reference implementation.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use lorank::cancel::CancelToken;
use lorank::safetensors_writer::{Content, OutTensor, write};
use lorank_fuzz::Bits;

fuzz_target!(|input: (Vec<(String, Bits)>, BTreeMap<String, String>, u8)| {
    let (tensors, metadata, threads) = input;
    let path = lorank_fuzz::folder().join("out.safetensors");
    let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let is_valid = names.iter().all(|name| *name != "__metadata__")
        && names.iter().collect::<std::collections::BTreeSet<_>>().len() == names.len();
    let dtype = |bits: &Bits| {
        use lorank::dtype::DType::{Bf16, F8E4M3, F8E5M2, F16, F32, F64};
        match bits.dtype {
            F64 => "F64",
            F32 => "F32",
            F16 => "F16",
            Bf16 => "BF16",
            F8E4M3 => "F8_E4M3",
            F8E5M2 => "F8_E5M2",
        }
    };
    let out: Vec<OutTensor<'_>> = tensors
        .iter()
        .map(|(name, bits)| OutTensor {
            name: name.clone(),
            shape: vec![bits.rows, bits.cols],
            content: Content::Raw { bytes: &bits.bytes, dtype: dtype(bits).into() },
        })
        .collect();
    let result = write(&path, &out, &metadata, usize::from(threads % 4) + 1, &CancelToken::default());
    if let Err(error) = result {
        return assert!(!is_valid, "{error}");
    }
    assert!(is_valid);
    let written = std::fs::read(&path).unwrap();
    let read = safetensors::SafeTensors::deserialize(&written).unwrap();
    assert_eq!(read.len(), tensors.len());
    for (name, bits) in &tensors {
        let tensor = read.tensor(name).unwrap();
        assert_eq!((tensor.data(), tensor.shape()), (&bits.bytes[..], &[bits.rows, bits.cols][..]));
    }
    let (_, header) = safetensors::SafeTensors::read_metadata(&written).unwrap();
    let found: BTreeMap<String, String> = header.metadata().clone().unwrap_or_default().into_iter().collect();
    assert_eq!(found, metadata);
});
