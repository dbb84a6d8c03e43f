//! The spectrum of a matrix, and its statistics.

pub mod effective_rank;
pub mod hill;
pub mod marchenko_pastur;
pub mod metrics;
pub mod powerlaw;
mod sort;
pub mod spectrum;
