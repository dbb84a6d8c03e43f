//! Symmetric band matrices: how they are stored, and the reduction of a dense matrix to one.
//!
//! `A = Q B Q^T` with `B` of half-bandwidth `w` ([`WIDTH`]), by blocked Householder reflections. A panel of
//! `w` columns is factored below its diagonal block, `P = (I - V C^-1 V^T) R`; the rest becomes
//!
//! ```text
//! Q^T A Q = A - V W^T - W V^T,   W = X - V (C^-T V^T X) / 2,   X = A V C^-1
//! ```
//!
//! `A V` and the update are `2 n^2 w` operations each and run at the speed of GEMM: `4/3 n^3` in all,
//! where the one-stage reduction does half of them at the speed of memory. Updates of [`PANELS`] panels are
//! applied together, so that memory is passed over seldom; until then panels and products are corrected
//! for what is due. `A` is kept whole, not as a triangle: products with a transposed operand take twice
//! as long as mirroring does.

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch};
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::linalg::{temp_mat_scratch, temp_mat_zeroed};
use faer::mat::AsMatMut;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par, Spec};

use crate::mirror::mirror;
use crate::number::Number;
use crate::parallel::Strategy;
use crate::strips::{both, each_column_strip, each_row_strip};

/// Half-bandwidth. More makes the dense reduction's products a little faster, and the reduction of the
/// band slower in proportion: measured best from 500 to 4096.
pub(crate) const WIDTH: usize = 32;

/// Numbers stored of a column: `WIDTH` above the diagonal, `2 * WIDTH` from it on, where bulges need room.
pub(crate) const COLUMN: usize = 3 * WIDTH;

/// Panels whose updates are applied together.
const PANELS: usize = 4;

/// Where entry `(i, j)` of a band is stored, for `-WIDTH <= i - j < 2 * WIDTH`.
pub(crate) const fn position(i: usize, j: usize) -> usize {
    j * COLUMN + WIDTH + i - j
}

/// Numbers that a band of order `n` is stored in: blocks that reach beyond the matrix find zeros there.
pub(crate) const fn storage(n: usize) -> usize {
    (n + WIDTH) * COLUMN
}

/// The memory that [`reduce_to_band`] of a matrix of order `n` needs.
pub(crate) fn reduce_to_band_scratch<T: Number>(n: usize) -> StackReq {
    let updates = temp_mat_scratch::<T>(n, PANELS * WIDTH).array(2);
    let product = temp_mat_scratch::<T>(WIDTH, n);
    let small = temp_mat_scratch::<T>(WIDTH, WIDTH).array(2);
    let corrections = temp_mat_scratch::<T>(PANELS * WIDTH, WIDTH).array(2);
    let factor = qr_in_place_scratch::<T>(n, WIDTH, WIDTH, Par::Seq, Spec::default());
    StackReq::all_of(&[updates, product, small, corrections, factor])
}

/// Reduces the symmetric matrix in the lower triangle of `a`, `(n, n)`, and writes `band`, of
/// [`storage`]`(n)` numbers. What `a` held is lost.
///
/// Under [`Strategy::Together`] this must run inside the thread pool that it may use.
pub(crate) fn reduce_to_band<T: Number>(
    mut a: MatMut<'_, T>,
    strategy: Strategy,
    band: &mut [T],
    stack: &mut MemStack,
) {
    let n = a.nrows();
    band.fill(T::default());
    let (mut v, stack) = temp_mat_zeroed::<T, _, _>(n, PANELS * WIDTH, stack);
    let (mut w, stack) = temp_mat_zeroed::<T, _, _>(n, PANELS * WIDTH, stack);
    for first in (0..n).step_by(PANELS * WIDTH) {
        let mut block = a.rb_mut().submatrix_mut(first, first, n - first, n - first);
        mirror(block.rb_mut(), strategy);
        let mut due = Updates {
            v: v.as_mat_mut().subrows_mut(first, n - first),
            w: w.as_mat_mut().subrows_mut(first, n - first),
            strategy,
        };
        due.v.fill(T::default());
        due.w.fill(T::default());
        let columns = block.ncols().min(PANELS * WIDTH);
        for panel in (0..columns).step_by(WIDTH) {
            reduce_panel(block.rb_mut(), panel, &mut due, stack);
        }
        store_columns(block.rb(), columns, first, band);
        due.subtract_from_rest(block, columns);
    }
}

