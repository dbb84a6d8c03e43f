//! Products of matrices with few rows, as low-rank factors are.
//!
//! A general GEMM packs its operands and works in tiles of 12 rows; for 8 to 32 rows packing and
//! the odd rows cost more than the arithmetic. Here the sums of a tile stay in registers while the
//! operands stream unpacked from a panel in cache: with AVX2, 8 multiplications of vectors for
//! every 6 loads, so that arithmetic is the bound.
//!
//! The vectors are the widest that the machine has, chosen at run time. The bits of a result
//! depend on that choice and on shapes alone.

// Measured: left to the compiler's judgement, every vector instruction becomes a call, 20 times slower.
#![allow(clippy::inline_always)]

use pulp::{Arch, Simd, WithSimd};

/// Rows up to which these kernels are used.
pub(crate) const THIN: usize = 32;

/// Panels are padded with zeros to multiples of this in both directions: of every vector's length.
pub(crate) const UNIT: usize = 8;

/// Rows of a tile.
pub(crate) const HIGH: usize = 4;

/// `G += X X^T` for a padded panel `X (p, depth)`, row-major: the lower triangle of `G (p, p)`,
/// row-major, and what shares a tile with it.
pub(crate) fn add_gram_of_rows(x: &[f64], p: usize, gram: &mut [f64]) {
    Arch::new().dispatch(GramOfRows { x, p, gram });
}

/// `G += X X^T` for a padded panel `X (p, depth)`, column-major, as [`add_gram_of_rows`].
pub(crate) fn add_gram_of_columns(x: &[f64], p: usize, gram: &mut [f64]) {
    Arch::new().dispatch(GramOfColumns { x, p, gram });
}

/// `Y = L R` for padded `L (rows, depth)` of any strides and `R (depth, cols)` and `Y (rows, cols)`, row-major.
pub(crate) fn multiply(left: Strided<'_>, right: &[f64], cols: usize, out: &mut [f64]) {
    Arch::new().dispatch(Product { left, right, cols, out });
}

/// A matrix with its element `(i, k)` at `i * stride + k * step`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub values: &'a [f64],
    pub stride: usize,
    pub step: usize,
}

struct GramOfRows<'a> {
    x: &'a [f64],
    p: usize,
    gram: &'a mut [f64],
}

impl WithSimd for GramOfRows<'_> {
    type Output = ();

    /// Inner products of rows, a vector's length of columns at a time.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const WIDE: usize = 2;
        let Self { x, p, gram } = self;
        let depth = x.len() / p;
        let row = |i: usize| S::as_simd_f64s(&x[i * depth..(i + 1) * depth]).0;
        let vectors = depth / S::F64_LANES;
        for i in (0..p).step_by(HIGH) {
            let above: [_; HIGH] = std::array::from_fn(|a| &row(i + a)[..vectors]);
            for j in (0..i + HIGH).step_by(WIDE) {
                let beside: [_; WIDE] = std::array::from_fn(|b| &row(j + b)[..vectors]);
                let mut tile = [[simd.splat_f64s(0.0); WIDE]; HIGH];
                for k in 0..vectors {
                    let right = [beside[0][k], beside[1][k]];
                    for a in 0..HIGH {
                        let left = above[a][k];
                        for b in 0..WIDE {
                            tile[a][b] = simd.mul_add_e_f64s(left, right[b], tile[a][b]);
                        }
                    }
                }
                for a in 0..HIGH {
                    for b in 0..WIDE {
                        gram[(i + a) * p + j + b] += simd.reduce_sum_f64s(tile[a][b]);
                    }
                }
            }
        }
    }
}

struct GramOfColumns<'a> {
    x: &'a [f64],
    p: usize,
    gram: &'a mut [f64],
}

impl WithSimd for GramOfColumns<'_> {
    type Output = ();

    /// Outer products of columns.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, p, gram } = self;
        let depth = x.len() / p;
        for i in (0..p).step_by(HIGH) {
            for j in (0..i + HIGH).step_by(UNIT) {
                let left = Strided { values: &x[i..], stride: 1, step: p };
                let mut sums = [0.0; HIGH * UNIT];
                tile(simd, left, &x[j..], p, depth, &mut sums, UNIT);
                for (a, sums) in sums.chunks_exact(UNIT).enumerate() {
                    let line = &mut gram[(i + a) * p + j..][..UNIT];
                    line.iter_mut().zip(sums).for_each(|(g, sum)| *g += sum);
                }
            }
        }
    }
}

