//! QR decomposition of a panel of [`WIDTH`] columns by Householder reflections in blocked form (\[WY\]).
//!
//! Reflection `j` maps the remaining column `j`, `(alpha, x)`, onto its first axis:
//!
//! ```text
//! H_j = I - tau v v^T,   v = (1, x / (alpha - beta)),   beta = -sign(alpha) ||(alpha, x)||,
//! tau = (beta - alpha) / beta,   H_0 H_1 ... = I - V T V^T,
//! T_jj = tau_j,   T_(0..j, j) = -tau_j T_(0..j, 0..j) V_(0..j)^T v_j
//! ```
//!
//! Reading the columns of a panel takes longer than the arithmetic. Therefore each reflection reads a column
//! once: the same pass updates the column with the previous reflection and multiplies it with `x`, from which
//! the next reflection is made. Four columns are processed together. A zero `x` is reflected as well, with
//! `tau = 2`.

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

use faer::MatMut;
use faer::dyn_stack::{MemStack, StackReq};
use faer::prelude::{Reborrow, ReborrowMut};
use pulp::{Simd, WithSimd};

use crate::eigen::band_layout::WIDTH;
use crate::kernels::number::{Number, padded};
use crate::kernels::simd::{LINE, dispatch};
use crate::kernels::thin_gram::{SumsOfRows, sums_of_rows};
use crate::kernels::thin_product::Panel;

/// Number of columns processed together.
const BESIDE: usize = 4;

/// Returns the memory for [`factor_panel`].
pub(crate) fn factor_panel_scratch<T: Number>() -> StackReq {
    StackReq::new_aligned::<f64>(sums_of_rows::<T>(WIDTH), LINE)
}

/// Factors `panel (m, WIDTH)`. Its upper triangle becomes `R`; the rest is then unspecified. Writes `V`, with
/// ones on the diagonal and zeros above, to the column-major `v`, whose columns have [`padded`]`(m)`
/// elements, and the upper triangle of `T` to `t (k, k)`, for `k = min(m, WIDTH)` reflections.
pub(crate) fn factor_panel<T: Number>(
    panel: MatMut<'_, T>,
    v: &mut [T],
    t: MatMut<'_, T>,
    stack: &mut MemStack,
) {
    let (rows, stride) = (panel.nrows(), padded::<T>(panel.nrows()));
    for (j, column) in v.chunks_exact_mut(stride).enumerate() {
        let (own, padding) = column.split_at_mut(rows);
        padding.fill(T::default());
        own.iter_mut().zip(panel.rb().col(j).iter()).for_each(|(to, from)| *to = *from);
    }
    let mut r = [T::default(); WIDTH * WIDTH];
    dispatch(Factor { v: &mut *v, stride, rows, r: &mut r });
    for (column, r) in panel.col_iter_mut().zip(r.chunks_exact(WIDTH)) {
        column.iter_mut().zip(r).for_each(|(to, from)| *to = *from);
    }
    let (mut memory, _) = stack.make_aligned_with(sums_of_rows::<T>(WIDTH), LINE, |_| 0.0);
    let mut sums = SumsOfRows::<T>::new(WIDTH, &mut memory);
    sums.add(Panel { values: v, stride, cols: stride });
    let mut gram = [0.0; WIDTH * WIDTH];
    sums.write(&mut gram);
    write_products(&gram, t);
}

/// Computes `T` from the lower triangle of the row-major `V^T V`.
fn write_products<T: Number>(gram: &[f64], mut t: MatMut<'_, T>) {
    let mut columns = [[0.0; WIDTH]; WIDTH];
    for (j, products) in gram.chunks_exact(WIDTH).enumerate() {
        let tau = 2.0 / products[j];
        let (done, own) = columns.split_at_mut(j);
        let Some(own) = own.first_mut().filter(|_| j < t.ncols()) else { return };
        for (column, product) in done.iter().zip(products) {
            for (sum, x) in own.iter_mut().zip(column) {
                *sum -= tau * product * x;
            }
        }
        own[j] = tau;
        t.rb_mut().col_mut(j).iter_mut().zip(own).for_each(|(to, from)| *to = T::of(*from));
    }
}

struct Factor<'a, T> {
    v: &'a mut [T],
    stride: usize,
    rows: usize,
    /// Columns of `R`.
    r: &'a mut [T; WIDTH * WIDTH],
}