/// Reduces the columns from `panel` on to those of a band, and notes what the others owe to it.
fn reduce_panel<T: Number>(
    mut block: MatMut<'_, T>,
    panel: usize,
    due: &mut Updates<'_, T>,
    stack: &mut MemStack,
) {
    let rows = block.nrows() - panel;
    due.subtract_from_panel(block.rb_mut().submatrix_mut(panel, panel, rows, WIDTH.min(rows)), panel);
    let Some(below @ 1..) = rows.checked_sub(WIDTH) else { return };
    let count = below.min(WIDTH);
    let (mut coefficients, stack) = temp_mat_zeroed::<T, _, _>(WIDTH, WIDTH, stack);
    let mut coefficients = coefficients.as_mat_mut().subcols_mut(0, count);

    let (done, rest) = block.split_at_col_mut(panel + WIDTH);
    let mut factored = done.submatrix_mut(panel + WIDTH, panel, below, WIDTH);
    qr_in_place(factored.rb_mut(), coefficients.rb_mut(), Par::Seq, stack, Spec::default());
    let reflections = due.v.rb_mut().submatrix_mut(panel + WIDTH, panel, below, count);
    copy_unit_lower(factored.rb().subcols(0, count), reflections);

    let (mut x, stack) = temp_mat_zeroed::<T, _, _>(count, below, stack);
    let mut x = x.as_mat_mut();
    let coefficients = coefficients.rb().subrows(0, count);
    due.multiply(rest.rb().subrows(panel + WIDTH, below), coefficients, panel, x.rb_mut(), stack);
    due.complete(x.rb(), coefficients, panel, stack);
}

/// Writes the unit lower triangle of `from` to `to`; what lies above it in `to` stays.
fn copy_unit_lower<T: Number>(from: MatRef<'_, T>, mut to: MatMut<'_, T>) {
    for j in 0..to.ncols() {
        to[(j, j)] = T::of(1.0);
        for i in j + 1..to.nrows() {
            to[(i, j)] = from[(i, j)];
        }
    }
}

/// What is still to be subtracted: `V W^T + W V^T`. Rows are those of the block at hand.
struct Updates<'a, T> {
    v: MatMut<'a, T>,
    w: MatMut<'a, T>,
    strategy: Strategy,
}

impl<T: Number> Updates<'_, T> {
    /// `V` and `W` of the panels before `panel`, rows from `first` on.
    fn before(&self, panel: usize, first: usize) -> [MatRef<'_, T>; 2] {
        [&self.v, &self.w].map(|x| x.rb().submatrix(first, 0, x.nrows() - first, panel))
    }

    /// Brings a panel up to date, from its diagonal block down.
    fn subtract_from_panel(&self, target: MatMut<'_, T>, panel: usize) {
        let [v, w] = self.before(panel, panel);
        let width = target.ncols();
        each_row_strip(target, self.strategy, |first, mut strip| {
            for (x, y) in [(v, w), (w, v)] {
                let (left, right) = (x.subrows(first, strip.nrows()), y.subrows(0, width));
                subtract(strip.rb_mut(), left, right.transpose());
            }
        });
    }

    /// `X^T = C^-T V^T A` for the panel's `V`, where `A` is `rest` as it would be after these updates.
    fn multiply(
        &self,
        rest: MatRef<'_, T>,
        coefficients: MatRef<'_, T>,
        panel: usize,
        x: MatMut<'_, T>,
        stack: &mut MemStack,
    ) {
        let (first, count) = (panel + WIDTH, x.nrows());
        let own = self.v.rb().submatrix(first, panel, rest.nrows(), count).transpose();
        let [v, w] = self.before(panel, first);
        let (mut by_v, stack) = temp_mat_zeroed::<T, _, _>(count, panel, stack);
        let (mut by_w, _) = temp_mat_zeroed::<T, _, _>(count, panel, stack);
        let (mut by_v, mut by_w) = (by_v.as_mat_mut(), by_w.as_mat_mut());
        both(
            self.strategy,
            || matmul(by_v.rb_mut(), Accum::Replace, own, v, T::of(1.0), Par::Seq),
            || matmul(by_w.rb_mut(), Accum::Replace, own, w, T::of(1.0), Par::Seq),
        );
        let (by_v, by_w) = (by_v.rb(), by_w.rb());
        each_column_strip(x, self.strategy, |first, mut strip| {
            let width = strip.ncols();
            matmul(strip.rb_mut(), Accum::Replace, own, rest.subcols(first, width), T::of(1.0), Par::Seq);
            for (x, y) in [(by_v, w), (by_w, v)] {
                subtract(strip.rb_mut(), x, y.subrows(first, width).transpose());
            }
            solve_lower_triangular_in_place(coefficients.transpose(), strip, Par::Seq);
        });
    }

    /// `W = X - V (C^-T V^T X) / 2` for the panel.
    fn complete(
        &mut self,
        x: MatRef<'_, T>,
        coefficients: MatRef<'_, T>,
        panel: usize,
        stack: &mut MemStack,
    ) {
        let (count, rows) = (x.nrows(), x.ncols());
        let v = self.v.rb().submatrix(panel + WIDTH, panel, rows, count);
        let (mut inner, _) = temp_mat_zeroed::<T, _, _>(count, count, stack);
        let mut inner = inner.as_mat_mut();
        matmul(inner.rb_mut(), Accum::Replace, v.transpose(), x.transpose(), T::of(1.0), Par::Seq);
        solve_lower_triangular_in_place(coefficients.transpose(), inner.rb_mut(), Par::Seq);
        let inner = inner.rb();
        let w = self.w.rb_mut().submatrix_mut(panel + WIDTH, panel, rows, count);
        each_row_strip(w, self.strategy, |first, mut strip| {
            let rows = strip.nrows();
            strip.copy_from(x.subcols(first, rows).transpose());
            matmul(strip, Accum::Add, v.subrows(first, rows), inner, T::of(-0.5), Par::Seq);
        });
    }

    /// Subtracts from what follows `columns` columns, below the diagonal.
    fn subtract_from_rest(&self, block: MatMut<'_, T>, columns: usize) {
        let rest = block.nrows() - columns;
        let [v, w] = self.before(columns, columns);
        let target = block.submatrix_mut(columns, columns, rest, rest);
        each_column_strip(target, self.strategy, |first, strip| {
            let width = strip.ncols();
            let (mut diagonal, mut below) = strip.subrows_mut(first, rest - first).split_at_row_mut(width);
            for (x, y) in [(v, w), (w, v)] {
                let right = y.subrows(first, width).transpose();
                subtract_lower(diagonal.rb_mut(), x.subrows(first, width), right);
                let left = x.subrows(first + width, below.nrows());
                subtract(below.rb_mut(), left, right);
            }
        });
    }
}

