//! Spectra of weight matrices, and the statistics by which `LoRA` ranks are chosen.
//!
//! The crate reads matrices ([`matrix`], [`safetensors`], [`checkpoint`]) and computes the eigenvalues of
//! `W^T W` and singular value decompositions ([`eigen`], [`svd`]). It condenses a spectrum into metrics of
//! heavy-tailed self-regularisation and random-matrix theory ([`hill`], [`marchenko_pastur`], [`powerlaw`],
//! [`effective_rank`]; all of them: [`metrics`]). [`analysis`] processes many matrices in parallel and in
//! bounded memory. [`low_rank`] and [`select`] decompose and truncate low-rank updates.
//!
//! Papers are cited by keys such as \[PARA\], which `docs/references.md` of the repository lists.
//!
//! ```
//! use lorank::{cancel::CancelToken, eigen, hill, matrix::MatrixView};
//!
//! let weight: Vec<f32> = vec![3.0, 0.0, 0.0, 0.0, 1.0, 0.0]; // 2 x 3, row-major
//! let view = MatrixView::from_f32(&weight, 2, 3).unwrap();
//! let spectrum = eigen::spectrum(&view, eigen::Accuracy::Exact, 1, &CancelToken::default()).unwrap();
//! assert!((spectrum.eigenvalues()[1] - 9.0).abs() < 1e-12);
//! let alpha = hill::alpha_hill(&spectrum, hill::Convention::Median);
//! assert!((alpha - (1.0 + 1.0 / 9f64.ln())).abs() < 1e-12);
//! ```
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]

pub mod analysis;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
pub mod eigen;
pub mod error;
mod exec;
mod kernels;
pub mod low_rank;
pub mod matrix;
pub mod quantized;
mod statistics;
mod storage;
pub mod svd;

pub use eigen::sampled;
pub use exec::{cancel, panics, parallel, process_lock, scratch as workspace};
pub use low_rank::{
    decompose as product_svd, difference as difference_svd, replay, select, truncation, updated,
};
pub use matrix::dtype;
pub use statistics::{effective_rank, hill, marchenko_pastur, metrics, powerlaw, spectrum};
pub use storage::{
    arranged, checkpoint, exchange, mapped, safetensors, source, writer as safetensors_writer,
};
pub use svd::qr;

pub use error::{Error, ErrorKind, Result};

/// Runs the examples of the README as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
