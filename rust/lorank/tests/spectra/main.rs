//! Tests of spectra against known eigenvalues and against nalgebra.

mod accuracy;
mod analysis;
mod dtypes;
mod fast;
mod marchenko_pastur;
mod matrices;
mod range;
mod sampled;
mod threads;
