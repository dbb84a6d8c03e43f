//! Opens arbitrary bytes as the index of two good shards. No tensor may come from elsewhere.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use lorank::checkpoint::Checkpoint;

fn shard(name: &str, tensors: &[&str]) {
    let entry = |(k, tensor): (usize, &&str)| {
        format!(r#""{tensor}":{{"dtype":"F32","shape":[1,1],"data_offsets":[{},{}]}}"#, 4 * k, 4 * k + 4)
    };
    let header = format!("{{{}}}", tensors.iter().enumerate().map(entry).collect::<Vec<_>>().join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&vec![0; 4 * tensors.len()]);
    lorank_fuzz::file(name, &bytes);
}

fuzz_target!(|bytes: &[u8]| {
    static SHARDS: OnceLock<()> = OnceLock::new();
    SHARDS.get_or_init(|| {
        shard("a.safetensors", &["x", "y"]);
        shard("b.safetensors", &["z"]);
    });
    let path = lorank_fuzz::file("model.safetensors.index.json", bytes);
    match Checkpoint::open(&path) {
        Ok(checkpoint) => {
            for tensor in &checkpoint.tensors {
                let shard = if tensor.info.name == "z" { "b.safetensors" } else { "a.safetensors" };
                assert_eq!(tensor.file.path(), PathBuf::from(lorank_fuzz::folder()).join(shard));
                assert!(["x", "y", "z"].contains(&tensor.info.name.as_str()));
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(&*lorank_fuzz::folder().to_string_lossy()), "{text}");
        }
    }
});
