//! Checkpoints: one safetensors file, or a folder of shards with an index.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::exec::cancel::CancelToken;
use crate::exec::memory::probe;
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool, side_by_side};
use crate::storage::digest::{self, DigestedTensor};
use crate::storage::gguf::split;
use crate::storage::revision::Revision;
use crate::storage::safetensors::{Reads, SafetensorsFile, TensorInfo};
use crate::{Error, Result};

/// File name that transformers gives to the index of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";

/// File name that transformers gives to a checkpoint without shards.
const SINGLE: &str = "model.safetensors";

const REPLACED: &str = "was replaced while the checkpoint was opened: load it again";

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
    /// Tensors and their shards, including duplicates, which a map would hide.
    #[serde(deserialize_with = "entries")]
    weight_map: Vec<(String, String)>,
}

fn entries<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<(String, String)>, D::Error> {
    struct Entries;
    impl<'de> Visitor<'de> for Entries {
        type Value = Vec<(String, String)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of tensors to shards")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut found = Vec::new();
            while let Some(entry) = map.next_entry()? {
                found.push(entry);
            }
            Ok(found)
        }
    }
    deserializer.deserialize_map(Entries)
}

impl Checkpoint {
    /// Opens a safetensors file, an index file, a folder with one index or one file, or a GGUF file. A GGUF file
    /// that is a part of a model opens the whole model.
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
        Self::open_for(path, Reads::Once)
    }

    /// Opens a checkpoint as [`open`](Self::open) does, and selects how changes of its files are detected.
    ///
    /// # Errors
    /// The errors of [`open`](Self::open).
    pub fn open_for(path: &Path, reads: Reads) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if metadata.is_dir() {
            return Self::open_folder(path, reads);
        }
        if path.extension().is_some_and(|e| e == "json") {
            return Self::open_index(path, reads);
        }
        let parts = split::parts(path);
        Self::open_files(parts.as_deref().unwrap_or(&[path.to_path_buf()]), reads)
    }

    /// Returns the metadata of a safetensors file, or the settings of a GGUF model as JSON texts. Several
    /// safetensors files have no metadata in common.
    #[must_use]
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let Some(first) = self.tensors.first().map(|tensor| &tensor.file) else { return BTreeMap::new() };
        let is_one = self.tensors.iter().all(|tensor| Arc::ptr_eq(&tensor.file, first));
        if is_one || first.is_gguf() { first.metadata().clone() } else { BTreeMap::new() }
    }

    /// Returns a digest of the names, types, shapes and bytes of all tensors and of `seed`, as
    /// [`write_sealed`](crate::storage::writer::write_sealed) writes it. Reads with up to `threads` threads, in
    /// little memory.
    ///
    /// # Errors
    /// The errors of reading, [`Error::Cancelled`], and [`Error::NoThreads`].
    pub fn digest(&self, seed: &[u8], threads: usize, cancel: &CancelToken) -> Result<String> {
        let order = costliest_first(self.tensors.iter().map(|tensor| tensor.info.len as u128));
        let found: Vec<OnceLock<Result<u64>>> = order.iter().map(|_| OnceLock::new()).collect();
        pool(threads.min(order.len()))?.install(|| {
            side_by_side(&order, threads, cancel, &|i, buffer: &mut Vec<u8>| {
                let StoredTensor { file, info } = &self.tensors[i];
                // Every index is visited once.
                let _ = found[i].set(guarded(|| file.digest(info, buffer, cancel)));
            });
        });
        let mut tensors = Vec::with_capacity(order.len());
        for (StoredTensor { info, .. }, digest) in self.tensors.iter().zip(found) {
            let digest = digest.into_inner().unwrap_or(Err(Error::Cancelled))?;
            tensors.push(DigestedTensor { name: &info.name, dtype: &info.dtype, shape: &info.shape, digest });
        }
        Ok(digest::of_file(seed, tensors))
    }

    fn open_folder(folder: &Path, reads: Reads) -> Result<Self> {
        if folder.join(INDEX).exists() {
            return Self::open_index(&folder.join(INDEX), reads);
        }
        if folder.join(SINGLE).exists() {
            return Self::open_files(&[folder.join(SINGLE)], reads);
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
            ([index], _) => Self::open_index(index, reads),
            ([], [_, ..]) => Self::open_files(&files, reads),
            ([], []) => Err(Error::format(folder, "holds no .safetensors file")),
            _ => Err(Error::format(folder, "holds several checkpoints: name one index file")),
        }
    }

    fn open_files(paths: &[PathBuf], reads: Reads) -> Result<Self> {
        let mut tensors: Vec<StoredTensor> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let mut files = Vec::with_capacity(paths.len());
        for (index, path) in paths.iter().enumerate() {
            let file = Arc::new(SafetensorsFile::open_for(path, reads)?);
            if file.is_gguf() {
                split::check(&file, index, paths.len())?;
            }
            for info in file.tensors() {
                if !seen.insert(info.name.clone()) {
                    let reason = "is also in another file of the folder: give the path of one file";
                    return Err(Error::tensor(path, &info.name, reason));
                }
                tensors.push(StoredTensor { file: Arc::clone(&file), info: info.clone() });
            }
            files.push(file);
        }
        check_in_place(&files)?;
        Ok(Self { tensors })
    }

    fn open_index(path: &Path, reads: Reads) -> Result<Self> {
        let before = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !before.is_file() {
            return Err(Error::format(path, "is not a regular file"));
        }
        let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        probe(text.len().saturating_mul(PARSED), "an index of shards")?;
        let Index { weight_map } = serde_json::from_slice(&text)
            .map_err(|e| Error::format(path, format!("is not a shard index: {e}")))?;
        let places = checked_places(path, &weight_map)?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let names: BTreeSet<&str> = places.values().copied().collect();
        let open = |&shard: &&str| {
            let file = SafetensorsFile::open_for(&folder.join(shard), reads)?;
            check_listed(path, &places, shard, &file)?;
            Ok(Arc::new(file))
        };
        let files: Vec<Arc<SafetensorsFile>> = names.iter().map(open).collect::<Result<_>>()?;
        let shards: HashMap<&str, &Arc<SafetensorsFile>> = names.into_iter().zip(&files).collect();
        let mut tensors = Vec::with_capacity(places.len());
        for (&tensor, &shard) in &places {
            let file = shards[shard];
            let position = file.position(tensor).ok_or_else(|| {
                Error::tensor(path, tensor, format!("is missing from `{shard}`, where the index places it"))
            })?;
            tensors.push((shard, position, file));
        }
        let after = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if before.ino() != after.ino() || !Revision::of(&before).is_same(&Revision::of(&after)) {
            return Err(Error::format(path, REPLACED));
        }
        check_in_place(&files)?;
        tensors.sort_by_key(|&(shard, position, _)| (shard, position));
        let stored = |(_, position, file): (_, usize, &Arc<SafetensorsFile>)| StoredTensor {
            info: file.tensors()[position].clone(),
            file: Arc::clone(file),
        };
        Ok(Self { tensors: tensors.into_iter().map(stored).collect() })
    }
}

