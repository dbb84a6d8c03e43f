//! Files: checkpoints that are read, matrices that are loaded on demand, and files that are written.

mod atomic_file;
pub mod checkpoint;
mod rounding;
pub mod safetensors;
pub mod source;
pub mod writer;
