//! Gram matrices of panels with few rows.
//!
//! Half of a Gram matrix by a general GEMM costs more than half of a product where rows are few, as in
//! [`thin`](crate::kernels::thin_product), whose panels these are.
//!
//! Sums over the columns of a panel are of its kind of number, sums over panels are float64: in float32,
//! where two sums of [`SUMMANDS`] products at most are added before they are widened, a Gram matrix is off by
//! less than a float32 sum over all columns by far. The one addition of the two adds a tenth to their error.

// Measured: left to the compiler's judgement, every vector instruction becomes a call, 20 times slower.
#![allow(clippy::inline_always)]

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::kernels::number::Number;
use crate::kernels::simd::{dispatch, dispatch_halved};
use crate::kernels::thin_product::{HIGH, Panel};

/// Numbers of a kind that are added up before they are widened to float64: rows of a panel that lies column
/// by column, or numbers per lane of one that lies row by row.
pub(crate) const SUMMANDS: usize = 32;

/// Rows of a tile of inner products.
const ABOVE: usize = 4;

/// `G += X X^T` for a padded panel of whole columns, one after the other: the lower triangle of `G (p, p)`,
/// row-major, and what shares a tile with it.
pub(crate) fn add_gram_of_columns<T: Number>(panel: &[T], p: usize, gram: &mut [f64]) {
    dispatch(GramOfColumns { panel, p, gram: &mut *gram, halves: false });
    if T::WIDEST > HIGH {
        dispatch_halved(GramOfColumns { panel, p, gram, halves: true });
    }
}

/// The lower triangle of a Gram matrix of rows, and what shares a tile with it, before the lanes of vectors are
/// summed up: to do so after every panel would take a quarter of the time.
pub(crate) struct SumsOfRows<'a, T> {
    p: usize,
    lanes: usize,
    /// For every [`ABOVE`] rows, their products with one row after the other, lane by lane.
    sums: &'a mut [f64],
    number: PhantomData<T>,
}

/// Numbers that the sums of `p` rows take at most.
pub(crate) const fn sums_of_rows<T: Number>(p: usize) -> usize {
    place(p, 0) * T::WIDEST
}

impl<'a, T: Number> SumsOfRows<'a, T> {
    /// Of `p` rows, a multiple of [`ABOVE`]; `sums` are [`sums_of_rows`] zeros.
    pub(crate) fn new(p: usize, sums: &'a mut [f64]) -> Self {
        Self { p, lanes: dispatch(Lanes(PhantomData::<T>)), sums, number: PhantomData }
    }

    /// `G += X X^T` for a padded panel of rows.
    pub(crate) fn add(&mut self, panel: Panel<'_, T>) {
        dispatch(GramOfRows { panel, p: self.p, sums: self.sums });
    }

    /// Writes the lower triangle of `G (p, p)`, row-major, and what shares a tile with it.
    pub(crate) fn write(&self, gram: &mut [f64]) {
        for (i, line) in gram.chunks_exact_mut(self.p).enumerate() {
            for (j, g) in line.iter_mut().enumerate().take(i / ABOVE * ABOVE + ABOVE) {
                *g = self.sums[place(i, j) * self.lanes..][..self.lanes].iter().sum();
            }
        }
    }
}

/// Where the product of two rows is among those of [`SumsOfRows`].
const fn place(i: usize, j: usize) -> usize {
    let (tile, within) = (i / ABOVE, i % ABOVE);
    ABOVE * (ABOVE * (tile * (tile + 1) / 2) + j) + within
}

/// How many numbers a vector has.
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
    /// Whether what is left of rows after whole vectors of any machine is added, or that which they fill.
    halves: bool,
}

impl<T: Number> WithSimd for GramOfColumns<'_, T> {
    type Output = ();

    /// Outer products of columns.
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
        // The wider a tile, the less often rows are read; its sums stay in registers.
        if S::REGISTER_COUNT >= 32 { self.add_tiles::<4, S>(simd) } else { self.add_tiles::<2, S>(simd) }
    }
}

impl<T: Number> GramOfRows<'_, T> {
    /// Inner products of [`ABOVE`] rows with `BESIDE` rows, a vector's length of columns at a time.
    #[inline(always)]
    fn add_tiles<const BESIDE: usize, S: Simd>(self, simd: S) {
        let Self { panel: Panel { values, stride, cols }, p, sums } = self;
        let lanes = T::lanes::<S>();
        // Nothing is lost by longer sums of float64.
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

/// Some of the columns of rows that begin `stride` numbers apart.
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

/// The products of some columns of rows with those of other rows.
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
    // Of one length, so that no index is checked within the loop.
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

/// Adds numbers to as many of float64.
#[inline(always)]
fn add_widened<T: Number>(sums: &mut [f64], numbers: &[T]) {
    for (sum, x) in sums.iter_mut().zip(numbers) {
        *sum += x.to_f64();
    }
}

/// The sums over all columns, `p` numbers each, of [`HIGH`] numbers from `i` on times a vector's length from
/// `j` on.
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
            // What was there stays.
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
        // 1 + 2^-24 is no float32: in one sum over all columns the small ones would be lost.
        let (p, depth) = (f32::WIDEST, 64 * SUMMANDS * f32::WIDEST);
        let small = |n: usize| if n < p * SUMMANDS { 1.0f32 } else { 2f32.powi(-10) };
        let panel: Vec<f32> = (0..p * depth).map(small).collect();
        let mut gram = vec![0.0; p * p];
        add_gram_of_columns(&panel, p, &mut gram);
        let expected = SUMMANDS as f64 + (depth - SUMMANDS) as f64 * 2f64.powi(-20);
        assert_eq!(gram[0].to_bits(), expected.to_bits());
    }
}