struct Product<'a> {
    left: Strided<'a>,
    right: &'a [f64],
    cols: usize,
    out: &'a mut [f64],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { left, right, cols, out } = self;
        let depth = right.len() / cols;
        for i in (0..out.len() / cols).step_by(HIGH) {
            for j in (0..cols).step_by(UNIT) {
                let left = Strided { values: &left.values[i * left.stride..], ..left };
                tile(simd, left, &right[j..], cols, depth, &mut out[i * cols + j..], cols);
            }
        }
    }
}

/// Writes the sums `sum_k left[i, k] * right[k * cols + j]` of `HIGH` rows and `UNIT` columns.
#[inline(always)]
fn tile<S: Simd>(
    simd: S,
    left: Strided<'_>,
    right: &[f64],
    cols: usize,
    depth: usize,
    out: &mut [f64],
    out_cols: usize,
) {
    match S::F64_LANES {
        8.. => vectors::<S, 1>(simd, left, right, cols, depth, out, out_cols),
        4.. => vectors::<S, 2>(simd, left, right, cols, depth, out, out_cols),
        2.. => vectors::<S, 4>(simd, left, right, cols, depth, out, out_cols),
        _ => vectors::<S, UNIT>(simd, left, right, cols, depth, out, out_cols),
    }
}

#[inline(always)]
fn vectors<S: Simd, const WIDE: usize>(
    simd: S,
    left: Strided<'_>,
    right: &[f64],
    cols: usize,
    depth: usize,
    out: &mut [f64],
    out_cols: usize,
) {
    let mut tile = [[simd.splat_f64s(0.0); WIDE]; HIGH];
    for k in 0..depth {
        let right = S::as_simd_f64s(&right[k * cols..][..UNIT]).0;
        for (i, sums) in tile.iter_mut().enumerate() {
            let factor = simd.splat_f64s(left.values[i * left.stride + k * left.step]);
            for (sum, vector) in sums.iter_mut().zip(right) {
                *sum = simd.mul_add_e_f64s(factor, *vector, *sum);
            }
        }
    }
    for (i, sums) in tile.iter().enumerate() {
        S::as_mut_simd_f64s(&mut out[i * out_cols..][..UNIT]).0.copy_from_slice(sums);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Small integers: their products add up exactly, in any order.
    fn integers(count: usize, seed: usize) -> Vec<f64> {
        (0..count).map(|i| (((i + seed) * 7919) % 101) as f64 - 50.0).collect()
    }

    proptest! {
        #[test]
        fn both_layouts_give_the_gram_matrix(units in 1usize..5, depths in 1usize..5, seed in 0usize..1000) {
            let (p, depth) = (units * UNIT, depths * UNIT);
            let rows = integers(p * depth, seed);
            let columns: Vec<f64> = (0..p * depth).map(|n| rows[n % p * depth + n / p]).collect();
            // What was there stays.
            let (mut of_rows, mut of_columns) = (vec![1.0; p * p], vec![1.0; p * p]);
            add_gram_of_rows(&rows, p, &mut of_rows);
            add_gram_of_columns(&columns, p, &mut of_columns);
            for i in 0..p {
                for j in 0..=i {
                    let product: f64 = (0..depth).map(|k| rows[i * depth + k] * rows[j * depth + k]).sum();
                    prop_assert_eq!(of_rows[i * p + j].to_bits(), (1.0 + product).to_bits());
                    prop_assert_eq!(of_columns[i * p + j].to_bits(), (1.0 + product).to_bits());
                }
            }
        }

        #[test]
        fn products((rows, cols) in (1usize..5, 1usize..4), depth in 1usize..20, by_columns in any::<bool>()) {
            let (rows, cols) = (rows * HIGH, cols * UNIT);
            let (left, right) = (integers(rows * depth, 1), integers(depth * cols, 2));
            let (stride, step) = if by_columns { (1, rows) } else { (depth, 1) };
            let mut out = vec![f64::NAN; rows * cols];
            multiply(Strided { values: &left, stride, step }, &right, cols, &mut out);
            for i in 0..rows {
                for j in 0..cols {
                    let sum: f64 = (0..depth).map(|k| left[i * stride + k * step] * right[k * cols + j]).sum();
                    // Adding 0 makes one zero of the two.
                    prop_assert_eq!((out[i * cols + j] + 0.0).to_bits(), (sum + 0.0).to_bits());
                }
            }
        }
    }
}
