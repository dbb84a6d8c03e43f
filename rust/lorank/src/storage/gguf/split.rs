//! Models that are split into several files.

use std::path::{Path, PathBuf};

use crate::storage::safetensors::SafetensorsFile;
use crate::{Error, Result};

/// Number of digits of the numbers in a file name.
const DIGITS: usize = 5;

/// Returns the paths of all parts of a model, given the path of one part; `None` for other files.
pub(crate) fn parts(path: &Path) -> Option<Vec<PathBuf>> {
    let (before, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = before.rsplit_once('-')?;
    let [number, count] = [number, count].map(|text| {
        let is_number = text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_digit());
        if is_number { text.parse::<u32>().ok() } else { None }
    });
    let (number, count) = (number?, count?);
    let name = |k| path.with_file_name(format!("{stem}-{k:05}-of-{count:05}.gguf"));
    (1..=count).contains(&number).then(|| (1..=count).map(name).collect())
}

/// Checks that a file is the part of a model that its name states.
///
/// # Errors
/// [`Error::Format`] if the settings of the file contradict its name.
pub(crate) fn check(file: &SafetensorsFile, index: usize, count: usize) -> Result<()> {
    let setting = |key: &str| file.metadata().get(key).and_then(|text| text.parse::<usize>().ok());
    let (number, parts) = (setting("split.no").unwrap_or(0), setting("split.count").unwrap_or(1).max(1));
    if (number, parts) == (index, count) {
        return Ok(());
    }
    let (number, part) = (number.saturating_add(1), index + 1);
    let reason = if count == 1 {
        format!("is part {number} of {parts} of a model: name all parts NAME-00001-of-{parts:05}.gguf")
    } else {
        format!("is part {number} of {parts} by its settings, but part {part} of {count} by its name")
    };
    Err(Error::format(file.path(), reason))
}
