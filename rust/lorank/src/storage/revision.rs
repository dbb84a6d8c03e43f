//! Detection of files that change between reads.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

/// The state of an open file, which changes with its content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Revision {
    size: u64,
    modified: (i64, i64),
    /// Time of the last change of content or attributes. Programs cannot set it, unlike `modified`.
    changed: (i64, i64),
    links: u64,
}

impl Revision {
    pub(crate) fn of(file: &Metadata) -> Self {
        Self {
            size: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
            links: file.nlink(),
        }
    }

    /// Returns true if the content is the same in a later state.
    pub(crate) fn is_same(&self, later: &Self) -> bool {
        // Adding or removing a link, such as deleting the file's name, changes an attribute only.
        let is_explained = self.changed == later.changed || self.links != later.links;
        self.size == later.size && self.modified == later.modified && is_explained
    }

    /// Size in bytes, and time of modification in nanoseconds.
    pub(crate) fn size_and_time(&self) -> (u64, i128) {
        (self.size, i128::from(self.modified.0) * 1_000_000_000 + i128::from(self.modified.1))
    }
}

/// Digests of the ranges of a file that were read, by position and length.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<HashMap<(u64, usize), u64>>);

impl Seen {
    /// Returns the digest of an earlier read of the same range.
    pub(crate) fn earlier(&self, range: (u64, usize)) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&range).copied()
    }

    pub(crate) fn record(&self, range: (u64, usize), digest: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(range, digest);
    }
}