/// Returns the shard of every tensor, after checking that every tensor has one, in the folder of the index.
fn checked_places<'a>(path: &Path, entries: &'a [(String, String)]) -> Result<BTreeMap<&'a str, &'a str>> {
    let mut places = BTreeMap::new();
    for (tensor, shard) in entries {
        if !is_plain_name(shard) {
            let reason = format!("its shard `{shard}` is not a plain file name");
            return Err(Error::tensor(path, tensor, reason));
        }
        if places.insert(tensor.as_str(), shard.as_str()).is_some() {
            return Err(Error::tensor(path, tensor, "appears twice in the index"));
        }
    }
    Ok(places)
}

/// Refuses a shard with a tensor that the index places in another shard: the two may differ.
fn check_listed(
    path: &Path,
    places: &BTreeMap<&str, &str>,
    shard: &str,
    file: &SafetensorsFile,
) -> Result<()> {
    for tensor in file.tensors() {
        if let Some(other) = places.get(tensor.name.as_str()).filter(|&&other| other != shard) {
            let reason = format!("is also in `{shard}`, but the index places it in `{other}`");
            return Err(Error::tensor(path, &tensor.name, reason));
        }
    }
    Ok(())
}

/// Refuses files of which some were replaced while the others were opened.
fn check_in_place(files: &[Arc<SafetensorsFile>]) -> Result<()> {
    match files.iter().find(|file| !file.is_in_place()) {
        Some(file) if files.len() > 1 => Err(Error::format(file.path(), REPLACED)),
        _ => Ok(()),
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
