//! The header of a safetensors file, and the order of its tensors.

use std::collections::{BTreeMap, HashSet};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::exec::memory::probe;
use crate::storage::safetensors::bits_per_element;
use crate::storage::writer::out_tensor::OutTensor;
use crate::{Error, Result};

/// Alignment in bytes that other readers expect of the tensor data.
const ALIGNMENT: usize = 8;

/// Memory in bytes for a tensor in the header as a JSON value and as text.
const ENTRY: usize = 1 << 10;

/// Number of bytes per character of a name or text: a copy, and its escaped form in a growing vector.
const COPIES: usize = 16;

/// The key of the header's metadata.
pub(super) const METADATA: &str = "__metadata__";

/// Returns the indices of the tensors in the file order of the reference implementation: tensors with wide
/// elements first, and tensors of equal width by name. This order aligns every tensor.
pub(super) fn layout(tensors: &[OutTensor<'_>]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let width = |i: usize| bits_per_element(tensors[i].dtype()).unwrap_or(0);
    order.sort_by(|&i, &j| width(j).cmp(&width(i)).then_with(|| tensors[i].name.cmp(&tensors[j].name)));
    order
}

/// A JSON object that keeps the given order of keys, whereas a `serde_json` map would sort them.
struct Entries<'a>(Vec<(&'a str, Value)>);

impl Serialize for Entries<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// The beginning of a file, and the positions of its tensors.
pub(super) struct Header {
    /// The length of the header, followed by the header itself.
    pub text: Vec<u8>,
    /// Position of every tensor, in bytes after `text`.
    pub offsets: Vec<u64>,
    /// Size of all tensors in bytes.
    pub size: u64,
}

pub(super) fn header(
    tensors: &[OutTensor<'_>],
    order: &[usize],
    metadata: &BTreeMap<String, String>,
) -> Result<Header> {
    let texts = metadata.iter().map(|(name, text)| name.len() + text.len());
    let names = tensors.iter().map(|tensor| tensor.name.len());
    let characters: usize = texts.chain(names).sum();
    probe(tensors.len() * ENTRY + COPIES * characters, "the header of a file")?;
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push((METADATA, json!(metadata)));
    }
    let mut names = HashSet::with_capacity(tensors.len());
    let mut offset = 0u64;
    let mut offsets = vec![0; tensors.len()];
    for &i in order {
        offsets[i] = offset;
        let tensor = &tensors[i];
        if tensor.name == METADATA {
            // A reader would take the tensor for metadata.
            return Err(Error::InvalidInput(format!("tensor `{METADATA}`: the format reserves that name")));
        }
        if !names.insert(tensor.name.as_str()) {
            return Err(Error::InvalidInput(format!("two tensors are named `{}`", tensor.name)));
        }
        let end = offset + tensor.checked_len()? as u64;
        let entry = json!({"dtype": tensor.dtype(), "shape": tensor.shape(), "data_offsets": [offset, end]});
        entries.push((&tensor.name, entry));
        offset = end;
    }
    let mut text = vec![0; size_of::<u64>()];
    serde_json::to_writer(&mut text, &Entries(entries)).map_err(|e| Error::InvalidInput(e.to_string()))?;
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    let len = (text.len() - size_of::<u64>()) as u64;
    text[..size_of::<u64>()].copy_from_slice(&len.to_le_bytes());
    Ok(Header { text, offsets, size: offset })
}
