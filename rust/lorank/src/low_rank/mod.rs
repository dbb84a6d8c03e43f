//! Low-rank updates: SVDs of products of factors, truncation, and differences of weights.

mod basis;
mod cholesky_qr;
mod core_svd;
pub mod decompose;
pub mod difference;
pub mod select;
mod terms;
mod triplets;
pub mod truncation;

pub use decompose::Buffers;
pub use terms::Term;
pub use triplets::{Triplets, Values};
