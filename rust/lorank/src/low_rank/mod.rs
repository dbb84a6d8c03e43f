//! Low-rank updates: SVDs of products of factors, truncation, differences of weights, and updated weights.

mod basis;
mod cholesky_qr;
mod core_svd;
pub mod decompose;
pub mod difference;
pub mod replay;
pub mod select;
mod terms;
mod triplets;
pub mod truncation;
pub mod updated;

pub use decompose::Buffers;
pub use terms::Term;
pub use triplets::{Triplets, Values};
