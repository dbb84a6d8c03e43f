//! A sink for the bytes of one tensor that also computes their digest.

use std::path::Path;

use crate::Result;
use crate::storage::atomic_file::Sink;
use crate::storage::digest::Digest;

/// A sink, and the digest of the bytes that pass through it.
pub(super) struct Recorded<'a, 'b> {
    sink: &'a mut Sink<'b>,
    digest: Option<Digest>,
}

impl<'a, 'b> Recorded<'a, 'b> {
    /// Wraps a sink; without `digests`, bytes pass unread.
    pub(super) fn new(sink: &'a mut Sink<'b>, digests: bool) -> Self {
        Self { sink, digest: digests.then(Digest::new) }
    }

    /// Returns the digest of all bytes; 0 if none is computed.
    pub(super) fn digest(&self) -> u64 {
        self.digest.as_ref().map_or(0, Digest::value)
    }

    /// Returns the path of the target.
    pub(super) const fn path(&self) -> &'b Path {
        self.sink.path()
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
        }
        self.sink.bytes(bytes)
    }

    /// Appends `size` bytes, all of which `fill` must write.
    pub(super) fn put(&mut self, size: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let Self { sink, digest } = self;
        sink.put(size, |place| {
            fill(place)?;
            if let Some(digest) = digest {
                digest.update(place);
            }
            Ok(())
        })
    }
}