impl<T: Number> WithSimd for Factor<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { v, stride, rows, r } = self;
        let reflections = rows.min(WIDTH);
        // Multiples of the latest v that the remaining columns lose.
        let mut weights = [T::default(); WIDTH];
        for j in 0..reflections {
            // v is zero above this row.
            let first = j.saturating_sub(1) / T::WIDEST * T::WIDEST;
            let (done, others) = v.split_at_mut((j + 1) * stride);
            let (before, x) = done.split_at_mut(j * stride);
            let before = before.chunks_exact(stride).next_back().map(|before| &before[first..]);
            if let Some(before) = before {
                subtract::<T, S>(simd, &mut x[first..], before, weights[j]);
            }
            let r = &mut r[j * WIDTH..][..=j];
            r.copy_from_slice(&x[..=j]);
            x[..=j].fill(T::default());

            let tail = &mut x[first..];
            // The first column has no predecessor; all weights are zero.
            let before = before.unwrap_or(tail);
            let mut products = [T::default(); WIDTH];
            let (own, products) = products[j..].split_at_mut(1);
            own[0] = dot::<T, S>(simd, tail, tail);
            advance::<T, S>(simd, others, (stride, first), (before, tail), &weights[j + 1..], products);

            let reflection = Reflection::of(r[j], own[0]);
            r[j] = reflection.beta;
            let columns = others.chunks_exact(stride).zip(products);
            for (weight, (column, product)) in weights[j + 1..].iter_mut().zip(columns) {
                *weight = reflection.tau * (column[j] + reflection.scale * *product);
            }
            for x in tail {
                *x *= reflection.scale;
            }
            x[j] = T::of(1.0);
        }
        for c in reflections..WIDTH {
            let (done, others) = v.split_at_mut(c * stride);
            let (last, column) = (&done[(reflections - 1) * stride..][..stride], &mut others[..stride]);
            subtract::<T, S>(simd, column, last, weights[c]);
            r[c * WIDTH..][..rows].copy_from_slice(&column[..rows]);
            column.fill(T::default());
        }
    }
}

/// Subtracts multiples of `before` from columns, from row `first` on, and computes their products with `x`.
#[inline(always)]
fn advance<T: Number, S: Simd>(
    simd: S,
    columns: &mut [T],
    (stride, first): (usize, usize),
    (before, x): (&[T], &[T]),
    weights: &[T],
    products: &mut [T],
) {
    let groups = columns.chunks_mut(BESIDE * stride);
    for ((columns, weights), products) in groups.zip(weights.chunks(BESIDE)).zip(products.chunks_mut(BESIDE))
    {
        if columns.len() == BESIDE * stride {
            products.copy_from_slice(&advance_four::<T, S>(simd, columns, first, (before, x), weights));
            continue;
        }
        for ((column, weight), product) in columns.chunks_exact_mut(stride).zip(weights).zip(products) {
            subtract::<T, S>(simd, &mut column[first..], before, *weight);
            *product = dot::<T, S>(simd, &column[first..], x);
        }
    }
}

/// The reflection of `(alpha, x)` onto its first axis.
pub(crate) struct Reflection<T> {
    pub beta: T,
    pub tau: T,
    /// `1 / (alpha - beta)`
    pub scale: T,
}

impl<T: Number> Reflection<T> {
    /// Computes the reflection from `alpha` and the sum of squares of `x`.
    #[inline(always)]
    pub(crate) fn of(alpha: T, squares: T) -> Self {
        if squares < T::SMALLEST {
            return Self { beta: -alpha, tau: T::of(2.0), scale: T::default() };
        }
        let norm = (alpha * alpha + squares).root();
        let beta = if alpha > T::default() { -norm } else { norm };
        Self { beta, tau: (beta - alpha) / beta, scale: T::of(1.0) / (alpha - beta) }
    }
}

/// Subtracts `weight` times a vector from a column.
#[inline(always)]
pub(crate) fn subtract<T: Number, S: Simd>(simd: S, column: &mut [T], vector: &[T], weight: T) {
    let weight = T::splat(simd, -weight);
    for (x, v) in T::vectors_mut::<S>(column).iter_mut().zip(T::vectors::<S>(vector)) {
        *x = T::mul_add(simd, weight, *v, *x);
    }
}

/// Returns `x^T y`.
#[inline(always)]
pub(crate) fn dot<T: Number, S: Simd>(simd: S, x: &[T], y: &[T]) -> T {
    let mut sum = T::splat(simd, T::default());
    for (x, y) in T::vectors::<S>(x).iter().zip(T::vectors::<S>(y)) {
        sum = T::mul_add(simd, *x, *y, sum);
    }
    T::sum(simd, sum)
}

