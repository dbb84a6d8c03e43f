//! Products of matrices with few rows, such as low-rank factors.
//!
//! A general GEMM packs its operands and works in tiles of a dozen or more rows. For 8 to 128 rows, packing
//! and partial tiles cost as much as the arithmetic. Here the sums of a tile stay in registers, and the
//! operands are read unpacked from a panel in cache.
//!
//! A panel holds some columns of a matrix `X (p, m)` with few rows. Panels of `X = A` are row-major. Panels
//! of `X = B^T` are column-major, since `B` is row-major. Both dimensions are padded with zeros to multiples
//! of [`Number::WIDEST`].
//!
//! The kernels use the widest vectors of the machine. The bits of a result depend only on the width of the
//! vectors and on the shapes.

// Without forced inlining, every vector instruction becomes a call, and kernels are 20 times slower
// (measured).
#![allow(clippy::inline_always)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::kernels::number::Number;
use crate::kernels::simd::{dispatch, dispatch_halved};

/// Largest number of rows for which these kernels are used.
pub(crate) const THIN: usize = 128;

/// Number of rows of a tile. The sums of a tile hide the latency of a multiplication and fit into 16
/// registers. Padded dimensions and [`Number::WIDEST`] are multiples of this number.
pub(crate) const HIGH: usize = 8;

/// Largest number of rows of a tile of a product with a transpose. With two vectors per row, the sums fill 24
/// of 32 registers; with one vector per row, they fill 12 of 16.
const TALLEST: usize = 12;

/// Computes `Y = L R` for padded row-major `L (rows, depth)` and `R (depth, cols)`, with `cols` a multiple of
/// half of [`Number::WIDEST`]. Rows of `Y` and `R` have the same stride. Elements of `Y` beyond `cols`
/// are not written.
pub(crate) fn multiply<T: Number>(left: &[T], right: Panel<'_, T>, out: &mut [T]) {
    let whole = right.cols / T::WIDEST * T::WIDEST;
    if whole > 0 {
        dispatch(Product { left, right, columns: 0..whole, out });
    }
    if whole < right.cols {
        dispatch_halved(Product { left, right, columns: whole..right.cols, out });
    }
}

/// Computes `Y = L^T R` for `L (depth, rows)` and `R (depth, cols)`, with `cols` a multiple of
/// [`Number::WIDEST`]. Rows of `Y` begin `stride` elements apart. Elements beyond `cols` are not written.
pub(crate) fn multiply_transposed<T: Number>(
    left: Panel<'_, T>,
    right: Panel<'_, T>,
    (out, stride): (&mut [T], usize),
) {
    dispatch(TransposedProduct { left, right, out, stride });
}

/// Adds `L^T R` to `Y` for `L (depth, cols)`, with `cols` a multiple of [`HIGH`]. `R (depth, width)` and
/// `Y (cols, width)` are row-major, with `width` equal to [`Number::WIDEST`].
pub(crate) fn add_outer_products<T: Number>(left: Panel<'_, T>, right: &[T], out: &mut [T]) {
    dispatch(OuterProducts { left, right, out });
}

/// Adds `L R` to `Y` for `L (rows, cols)`, with `rows` a multiple of [`HIGH`]. `R (cols, width)` and
/// `Y (rows, width)` are row-major, with `width` equal to [`Number::WIDEST`].
pub(crate) fn add_row_products<T: Number>(left: Panel<'_, T>, right: &[T], out: &mut [T]) {
    dispatch(RowProducts { left, right, out });
}

/// A matrix whose rows begin `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a, T> {
    pub values: &'a [T],
    pub stride: usize,
    pub cols: usize,
}

struct Product<'a, T> {
    left: &'a [T],
    right: Panel<'a, T>,
    columns: Range<usize>,
    out: &'a mut [T],
}

impl<T: Number> WithSimd for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { left, right: Panel { values, stride, .. }, columns, out } = self;
        let (depth, lanes) = (values.len() / stride, T::lanes::<S>());
        for (i, lines) in out.chunks_exact_mut(HIGH * stride).enumerate() {
            let rows = rows_of(&left[i * HIGH * depth..], depth, depth);
            for j in columns.clone().step_by(lanes) {
                let sums = row_products::<T, S>(simd, rows, &values[j..], stride);
                for (line, sum) in lines.chunks_exact_mut(stride).zip(&sums) {
                    line[j..j + lanes].copy_from_slice(T::lanes_of::<S>(std::slice::from_ref(sum)));
                }
            }
        }
    }
}

