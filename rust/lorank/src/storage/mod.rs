//! Checkpoints, matrices that are loaded on demand, and writing of files.

pub mod arranged;
mod atomic_file;
pub mod checkpoint;
mod digest;
pub mod exchange;
mod gguf;
pub mod mapped;
mod revision;
pub(crate) mod rounding;
pub mod safetensors;
pub mod source;
pub mod writer;