/// Does the work of [`advance`] for four columns, each of which is read once.
#[inline(always)]
fn advance_four<T: Number, S: Simd>(
    simd: S,
    columns: &mut [T],
    first: usize,
    (before, x): (&[T], &[T]),
    weights: &[T],
) -> [T; BESIDE] {
    let (before, x) = (T::vectors::<S>(before), T::vectors::<S>(x));
    // Equal lengths remove bounds checks from the loop.
    let (count, stride) = (before.len(), columns.len() / BESIDE);
    let x = &x[..count];
    let (left, right) = columns.split_at_mut(2 * stride);
    let (a, b) = left.split_at_mut(stride);
    let (c, d) = right.split_at_mut(stride);
    let mut columns = [
        &mut T::vectors_mut::<S>(&mut a[first..])[..count],
        &mut T::vectors_mut::<S>(&mut b[first..])[..count],
        &mut T::vectors_mut::<S>(&mut c[first..])[..count],
        &mut T::vectors_mut::<S>(&mut d[first..])[..count],
    ];
    let zero = T::splat(simd, T::default());
    let (mut sums, mut factors) = ([zero; BESIDE], [zero; BESIDE]);
    for (factor, weight) in factors.iter_mut().zip(weights) {
        *factor = T::splat(simd, -*weight);
    }
    for i in 0..count {
        for ((column, factor), sum) in columns.iter_mut().zip(&factors).zip(&mut sums) {
            let left = T::mul_add(simd, *factor, before[i], column[i]);
            column[i] = left;
            *sum = T::mul_add(simd, left, x[i], *sum);
        }
    }
    let mut products = [T::default(); BESIDE];
    for (product, sum) in products.iter_mut().zip(sums) {
        *product = T::sum(simd, sum);
    }
    products
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use faer::dyn_stack::MemBuffer;
    use proptest::prelude::{ProptestConfig, proptest};

    use super::*;
    use crate::kernels::simd::tests::on_every_path;

    /// Checks that `Q` is orthogonal, that `Q R` is the panel, and that `V` has ones on the diagonal and
    /// zeros above.
    fn assert_factors<T: Number>(rows: usize, at: impl Fn(usize, usize) -> f64) {
        let panel = Mat::from_fn(rows, WIDTH, |i, j| T::of(at(i, j)));
        let (stride, count) = (padded::<T>(rows), rows.min(WIDTH));
        on_every_path(|path| {
            let (mut r, mut t) = (panel.clone(), Mat::zeros(count, count));
            let mut v = vec![T::of(f64::NAN); stride * WIDTH];
            let mut memory = MemBuffer::new(factor_panel_scratch::<T>());
            factor_panel(r.as_mut(), &mut v, t.as_mut(), MemStack::new(&mut memory));
            let v = Mat::from_fn(rows, count, |i, j| v[j * stride + i].to_f64());
            for j in 0..count {
                assert!((0..j).all(|i| v[(i, j)] == 0.0), "{path:?}");
                assert_eq!(v[(j, j)].to_bits(), 1f64.to_bits(), "{path:?}");
            }
            let t = Mat::from_fn(count, count, |i, j| t[(i, j)].to_f64());
            let r = Mat::from_fn(rows, WIDTH, |i, j| if i <= j { r[(i, j)].to_f64() } else { 0.0 });
            let q = Mat::<f64>::identity(rows, rows) - &v * &t * v.transpose();
            let norm = (0..WIDTH).flat_map(|j| (0..rows).map(move |i| (i, j)));
            let norm = norm.map(|(i, j)| panel[(i, j)].to_f64().powi(2)).sum::<f64>().sqrt();
            // On scalars ||v||^2 <= 2 is one sum over all rows, with an error of half an epsilon per term at
            // most.
            let allowed = (16.0 + rows as f64) * T::EPSILON;
            let off = (q.transpose() * &q - Mat::<f64>::identity(rows, rows)).norm_max();
            assert!(off <= allowed, "{rows} rows, {path:?}: Q^T Q is off by {off:e}");
            let off = (q * r - Mat::from_fn(rows, WIDTH, |i, j| panel[(i, j)].to_f64())).norm_max();
            assert!(off <= allowed * norm.max(1e-100), "{rows} rows, {path:?}: Q R is off by {off:e}");
        });
    }

    fn assert_both(rows: usize, at: impl Fn(usize, usize) -> f64) {
        assert_factors::<f64>(rows, &at);
        assert_factors::<f32>(rows, &at);
    }

    fn dense(i: usize, j: usize) -> f64 {
        ((i * 131 + j * 31 + i * j * 7) % 97) as f64 / 97.0 - 0.4
    }

    #[test]
    fn panels_of_every_number_of_rows() {
        for rows in (1..70).chain([96, 127, 128, 129, 300]) {
            assert_both(rows, dense);
        }
    }

    #[test]
    fn columns_without_entries_to_reflect() {
        for rows in [1, 5, 32, 33, 80] {
            assert_both(rows, |_, _| 0.0);
            assert_both(rows, |_, _| 1.0);
            assert_both(rows, |i, j| if i == j { -2.0 } else { 0.0 });
            assert_both(rows, |i, j| if i <= j { dense(i, j) } else { 0.0 });
            assert_both(rows, |i, j| dense(i, j % 3));
            assert_both(rows, |i, j| dense(i, j) * if j % 2 == 0 { 1.0 } else { 1e-200 });
            assert_both(rows, |i, j| dense(i, j) * 0.5f64.powi(i32::try_from(4 * j).unwrap()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_panel(rows in 1usize..200, seed in 0usize..97) {
            assert_both(rows, |i, j| dense(i + seed, j + 3 * seed));
        }
    }
}