struct TransposedProduct<'a, T> {
    left: Panel<'a, T>,
    right: Panel<'a, T>,
    out: &'a mut [T],
    /// Distance between rows of `out`, in elements.
    stride: usize,
}

impl<T: Number> WithSimd for TransposedProduct<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 { self.multiply::<2, S>(simd) } else { self.multiply::<1, S>(simd) }
    }
}

impl<T: Number> TransposedProduct<'_, T> {
    /// Multiplies in tiles that are `BESIDE` vectors wide. The tiles divide the rows as evenly as possible,
    /// so that no tile contains padding.
    #[inline(always)]
    fn multiply<const BESIDE: usize, S: Simd>(mut self, simd: S) {
        let height = self.left.cols;
        let tiles = height.div_ceil(TALLEST);
        for tile in 0..tiles {
            let rows = height * tile / tiles..height * (tile + 1) / tiles;
            // With a constant height, the sums stay in registers.
            match rows.len() {
                1 => self.tile::<1, BESIDE, S>(simd, rows.start),
                2 => self.tile::<2, BESIDE, S>(simd, rows.start),
                3 => self.tile::<3, BESIDE, S>(simd, rows.start),
                4 => self.tile::<4, BESIDE, S>(simd, rows.start),
                5 => self.tile::<5, BESIDE, S>(simd, rows.start),
                6 => self.tile::<6, BESIDE, S>(simd, rows.start),
                7 => self.tile::<7, BESIDE, S>(simd, rows.start),
                8 => self.tile::<8, BESIDE, S>(simd, rows.start),
                9 => self.tile::<9, BESIDE, S>(simd, rows.start),
                10 => self.tile::<10, BESIDE, S>(simd, rows.start),
                11 => self.tile::<11, BESIDE, S>(simd, rows.start),
                12 => self.tile::<12, BESIDE, S>(simd, rows.start),
                _ => {}
            }
        }
    }

    #[inline(always)]
    fn tile<const ROWS: usize, const BESIDE: usize, S: Simd>(&mut self, simd: S, first: usize) {
        let wide = BESIDE * T::lanes::<S>();
        let whole = self.right.cols / wide * wide;
        for j in (0..whole).step_by(wide) {
            self.strip::<ROWS, BESIDE, S>(simd, first, j);
        }
        for j in (whole..self.right.cols).step_by(T::lanes::<S>()) {
            self.strip::<ROWS, 1, S>(simd, first, j);
        }
    }

    /// Computes `ROWS` rows of `BESIDE` vectors, beginning at row `first` and column `j`.
    #[inline(always)]
    fn strip<const ROWS: usize, const BESIDE: usize, S: Simd>(&mut self, simd: S, first: usize, j: usize) {
        let Panel { values, stride, .. } = self.right;
        let left = (&self.left.values[first..], self.left.stride);
        let sums = column_products::<ROWS, BESIDE, T, S>(simd, left, (&values[j..], stride));
        for (line, sums) in self.out[first * self.stride..].chunks_exact_mut(self.stride).zip(&sums) {
            line[j..j + BESIDE * T::lanes::<S>()].copy_from_slice(T::lanes_of::<S>(sums));
        }
    }
}

struct OuterProducts<'a, T> {
    left: Panel<'a, T>,
    right: &'a [T],
    out: &'a mut [T],
}

impl<T: Number> WithSimd for OuterProducts<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { left: Panel { values, stride, cols }, right, out } = self;
        let lanes = T::lanes::<S>();
        for i in (0..cols).step_by(HIGH) {
            for j in (0..T::WIDEST).step_by(lanes) {
                let mut sums = [T::splat(simd, T::default()); HIGH];
                for (left, right) in values[i..].chunks(stride).zip(right.chunks_exact(T::WIDEST)) {
                    let vector = T::vectors::<S>(&right[j..j + lanes])[0];
                    for (sum, factor) in sums.iter_mut().zip(&left[..HIGH]) {
                        *sum = T::mul_add(simd, T::splat(simd, *factor), vector, *sum);
                    }
                }
                add_tile::<T, S>(simd, &sums, &mut out[i * T::WIDEST + j..]);
            }
        }
    }
}

