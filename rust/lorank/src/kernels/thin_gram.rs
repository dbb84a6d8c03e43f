//! Gram matrices of panels with few rows.
//!
//! For few rows, a general GEMM computes half of a product in more than half of the time. The panels are
//! those of [`thin_product`](crate::kernels::thin_product).
//!
//! Sums within a panel have the precision of its elements; sums over panels are float64. In float32 at most
//! [`SUMMANDS`] products are added, and two such sums, before they are widened. The error of the Gram matrix
//! is much smaller than that of float32 sums over all columns. The addition of two sums before widening
//! increases the error by a tenth.

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::kernels::number::Number;
use crate::kernels::simd::{dispatch, dispatch_halved};
use crate::kernels::thin_product::{HIGH, Panel};

/// Number of summands that are added in the precision of the elements before widening to float64: columns of
/// a column-major panel, or elements per lane of a row-major one.
pub(crate) const SUMMANDS: usize = 32;

/// Number of rows of a tile of inner products.
const ABOVE: usize = 4;

/// Adds `X X^T` to `G` for a padded column-major panel `X`: to the lower triangle of the row-major
/// `G (p, p)`, and to the rest of the tiles on its diagonal.
pub(crate) fn add_gram_of_columns<T: Number>(panel: &[T], p: usize, gram: &mut [f64]) {
    dispatch(GramOfColumns { panel, p, gram: &mut *gram, halves: false });
    if T::WIDEST > HIGH {
        dispatch_halved(GramOfColumns { panel, p, gram, halves: true });
    }
}

/// The lower triangle of a Gram matrix of rows, and the rest of the tiles on its diagonal, as one sum per
/// lane of a vector. Adding up the lanes after every panel would take a quarter of the time.
pub(crate) struct SumsOfRows<'a, T> {
    p: usize,
    lanes: usize,
    /// For every [`ABOVE`] rows, the products with each row in turn, lane by lane.
    sums: &'a mut [f64],
    number: PhantomData<T>,
}

/// Returns the largest length of the sums of `p` rows.
pub(crate) const fn sums_of_rows<T: Number>(p: usize) -> usize {
    place(p, 0) * T::WIDEST
}

impl<'a, T: Number> SumsOfRows<'a, T> {
    /// Creates sums for `p` rows, a multiple of [`ABOVE`], in `sums`: [`sums_of_rows`] zeros.
    pub(crate) fn new(p: usize, sums: &'a mut [f64]) -> Self {
        Self { p, lanes: dispatch(Lanes(PhantomData::<T>)), sums, number: PhantomData }
    }

    /// Adds `X X^T` for a padded row-major panel `X`.
    pub(crate) fn add(&mut self, panel: Panel<'_, T>) {
        dispatch(GramOfRows { panel, p: self.p, sums: self.sums });
    }

    /// Writes the lower triangle of the row-major `G (p, p)`, and the rest of the tiles on its diagonal.
    pub(crate) fn write(&self, gram: &mut [f64]) {
        for (i, line) in gram.chunks_exact_mut(self.p).enumerate() {
            for (j, g) in line.iter_mut().enumerate().take(i / ABOVE * ABOVE + ABOVE) {
                *g = self.sums[place(i, j) * self.lanes..][..self.lanes].iter().sum();
            }
        }
    }
}

/// Returns the index of the product of rows `i` and `j` in [`SumsOfRows`], in vectors.
const fn place(i: usize, j: usize) -> usize {
    let (tile, within) = (i / ABOVE, i % ABOVE);
    ABOVE * (ABOVE * (tile * (tile + 1) / 2) + j) + within
}

/// Query for the number of elements of a vector.
struct Lanes<T>(PhantomData<T>);

impl<T: Number> WithSimd for Lanes<T> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        T::lanes::<S>()
    }
}

struct GramOfColumns<'a, T> {
    panel: &'a [T],
    p: usize,
    gram: &'a mut [f64],
    /// True to add the columns that remain after whole vectors of any machine, false to add the others.
    halves: bool,
}

