//! Vectorised kernels and the arithmetic that they are written in.

pub(crate) mod dense;
pub(crate) mod exponent;
pub(crate) mod number;
pub(crate) mod simd;
pub(crate) mod thin_gram;
pub(crate) mod thin_product;
