//! Reduction of a dense symmetric matrix to a band (\[SBR\]).
//!
//! `A = Q B Q^T` with `B` of half-bandwidth `w` ([`WIDTH`]), by blocked Householder reflections (\[WY\]). A
//! panel of `w` columns is factored below its diagonal block, `P = (I - V T V^T) R`. The remaining matrix
//! becomes
//!
//! ```text
//! Q^T A Q = A - V W^T - W V^T,   W = X - V (T^T V^T X) / 2,   X = A V T
//! ```
//!
//! `A V` and the update take `2 n^2 w` operations each, at the speed of GEMM, and `4/3 n^3` in all. In a
//! one-stage reduction, half of the operations are bound by memory bandwidth. The update for one panel and
//! the product for the next are done strip by strip in one pass over the lower triangle, so that each strip
//! is loaded into cache once; only the next panel is updated before. Both triangles of diagonal blocks are
//! stored, as triangular products are slower than full ones.

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::{temp_mat_scratch, temp_mat_zeroed};
use faer::mat::AsMatMut;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{MatMut, MatRef};

use crate::eigen::band_layout::{WIDTH, position};
use crate::eigen::band_updates::{Updates, groups};
use crate::eigen::panel_qr::{factor_panel, factor_panel_scratch};
use crate::exec::cancel::CancelToken;
use crate::exec::parallel::Strategy;
use crate::exec::strips::{STRIP, each_row_strip};
use crate::kernels::number::{Number, padded};
use crate::kernels::simd::LINE;

/// Returns the memory for [`reduce_to_band`] of a matrix of order `n`.
#[must_use]
pub fn reduce_to_band_scratch<T: Number>(n: usize) -> StackReq {
    let updates = temp_mat_scratch::<T>(n, 3 * WIDTH);
    let reflections = StackReq::new_aligned::<T>(padded::<T>(n) * WIDTH, LINE);
    let products = temp_mat_scratch::<T>(WIDTH, n * groups(n));
    let small = temp_mat_scratch::<T>(WIDTH, WIDTH).array(3);
    StackReq::all_of(&[updates, reflections, products, small, factor_panel_scratch::<T>()])
}

/// Reduces a symmetric matrix to a band. Reads the lower triangle of `a (n, n)`, overwrites `a`, and writes
/// `band`, which has [`storage(n)`](crate::eigen::band_layout::storage) elements.
///
/// Under [`Strategy::Together`] the caller must run in the thread pool. After cancellation, which is polled
/// between panels, the band is unspecified.
pub fn reduce_to_band<T: Number>(
    mut a: MatMut<'_, T>,
    strategy: Strategy,
    cancel: &CancelToken,
    band: &mut [T],
    stack: &mut MemStack,
) {
    let n = a.nrows();
    band.fill(T::default());
    complete_diagonal_blocks(a.rb_mut());
    let (mut v_w_v, stack) = temp_mat_zeroed::<T, _, _>(n, 3 * WIDTH, stack);
    let (mut v, stack) = stack.make_aligned_with(padded::<T>(n) * WIDTH, LINE, |_| T::default());
    let (mut products, stack) = temp_mat_zeroed::<T, _, _>(WIDTH, n * groups(n), stack);
    let mut updates = Updates { v_w_v: v_w_v.as_mat_mut(), strategy };
    for panel in (0..n).step_by(WIDTH) {
        if cancel.is_cancelled() {
            return;
        }
        reduce_panel(a.rb_mut(), panel, &mut updates, (&mut v, products.as_mat_mut()), stack);
        store_columns(a.rb(), panel, band);
    }
}

/// Copies the lower triangle of every diagonal block to its upper triangle.
fn complete_diagonal_blocks<T: Number>(mut a: MatMut<'_, T>) {
    let n = a.nrows();
    for j in 0..n {
        for i in j + 1..n.min((j / STRIP + 1) * STRIP) {
            a[(j, i)] = a[(i, j)];
        }
    }
}