impl<T: Number> WithSimd for GramOfColumns<'_, T> {
    type Output = ();

    /// Adds outer products of columns.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { panel, p, gram, halves } = self;
        let lanes = T::lanes::<S>();
        for columns in panel.chunks(2 * SUMMANDS * p) {
            let (columns, others) = columns.split_at(columns.len().min(SUMMANDS * p));
            for i in (0..p).step_by(HIGH) {
                let whole = (i + HIGH) / T::WIDEST * T::WIDEST;
                let places = if halves { whole..i + HIGH } else { 0..whole };
                for j in places.step_by(lanes) {
                    let mut sums = outer_products::<T, S>(simd, columns, p, (i, j));
                    if !others.is_empty() {
                        let more = outer_products::<T, S>(simd, others, p, (i, j));
                        sums.iter_mut().zip(more).for_each(|(x, y)| *x = T::plus(simd, *x, y));
                    }
                    for (a, sum) in sums.iter().enumerate() {
                        let line = &mut gram[(i + a) * p + j..][..lanes];
                        add_widened(line, T::lanes_of::<S>(std::slice::from_ref(sum)));
                    }
                }
            }
        }
    }
}

struct GramOfRows<'a, T> {
    panel: Panel<'a, T>,
    p: usize,
    sums: &'a mut [f64],
}

impl<T: Number> WithSimd for GramOfRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Wider tiles read rows less often; their sums still fit into registers.
        if S::REGISTER_COUNT >= 32 { self.add_tiles::<4, S>(simd) } else { self.add_tiles::<2, S>(simd) }
    }
}

impl<T: Number> GramOfRows<'_, T> {
    /// Adds inner products of [`ABOVE`] rows with `BESIDE` rows, one vector of columns at a time.
    #[inline(always)]
    fn add_tiles<const BESIDE: usize, S: Simd>(self, simd: S) {
        let Self { panel: Panel { values, stride, cols }, p, sums } = self;
        let lanes = T::lanes::<S>();
        // float64 sums need no widening.
        let summands = if size_of::<T>() == size_of::<f64>() { cols } else { SUMMANDS };
        let length = summands * lanes;
        for i in (0..p).step_by(ABOVE) {
            for j in (0..i + ABOVE).step_by(BESIDE) {
                for first in (0..cols).step_by(2 * length) {
                    let (middle, end) = (cols.min(first + length), cols.min(first + 2 * length));
                    let rows = (&values[i * stride..], &values[j * stride..]);
                    let mut tile = inner_products::<BESIDE, T, S>(simd, rows, stride, first..middle);
                    if middle < end {
                        let more = inner_products::<BESIDE, T, S>(simd, rows, stride, middle..end);
                        for (tile, more) in tile.iter_mut().zip(&more) {
                            for (x, y) in tile.iter_mut().zip(more) {
                                *x = T::plus(simd, *x, *y);
                            }
                        }
                    }
                    let tile = T::lanes_of::<S>(tile.as_flattened());
                    add_widened(&mut sums[place(i, j) * lanes..][..tile.len()], tile);
                }
            }
        }
    }
}

/// Returns vectors of the given columns, for `ROWS` rows that begin `stride` elements apart.
#[inline(always)]
fn vectors_of<const ROWS: usize, T: Number, S: Simd>(
    values: &[T],
    stride: usize,
    columns: Range<usize>,
) -> [&[T::Vector<S>]; ROWS] {
    let mut rows: [&[T::Vector<S>]; ROWS] = [&[]; ROWS];
    for (a, row) in rows.iter_mut().enumerate() {
        *row = T::vectors::<S>(&values[a * stride..][columns.clone()]);
    }
    rows
}

/// Returns the products of [`ABOVE`] rows with `BESIDE` rows over the given columns.
#[inline(always)]
fn inner_products<const BESIDE: usize, T: Number, S: Simd>(
    simd: S,
    (above, beside): (&[T], &[T]),
    stride: usize,
    columns: Range<usize>,
) -> [[T::Vector<S>; ABOVE]; BESIDE] {
    let mut above = vectors_of::<ABOVE, T, S>(above, stride, columns.clone());
    let mut beside = vectors_of::<BESIDE, T, S>(beside, stride, columns);
    let mut sums = [[T::splat(simd, T::default()); ABOVE]; BESIDE];
    let vectors = beside[0].len();
    // Equal lengths remove bounds checks from the loop.
    for row in &mut above {
        *row = &row[..vectors];
    }
    for row in &mut beside {
        *row = &row[..vectors];
    }
    for k in 0..vectors {
        let mut left = [sums[0][0]; ABOVE];
        for (left, row) in left.iter_mut().zip(above) {
            *left = row[k];
        }
        for (sums, row) in sums.iter_mut().zip(beside) {
            for (sum, left) in sums.iter_mut().zip(left) {
                *sum = T::mul_add(simd, row[k], left, *sum);
            }
        }
    }
    sums
}