/// `target -= left right`
fn subtract<T: Number>(target: MatMut<'_, T>, left: MatRef<'_, T>, right: MatRef<'_, T>) {
    matmul(target, Accum::Add, left, right, -T::of(1.0), Par::Seq);
}

/// The same for the lower triangle of a square.
fn subtract_lower<T: Number>(target: MatMut<'_, T>, left: MatRef<'_, T>, right: MatRef<'_, T>) {
    let full = BlockStructure::Rectangular;
    let lower = BlockStructure::TriangularLower;
    triangular_matmul(target, lower, Accum::Add, left, full, right, full, -T::of(1.0), Par::Seq);
}

/// Stores reduced columns, both triangles of them; `first` is the index of the block's first.
fn store_columns<T: Number>(block: MatRef<'_, T>, columns: usize, first: usize, band: &mut [T]) {
    let n = block.nrows();
    for j in 0..columns {
        for i in j..n.min(j + WIDTH + 1) {
            let value = block[(i, j)];
            band[position(first + i, first + j)] = value;
            if i - j < WIDTH {
                band[position(first + j, first + i)] = value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use proptest::prelude::{ProptestConfig, proptest};

    use super::*;
    use crate::parallel;
    use crate::workspace::Scratch;

    /// Symmetric, dense, from a small linear congruence; NaN above the diagonal, which must not be read.
    fn symmetric<T: Number>(n: usize, seed: usize) -> Mat<T> {
        Mat::from_fn(n, n, |i, j| {
            let value = ((i * 131 + j * 31 + i * j * 7 + seed) % 97) as f64 / 97.0 - 0.4;
            T::of(if i < j { f64::NAN } else { value })
        })
    }

    fn reduced<T: Number>(mut a: Mat<T>, strategy: Strategy) -> Vec<T> {
        let n = a.nrows();
        // Memory that holds NaN, to show that all of it is written.
        let mut band = vec![T::of(f64::NAN); storage(n)];
        let mut scratch = Scratch::default();
        let stack = scratch.stack(reduce_to_band_scratch::<T>(n)).unwrap();
        reduce_to_band(a.as_mut(), strategy, &mut band, stack);
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
            assert!(bulge.iter().all(|x| *x == T::default()), "room for bulges is empty");
        }
    }

    #[test]
    fn eigenvalues_survive_around_every_edge() {
        for n in [1, 2, 31, 32, 33, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 160, 161, 200, 290] {
            assert_similar::<f64>(n, n, f64::EPSILON);
            assert_similar::<f32>(n, n, f64::from(f32::EPSILON));
        }
    }

    #[test]
    fn strategies_agree_to_the_bit_on_any_number_of_threads() {
        let n = 300;
        let alone = reduced(symmetric::<f64>(n, 5), Strategy::Alone);
        for threads in [1, 3] {
            let pool = parallel::pool(threads).unwrap();
            let together = pool.install(|| reduced(symmetric::<f64>(n, 5), Strategy::Together));
            assert!(alone.iter().zip(&together).all(|(x, y)| x.to_bits() == y.to_bits()));
        }
    }

    #[test]
    fn low_rank_and_zero() {
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
