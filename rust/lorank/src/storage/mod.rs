//! Checkpoints, matrices that are loaded on demand, and writing of files.

mod atomic_file;
pub mod arranged;
pub mod checkpoint;
mod digest;
pub mod exchange;
mod gguf;
pub mod mapped;
mod revision;
mod rounding;
pub mod safetensors;
pub mod source;
pub mod writer;