struct RowProducts<'a, T> {
    left: Panel<'a, T>,
    right: &'a [T],
    out: &'a mut [T],
}

impl<T: Number> WithSimd for RowProducts<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { left: Panel { values, stride, cols }, right, out } = self;
        let lanes = T::lanes::<S>();
        for i in (0..out.len() / T::WIDEST).step_by(HIGH) {
            let rows = rows_of(&values[i * stride..], stride, cols);
            for j in (0..T::WIDEST).step_by(lanes) {
                let sums = row_products::<T, S>(simd, rows, &right[j..], T::WIDEST);
                add_tile::<T, S>(simd, &sums, &mut out[i * T::WIDEST + j..]);
            }
        }
    }
}

/// Returns [`HIGH`] rows that begin `stride` elements apart. Their equal lengths remove bounds checks from
/// loops.
#[inline(always)]
fn rows_of<T>(values: &[T], stride: usize, length: usize) -> [&[T]; HIGH] {
    let mut rows = [&values[..length]; HIGH];
    for (a, row) in rows.iter_mut().enumerate() {
        *row = &values[a * stride..][..length];
    }
    rows
}

/// Adds a vector to the beginning of each of [`HIGH`] rows of [`Number::WIDEST`] elements.
#[inline(always)]
fn add_tile<T: Number, S: Simd>(simd: S, sums: &[T::Vector<S>; HIGH], out: &mut [T]) {
    for (line, sum) in out.chunks_mut(T::WIDEST).zip(sums) {
        let place = &mut T::vectors_mut::<S>(&mut line[..T::lanes::<S>()])[0];
        *place = T::plus(simd, *place, *sum);
    }
}

/// Returns a vector for each of [`HIGH`] rows: the sum over `k` of the row's `k`-th element times the first
/// vector of the `k`-th row of `right`.
#[inline(always)]
fn row_products<T: Number, S: Simd>(
    simd: S,
    rows: [&[T]; HIGH],
    right: &[T],
    stride: usize,
) -> [T::Vector<S>; HIGH] {
    let mut sums = [T::splat(simd, T::default()); HIGH];
    for (k, row) in right.chunks(stride).enumerate().take(rows[0].len()) {
        let vector = T::vectors::<S>(&row[..T::lanes::<S>()])[0];
        for (sum, left) in sums.iter_mut().zip(&rows) {
            *sum = T::mul_add(simd, T::splat(simd, left[k]), vector, *sum);
        }
    }
    sums
}

