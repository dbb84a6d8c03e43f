//! Spectra of matrices whose eigenvalues are known, or that nalgebra computes in another way.

mod accuracy;
mod analysis;
mod dtypes;
mod fast;
mod marchenko_pastur;
mod matrices;
mod range;
mod sampled;
mod threads;
