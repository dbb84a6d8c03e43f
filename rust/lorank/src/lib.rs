//! Spectra of weight matrices, and the statistics that `LoRA` ranks are chosen by.
//!
//! The crate reads matrices ([`matrix`], [`safetensors`], [`checkpoint`]), computes the eigenvalues
//! of `W^T W` and singular value decompositions ([`eigen`], [`svd`]), and condenses a spectrum into
//! the metrics of heavy-tailed self-regularisation and random-matrix theory ([`hill`],
//! [`marchenko_pastur`], [`powerlaw`], [`effective_rank`]; all at once: [`metrics`]).
//! [`analysis`] runs many matrices in parallel and in bounded memory.
//!
//! ```
//! use lorank::{cancel::CancelToken, eigen, hill, matrix::MatrixView};
//!
//! let weight: Vec<f32> = vec![3.0, 0.0, 0.0, 0.0, 1.0, 0.0]; // 2 x 3, row major
//! let view = MatrixView::from_f32(&weight, 2, 3).unwrap();
//! let spectrum = eigen::spectrum(&view, eigen::Accuracy::Exact, 1, &CancelToken::default()).unwrap();
//! assert!((spectrum.eigenvalues()[1] - 9.0).abs() < 1e-12);
//! let alpha = hill::alpha_hill(&spectrum, hill::Convention::Median);
//! assert!((alpha - (1.0 + 1.0 / 9f64.ln())).abs() < 1e-12);
//! ```
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]

mod aligned_bytes;
pub mod analysis;
pub mod band;
mod basis;
pub mod bulge;
pub mod cancel;
pub mod checkpoint;
mod core_svd;
mod dense;
pub mod difference_svd;
pub mod dtype;
pub mod effective_rank;
pub mod eigen;
pub mod error;
mod exponent;
pub mod gram;
mod gram_product;
pub mod hill;
mod jacobi;
pub mod low_rank;
pub mod marchenko_pastur;
pub mod matrix;
pub mod metrics;
pub mod number;
mod one_stage;
mod panel_qr;
pub mod panics;
pub mod parallel;
pub mod powerlaw;
pub mod product_svd;
mod ql_pipeline;
pub mod qr;
pub mod root_free_ql;
mod rounding;
pub mod safetensors;
pub mod safetensors_writer;
pub mod sampled;
pub mod select;
mod selected_eigen;
mod simd;
pub mod source;
pub mod spectrum;
mod stacked;
mod strips;
pub mod svd;
mod thin;
mod thin_gram;
mod triangular;
pub mod tridiag;
pub mod truncation;
mod twisted;
mod whole_file;
pub mod workspace;

pub use error::{Error, Result};

/// Runs the README's example as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