/// Returns the sums over `k` of the first `ROWS` elements of the `k`-th row of `left` times `BESIDE` vectors
/// of the `k`-th row of `right`. All elements of `left` are addressed from one pointer, whereas
/// [`row_products`] needs one pointer per row.
#[inline(always)]
fn column_products<const ROWS: usize, const BESIDE: usize, T: Number, S: Simd>(
    simd: S,
    (left, left_stride): (&[T], usize),
    (right, stride): (&[T], usize),
) -> [[T::Vector<S>; BESIDE]; ROWS] {
    let mut sums = [[T::splat(simd, T::default()); BESIDE]; ROWS];
    for (left, right) in left.chunks(left_stride).zip(right.chunks(stride)) {
        let vectors = &T::vectors::<S>(&right[..BESIDE * T::lanes::<S>()])[..BESIDE];
        for (sums, factor) in sums.iter_mut().zip(&left[..ROWS]) {
            let factor = T::splat(simd, *factor);
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = T::mul_add(simd, factor, *vector, *sum);
            }
        }
    }
    sums
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::simd::tests::on_every_path;

    /// Returns small integers, whose products add up exactly in any order.
    pub(crate) fn integers<T: Number>(count: usize, seed: usize) -> Vec<T> {
        (0..count).map(|i| T::of((((i + seed) * 7919) % 101) as f64 - 50.0)).collect()
    }

    fn assert_product<T: Number>((rows, cols): (usize, usize), depth: usize) {
        let (rows, cols) = (rows * HIGH, cols * T::WIDEST / 2);
        let (left, right): (Vec<T>, Vec<T>) = (integers(rows * depth, 1), integers(depth * cols, 2));
        on_every_path(|_| {
            let mut out = vec![T::of(f64::NAN); rows * cols];
            let right_view = Panel { values: &right, stride: cols, cols };
            multiply(&left, right_view, &mut out);
            for i in 0..rows {
                for j in 0..cols {
                    let product = |k: usize| left[i * depth + k].to_f64() * right[k * cols + j].to_f64();
                    let expected: f64 = (0..depth).map(product).sum();
                    // Adding 0 makes negative zero positive.
                    assert_eq!((out[i * cols + j].to_f64() + 0.0).to_bits(), (expected + 0.0).to_bits());
                }
            }
        });
    }

    fn assert_transposed_product<T: Number>((rows, width): (usize, usize), depth: usize) {
        let (cols, stride) = (width * T::WIDEST, (width + 1) * T::WIDEST);
        let (left, right): (Vec<T>, Vec<T>) = (integers(depth * rows, 1), integers(depth * stride, 2));
        on_every_path(|path| {
            let mut out = vec![T::of(0.5); rows * stride];
            let panel = |values, stride, cols| Panel { values, stride, cols };
            multiply_transposed(panel(&left, rows, rows), panel(&right, stride, cols), (&mut out, stride));
            for (n, found) in out.iter().enumerate() {
                let (i, j) = (n / stride, n % stride);
                let product = |k: usize| left[k * rows + i].to_f64() * right[k * stride + j].to_f64();
                let expected = if j < cols { (0..depth).map(product).sum() } else { 0.5 };
                assert_eq!((found.to_f64() + 0.0).to_bits(), (expected + 0.0).to_bits(), "{path:?}");
            }
        });
    }

    /// Checks that [`add_outer_products`] and [`add_row_products`] add their products to the existing values.
    fn assert_narrow_products<T: Number>(rows: usize, depth: usize, gap: usize) {
        let (rows, width, stride) = (rows * HIGH, T::WIDEST, rows * HIGH + gap);
        let at = |values: &[T], i: usize| values[i].to_f64();
        let tall: Vec<T> = integers(depth * stride, 3);
        let right: Vec<T> = integers(depth * width, 4);
        let wide: Vec<T> = integers(rows * (depth + gap), 5);
        on_every_path(|path| {
            let (mut outer, mut inner) = (vec![T::of(1.0); rows * width], vec![T::of(1.0); rows * width]);
            let left = Panel { values: &tall, stride, cols: rows };
            add_outer_products(left, &right, &mut outer);
            let left = Panel { values: &wide, stride: depth + gap, cols: depth };
            add_row_products(left, &right, &mut inner);
            for i in 0..rows {
                for j in 0..width {
                    let by = |left: &dyn Fn(usize) -> f64| -> f64 {
                        (0..depth).map(|k| left(k) * at(&right, k * width + j)).sum()
                    };
                    let expected = 1.0 + by(&|k| at(&tall, k * stride + i));
                    assert_eq!(at(&outer, i * width + j).to_bits(), expected.to_bits(), "{path:?}");
                    let expected = 1.0 + by(&|k| at(&wide, i * (depth + gap) + k));
                    assert_eq!(at(&inner, i * width + j).to_bits(), expected.to_bits(), "{path:?}");
                }
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn transposed_product_is_exact(rows in 1usize..40, width in 1usize..6, depth in 1usize..20) {
            assert_transposed_product::<f64>((rows, width), depth);
            assert_transposed_product::<f32>((rows, width), depth);
        }

        #[test]
        fn products_are_added_to_existing_values(rows in 1usize..4, depth in 1usize..20, gap in 0usize..5) {
            assert_narrow_products::<f64>(rows, depth, gap);
            assert_narrow_products::<f32>(rows, depth, gap);
        }

        #[test]
        fn product_is_exact(shape in (1usize..5, 1usize..8), depth in 1usize..20) {
            assert_product::<f64>(shape, depth);
            assert_product::<f32>(shape, depth);
        }
    }
}