/// Adds numbers to float64 sums.
#[inline(always)]
fn add_widened<T: Number>(sums: &mut [f64], numbers: &[T]) {
    for (sum, x) in sums.iter_mut().zip(numbers) {
        *sum += x.to_f64();
    }
}

/// Returns the sums over all columns, of `p` elements each, of [`HIGH`] elements from `i` on times a vector
/// of elements from `j` on.
#[inline(always)]
fn outer_products<T: Number, S: Simd>(
    simd: S,
    columns: &[T],
    p: usize,
    (i, j): (usize, usize),
) -> [T::Vector<S>; HIGH] {
    let mut sums = [T::splat(simd, T::default()); HIGH];
    for column in columns.chunks_exact(p) {
        let vector = T::vectors::<S>(&column[j..j + T::lanes::<S>()])[0];
        for (sum, factor) in sums.iter_mut().zip(&column[i..i + HIGH]) {
            *sum = T::mul_add(simd, T::splat(simd, *factor), vector, *sum);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::simd::tests::on_every_path;
    use crate::kernels::thin_product::tests::integers;

    fn assert_grams<T: Number>(units: usize, depths: usize, seed: usize) {
        let (p, depth) = (units * T::WIDEST, depths * T::WIDEST);
        let rows: Vec<T> = integers(p * depth, seed);
        let columns: Vec<T> = (0..p * depth).map(|n| rows[n % p * depth + n / p]).collect();
        on_every_path(|path| {
            // Sums start at 1, to show that products are added.
            let mut memory = vec![0.0; sums_of_rows::<T>(p)];
            let (mut sums, mut of_columns) = (SumsOfRows::<T>::new(p, &mut memory), vec![1.0; p * p]);
            let lanes = sums.lanes;
            sums.sums.iter_mut().step_by(lanes).for_each(|lane| *lane = 1.0);
            sums.add(Panel { values: &rows, stride: depth, cols: depth });
            let mut of_rows = vec![0.0; p * p];
            sums.write(&mut of_rows);
            add_gram_of_columns(&columns, p, &mut of_columns);
            for i in 0..p {
                for j in 0..=i {
                    let product = |k: usize| rows[i * depth + k].to_f64() * rows[j * depth + k].to_f64();
                    let expected: f64 = 1.0 + (0..depth).map(product).sum::<f64>();
                    assert_eq!(of_rows[i * p + j].to_bits(), expected.to_bits(), "{path:?}");
                    assert_eq!(of_columns[i * p + j].to_bits(), expected.to_bits(), "{path:?}");
                }
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn both_layouts_give_the_gram_matrix(units in 1usize..5, depths in 1usize..5, seed in 0usize..1000) {
            assert_grams::<f64>(units, depths, seed);
            assert_grams::<f32>(units, depths, seed);
        }
    }

    #[test]
    fn sums_beyond_a_panel_are_widened() {
        // 1 + 2^-24 is not a float32: in one sum over all columns the small products would be lost.
        let (p, depth) = (f32::WIDEST, 64 * SUMMANDS * f32::WIDEST);
        let small = |n: usize| if n < p * SUMMANDS { 1.0f32 } else { 2f32.powi(-10) };
        let panel: Vec<f32> = (0..p * depth).map(small).collect();
        let mut gram = vec![0.0; p * p];
        add_gram_of_columns(&panel, p, &mut gram);
        let expected = SUMMANDS as f64 + (depth - SUMMANDS) as f64 * 2f64.powi(-20);
        assert_eq!(gram[0].to_bits(), expected.to_bits());
    }
}
