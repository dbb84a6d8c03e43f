//! Checkpoints: one safetensors file, or a folder of shards with an index.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::exec::memory::probe;
use crate::storage::safetensors::{SafetensorsFile, TensorInfo};
use crate::{Error, Result};

/// File name that transformers gives to the index of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";

/// File name that transformers gives to a checkpoint without shards.
const SINGLE: &str = "model.safetensors";

/// A tensor and the open file that contains it.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// The file or shard that contains the tensor.
    pub file: Arc<SafetensorsFile>,
    /// Name, type, shape and position of the tensor.
    pub info: TensorInfo,
}

/// All tensors of a checkpoint.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The tensors, ordered by the name of their file and by their position in it.
    pub tensors: Vec<StoredTensor>,
}

/// Memory in bytes for a byte of an index: the parsed entries, and copies of them.
const PARSED: usize = 8;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a safetensors file, an index file, or a folder with one index or one file.
    ///
    /// Symbolic links are followed, since caches of the Hugging Face Hub consist of them. An index may only
    /// name files in its own folder.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`]. Their messages name the file and the tensor.
    ///
    /// # Examples
    /// ```
    /// use lorank::checkpoint::Checkpoint;
    ///
    /// let folder = tempfile::tempdir().unwrap();
    /// let header = br#"{"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
    /// let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    /// bytes.extend_from_slice(header);
    /// bytes.extend_from_slice(&[0; 8]);
    /// std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    ///
    /// let checkpoint = Checkpoint::open(folder.path()).unwrap();
    /// assert_eq!(checkpoint.tensors[0].info.name, "w");
    /// assert_eq!(checkpoint.tensors[0].info.shape, [1, 2]);
    /// ```
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if metadata.is_dir() {
            return Self::open_folder(path);
        }
        if path.extension().is_some_and(|e| e == "json") {
            return Self::open_index(path);
        }
        Self::open_files(&[path.to_path_buf()])
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        if folder.join(INDEX).exists() {
            return Self::open_index(&folder.join(INDEX));
        }
        if folder.join(SINGLE).exists() {
            return Self::open_files(&[folder.join(SINGLE)]);
        }
        let candidates = |suffix: &str| -> Result<Vec<PathBuf>> {
            let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
            let mut found: Vec<PathBuf> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().ends_with(suffix)))
                .collect();
            found.sort();
            Ok(found)
        };
        let indices = candidates(".safetensors.index.json")?;
        let files = candidates(".safetensors")?;
        match (indices.as_slice(), files.as_slice()) {
            ([index], _) => Self::open_index(index),
            ([], [_, ..]) => Self::open_files(&files),
            ([], []) => Err(Error::format(folder, "holds no .safetensors file")),
            _ => Err(Error::format(folder, "holds several checkpoints: name one index file")),
        }
    }

    fn open_files(paths: &[PathBuf]) -> Result<Self> {
        let mut tensors: Vec<StoredTensor> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for path in paths {
            let file = Arc::new(SafetensorsFile::open(path)?);
            for info in file.tensors() {
                if !seen.insert(info.name.clone()) {
                    let reason = "is also in another file of the folder: give the path of one file";
                    return Err(Error::tensor(path, &info.name, reason));
                }
                tensors.push(StoredTensor { file: Arc::clone(&file), info: info.clone() });
            }
        }
        Ok(Self { tensors })
    }

    fn open_index(path: &Path) -> Result<Self> {
        if !std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_file() {
            return Err(Error::format(path, "is not a regular file"));
        }
        let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        probe(text.len().saturating_mul(PARSED), "an index of shards")?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|e| Error::format(path, format!("is not a shard index: {e}")))?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let mut shards: BTreeMap<&str, Arc<SafetensorsFile>> = BTreeMap::new();
        let mut tensors = Vec::with_capacity(index.weight_map.len());
        for (tensor, shard) in &index.weight_map {
            if !is_plain_name(shard) {
                let reason = format!("its shard `{shard}` is not a plain file name");
                return Err(Error::tensor(path, tensor, reason));
            }
            let file = if let Some(file) = shards.get(shard.as_str()) {
                Arc::clone(file)
            } else {
                let file = Arc::new(SafetensorsFile::open(&folder.join(shard))?);
                shards.insert(shard, Arc::clone(&file));
                file
            };
            let position = file.position(tensor).ok_or_else(|| {
                Error::tensor(path, tensor, format!("is missing from `{shard}`, where the index places it"))
            })?;
            tensors.push((shard, position, file));
        }
        tensors.sort_by_key(|&(shard, position, _)| (shard, position));
        let stored = |(_, position, file): (_, usize, Arc<SafetensorsFile>)| StoredTensor {
            info: file.tensors()[position].clone(),
            file,
        };
        Ok(Self { tensors: tensors.into_iter().map(stored).collect() })
    }
}

fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains('\\')
}

#[cfg(test)]
mod tests {
    use super::is_plain_name;

    #[test]
    fn only_names_within_the_folder_are_plain() {
        for name in ["model.safetensors", "model-00001-of-00002.safetensors", "...", "a b", "ä.safetensors"]
        {
            assert!(is_plain_name(name), "{name}");
        }
        for name in ["", ".", "..", "../x", "a/b", "a/../b", "./a", "/", "/etc/passwd", "..\\x", "C:\\x"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
