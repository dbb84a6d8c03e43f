//! Tests of valid checkpoints and of hostile files.

mod builder;
mod changes;
mod checkpoint;
mod hostile;
mod reading;
