//! Checkpoints as they should be, and files that nobody should trust.

mod builder;
mod checkpoint;
mod hostile;
mod reading;
