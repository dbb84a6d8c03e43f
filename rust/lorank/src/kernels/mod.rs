//! Vectorised kernels, and small dense operations.

pub(crate) mod dense;
pub(crate) mod exponent;
pub(crate) mod number;
pub(crate) mod simd;
pub(crate) mod thin_gram;
pub(crate) mod thin_product;
