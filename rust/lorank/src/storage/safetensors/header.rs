//! The JSON header of a safetensors file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::storage::safetensors::TensorInfo;
use crate::{Error, Result};

#[derive(Deserialize)]
pub(super) struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The entries of the header in file order, including duplicates, which a map would hide.
pub(super) struct RawHeader {
    pub(super) tensors: Vec<(String, RawTensor)>,
    pub(super) metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if metadata.replace(texts(map.next_value()?)).is_some() {
                            return Err(serde::de::Error::duplicate_field("__metadata__"));
                        }
                    } else {
                        let tensor = map
                            .next_value()
                            .map_err(|e| serde::de::Error::custom(format!("tensor `{name}`: {e}")))?;
                        tensors.push((name, tensor));
                    }
                }
                Ok(RawHeader { tensors, metadata: metadata.unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Returns the entries that are strings. The format allows no others, but they are harmless and are ignored.
fn texts(metadata: &RawValue) -> BTreeMap<String, String> {
    // Raw values take as much memory as the text of the header, whatever they contain.
    let entries: BTreeMap<String, &RawValue> = serde_json::from_str(metadata.get()).unwrap_or_default();
    let text = |(name, value): (String, &RawValue)| Some((name, serde_json::from_str(value.get()).ok()?));
    entries.into_iter().filter_map(text).collect()
}

/// Converts header entries to tensors, and checks that their bytes lie in the file and do not overlap.
pub(super) fn check(
    path: &Path,
    entries: Vec<(String, RawTensor)>,
    data_start: u64,
    size: u64,
) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, raw) in entries {
        let fail = |reason: String| Err(Error::tensor(path, &name, reason));
        let (begin, end) = raw.data_offsets;
        let available = size - data_start;
        if begin > end || end > available {
            return fail(format!(
                "offsets {begin} to {end} in {available} bytes of data: the file is truncated or damaged"
            ));
        }
        let elements = raw.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
        let bits = elements.and_then(|n| n.checked_mul(bits_per_element(&raw.dtype).unwrap_or(0)));
        let Some(bits) = bits else {
            return fail(format!("shape {:?} overflows", raw.shape));
        };
        if bits_per_element(&raw.dtype).is_some() && bits.div_ceil(8) != end - begin {
            return fail(format!(
                "{} of shape {:?} needs {} bytes, its offsets span {}",
                raw.dtype,
                raw.shape,
                bits.div_ceil(8),
                end - begin
            ));
        }
        let Ok(len) = usize::try_from(end - begin) else {
            return fail(format!("its {} bytes are too many for this machine", end - begin));
        };
        let offset = data_start + begin;
        tensors.push(TensorInfo { dtype: raw.dtype, shape: raw.shape, offset, len, name });
    }
    check_apart(path, &tensors)?;
    Ok(tensors)
}

/// Checks that the bytes of tensors do not overlap.
pub(crate) fn check_apart(path: &Path, tensors: &[TensorInfo]) -> Result<()> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|t| t.len > 0).collect();
    by_offset.sort_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].len as u64 > pair[1].offset {
            let reason = format!("its bytes overlap those of `{}`", pair[0].name);
            return Err(Error::tensor(path, &pair[1].name, reason));
        }
    }
    Ok(())
}

/// Returns the number of bits of an element, or `None` for unknown types. Tensors of unknown types can be
/// listed, but not loaded.
pub(crate) fn bits_per_element(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    })
}