/// Reduces the columns of a panel, updates the columns after it with the previous panel, and replaces the
/// pending updates by those of this panel. `v` and `products` are reused by all panels.
fn reduce_panel<T: Number>(
    mut a: MatMut<'_, T>,
    panel: usize,
    updates: &mut Updates<'_, T>,
    (v, products): (&mut [T], MatMut<'_, T>),
    stack: &mut MemStack,
) {
    let n = a.nrows();
    let width = WIDTH.min(n - panel);
    let own = a.rb_mut().submatrix_mut(panel, panel, n - panel, width);
    each_row_strip(own, updates.strategy, |first, strip| {
        updates.subtract(strip, panel + first, panel);
    });
    let Some(below @ 1..) = (n - panel).checked_sub(WIDTH) else { return };
    let (first, count) = (panel + WIDTH, below.min(WIDTH));
    let (done, rest) = a.split_at_col_mut(first);
    let (mut t, stack) = temp_mat_zeroed::<T, _, _>(count, count, stack);
    let mut t = t.as_mat_mut();
    let stride = padded::<T>(below);
    let v = &mut v[..stride * WIDTH];
    factor_panel(done.submatrix_mut(first, panel, below, WIDTH), v, t.rb_mut(), stack);
    let v = MatRef::from_column_major_slice_with_stride(v, below, count, stride);
    let t = t.rb();

    let products = products.subcols_mut(0, below * groups(below));
    let products = updates.update_and_multiply(rest, first, v, products);
    updates.replace(products.rb(), v, t, first, stack);
}

/// Stores both triangles of the reduced columns of a panel.
fn store_columns<T: Number>(a: MatRef<'_, T>, panel: usize, band: &mut [T]) {
    let n = a.nrows();
    for j in panel..n.min(panel + WIDTH) {
        for i in j..n.min(j + WIDTH + 1) {
            let value = a[(i, j)];
            band[position(i, j)] = value;
            if i - j < WIDTH {
                band[position(j, i)] = value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use proptest::prelude::{ProptestConfig, proptest};

    use super::*;
    use crate::eigen::band_layout::storage;
    use crate::eigen::band_updates::SHORT;
    use crate::exec::parallel;
    use crate::exec::scratch::Scratch;

    /// Returns a dense symmetric matrix of pseudo-random entries, with NaN in the upper triangle, which must
    /// not be read.
    fn symmetric<T: Number>(n: usize, seed: usize) -> Mat<T> {
        Mat::from_fn(n, n, |i, j| {
            let value = ((i * 131 + j * 31 + i * j * 7 + seed) % 97) as f64 / 97.0 - 0.4;
            T::of(if i < j { f64::NAN } else { value })
        })
    }

    fn reduced<T: Number>(mut a: Mat<T>, strategy: Strategy) -> Vec<T> {
        let n = a.nrows();
        // NaN, to check that every element is written.
        let mut band = vec![T::of(f64::NAN); storage(n)];
        let mut scratch = Scratch::default();
        let stack = scratch.stack(reduce_to_band_scratch::<T>(n)).unwrap();
        reduce_to_band(a.as_mut(), strategy, &CancelToken::default(), &mut band, stack);
        band
    }

    fn eigenvalues(n: usize, at: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        let matrix = nalgebra::DMatrix::from_fn(n, n, |i, j| at(i.max(j), i.min(j)));
        let mut values: Vec<f64> = matrix.symmetric_eigenvalues().iter().copied().collect();
        values.sort_by(f64::total_cmp);
        values
    }

    fn assert_similar<T: Number>(n: usize, seed: usize, epsilon: f64) {
        let a = symmetric::<T>(n, seed);
        let band = reduced(a.clone(), Strategy::Alone);
        let expected = eigenvalues(n, |i, j| a[(i, j)].to_f64());
        let found = eigenvalues(n, |i, j| if i - j <= WIDTH { band[position(i, j)].to_f64() } else { 0.0 });
        let norm = expected.iter().fold(0.0f64, |norm, x| norm.max(x.abs()));
        for (x, y) in found.iter().zip(&expected) {
            assert!((x - y).abs() <= 8.0 * (n as f64).sqrt() * epsilon * norm, "order {n}: {x} {y}");
        }
        for j in 0..n {
            for i in j..n.min(j + WIDTH) {
                assert_eq!(band[position(i, j)].to_f64().to_bits(), band[position(j, i)].to_f64().to_bits());
            }
            let bulge = &band[position(j + WIDTH + 1, j)..position(j, j) + 2 * WIDTH];
            assert!(bulge.iter().all(|x| *x == T::default()), "the part for bulges is zero");
        }
    }

    #[test]
    fn eigenvalues_are_preserved_around_every_block_size() {
        for n in [1, 2, 31, 32, 33, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 160, 161, 200, 290] {
            assert_similar::<f64>(n, n, f64::EPSILON);
            assert_similar::<f32>(n, n, f64::from(f32::EPSILON));
        }
    }

    #[test]
    fn bits_are_independent_of_strategy_and_threads() {
        let n = 300;
        let alone = reduced(symmetric::<f64>(n, 5), Strategy::Alone);
        for threads in [1, 3] {
            let pool = parallel::pool(threads).unwrap();
            let together = pool.install(|| reduced(symmetric::<f64>(n, 5), Strategy::Together));
            assert!(alone.iter().zip(&together).all(|(x, y)| x.to_bits() == y.to_bits()));
        }
    }

    /// Checks the trace and the Frobenius norm, which similarity transformations preserve.
    #[test]
    fn long_strips_preserve_trace_and_norm() {
        let n = SHORT + 2 * STRIP + 5;
        let a = symmetric::<f64>(n, 3);
        let band = reduced(a.clone(), Strategy::Alone);
        let twice = |i: usize, j: usize| if i == j { 1.0 } else { 2.0 };
        let sums = |width: usize, at: &dyn Fn(usize, usize) -> f64| {
            let trace: f64 = (0..n).map(|i| at(i, i)).sum();
            let lower = (0..n).flat_map(|j| (j..n.min(j + width + 1)).map(move |i| (i, j)));
            (trace, lower.map(|(i, j)| twice(i, j) * at(i, j).powi(2)).sum::<f64>())
        };
        let (trace, squares) = sums(n, &|i, j| a[(i, j)]);
        let (found_trace, found_squares) = sums(WIDTH, &|i, j| band[position(i, j)]);
        assert!((found_trace - trace).abs() < 1e-13 * squares.sqrt() * (n as f64).sqrt());
        // A sum of more than a million squares, added one by one.
        assert!((found_squares / squares - 1.0).abs() < 1e-11);
    }

    #[test]
    fn low_rank_and_zero_matrices() {
        for n in [40, 129, 200] {
            let zero = reduced(Mat::<f64>::zeros(n, n), Strategy::Alone);
            assert!(zero.iter().all(|x| *x == 0.0));
            // All ones: one eigenvalue n, the others 0.
            let band = reduced(Mat::<f64>::from_fn(n, n, |_, _| 1.0), Strategy::Alone);
            let found = eigenvalues(n, |i, j| if i - j <= WIDTH { band[position(i, j)] } else { 0.0 });
            assert!((found[n - 1] - n as f64).abs() < 1e-12 * n as f64);
            assert!(found[..n - 1].iter().all(|x| x.abs() < 1e-12 * n as f64));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_order(n in 1usize..260, seed in 0usize..97) {
            assert_similar::<f64>(n, seed, f64::EPSILON);
        }
    }
}
