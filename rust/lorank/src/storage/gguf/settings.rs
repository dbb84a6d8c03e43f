//! The settings in the header of a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Number, Value};

use crate::storage::gguf::cursor::Cursor;
use crate::{Error, Result};

/// Largest number of settings. Models have some fifty.
const MAX_SETTINGS: u64 = 1 << 16;

/// Largest number of bytes of a text or of an array that is kept.
const MAX_KEPT: usize = 16 << 10;

/// Largest number of bytes of all texts and arrays that are kept.
const MAX_KEPT_IN_ALL: usize = 1 << 20;

/// Largest depth of arrays in arrays.
const MAX_DEPTH: u32 = 8;

/// Types of values.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

#[derive(Default)]
pub(super) struct Settings {
    /// The settings as JSON texts by their key, without long arrays and long texts.
    pub(super) texts: BTreeMap<String, String>,
    /// Number of bytes of texts and arrays that are kept.
    kept: usize,
}

impl Settings {
    /// Reads `count` settings.
    pub(super) fn read(cursor: &mut Cursor<'_>, count: u64) -> Result<Self> {
        if count > MAX_SETTINGS {
            let reason = format!("announces {count} settings: it is damaged");
            return Err(Error::format(cursor.path(), reason));
        }
        let mut settings = Self::default();
        for _ in 0..count {
            let key = cursor.name("setting")?;
            let kind = cursor.u32()?;
            let value = settings.value(cursor, kind, 0)?;
            if settings.texts.contains_key(&key) {
                return Err(Error::format(cursor.path(), format!("has the setting `{key}` twice")));
            }
            if let Some(value) = value {
                settings.texts.insert(key, value.to_string());
            }
        }
        Ok(settings)
    }

    /// Returns the alignment of tensors if it is set.
    pub(super) fn alignment(&self, path: &Path) -> Result<Option<u64>> {
        let Some(text) = self.texts.get("general.alignment") else { return Ok(None) };
        match text.parse::<u32>() {
            Ok(alignment) if alignment.is_power_of_two() => Ok(Some(alignment.into())),
            _ => Err(Error::format(path, format!("has the alignment {text}, expected a power of two"))),
        }
    }

    /// Reads a value; returns `None` for a value that is not kept.
    fn value(&mut self, cursor: &mut Cursor<'_>, kind: u32, depth: u32) -> Result<Option<Value>> {
        match kind {
            TEXT => {
                let longest = MAX_KEPT.min(MAX_KEPT_IN_ALL - self.kept);
                let text = cursor.text(longest)?;
                self.kept += text.as_ref().map_or(0, Vec::len);
                Ok(text.map(|text| Value::String(String::from_utf8_lossy(&text).into_owned())))
            }
            ARRAY => self.array(cursor, depth),
            _ => number(cursor, kind).map(Some),
        }
    }

    /// Reads an array. Arrays of numbers are kept; other arrays are passed over.
    fn array(&mut self, cursor: &mut Cursor<'_>, depth: u32) -> Result<Option<Value>> {
        let (kind, count) = (cursor.u32()?, cursor.u64()?);
        if kind == TEXT {
            for _ in 0..count {
                cursor.text(0)?;
            }
            return Ok(None);
        }
        if kind == ARRAY {
            if depth >= MAX_DEPTH {
                return Err(Error::format(cursor.path(), "has arrays in arrays: it is damaged"));
            }
            for _ in 0..count {
                self.array(cursor, depth + 1)?;
            }
            return Ok(None);
        }
        let size = size_of_number(cursor, kind)?;
        let bytes = count.saturating_mul(size);
        let longest = MAX_KEPT.min(MAX_KEPT_IN_ALL - self.kept);
        let Some(bytes) = usize::try_from(bytes).ok().filter(|&n| depth == 0 && n <= longest) else {
            cursor.skip(bytes)?;
            return Ok(None);
        };
        self.kept += bytes;
        (0..count).map(|_| number(cursor, kind)).collect::<Result<_>>().map(|found| Some(Value::Array(found)))
    }
}

/// Returns the number of bytes of a type of numbers.
fn size_of_number(cursor: &Cursor<'_>, kind: u32) -> Result<u64> {
    Ok(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return Err(Error::format(cursor.path(), format!("has a value of type {kind}: it is damaged"))),
    })
}

/// Reads an integer, a float, or a truth value.
fn number(cursor: &mut Cursor<'_>, kind: u32) -> Result<Value> {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    Ok(match kind {
        0 => cursor.u8()?.into(),
        1 => cursor.u8()?.cast_signed().into(),
        2 => cursor.u16()?.into(),
        3 => cursor.u16()?.cast_signed().into(),
        4 => cursor.u32()?.into(),
        5 => cursor.u32()?.cast_signed().into(),
        6 => float(f32::from_bits(cursor.u32()?).into()),
        7 => (cursor.u8()? != 0).into(),
        10 => cursor.u64()?.into(),
        11 => cursor.u64()?.cast_signed().into(),
        12 => float(f64::from_bits(cursor.u64()?)),
        _ => return size_of_number(cursor, kind).map(|_| Value::Null),
    })
}
