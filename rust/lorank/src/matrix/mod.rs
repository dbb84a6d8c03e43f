//! Views of stored matrices: bytes, element type, shape and strides.

mod decode;
pub mod dtype;
pub(crate) mod stacked;
mod view;

pub use view::MatrixView;
