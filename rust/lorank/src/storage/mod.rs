//! Checkpoints, matrices that are loaded on demand, and writing of files.

mod atomic_file;
pub mod checkpoint;
pub mod mapped;
mod rounding;
pub mod safetensors;
pub mod source;
pub mod writer;
