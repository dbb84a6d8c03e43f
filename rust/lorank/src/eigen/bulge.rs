//! Reduction of a band to tridiagonal form by bulge chasing (\[LANG\]).
//!
//! Sweep `s` reflects column `s` of the band onto its first entry below the diagonal. The reflection changes
//! the diagonal block of its rows and fills the block below. The first column of that block is reflected in
//! turn, and so on to the end of the band; the other columns of the block are left to later sweeps, which
//! start one column further. With `w` = [`WIDTH`] this takes `7 n^2 w` operations, on unaligned blocks in the
//! level-1 cache.
//!
//! Step `k` of a sweep depends only on step `k + 1` of the sweep before. Steps are grouped in tiles of
//! [`SWEEPS`] sweeps and [`STEPS`] steps, with each sweep one step behind its predecessor; the data of a tile
//! fit into the level-2 cache. Tile `(g, c)` depends on `(g, c - 1)` and `(g - 1, c + 1)`. Tiles with equal
//! `c + 2 g` touch different columns and run in parallel.

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

use std::mem::take;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::eigen::band_layout::{COLUMN, WIDTH, position};
use crate::exec::cancel::CancelToken;
use crate::exec::parallel::Strategy;
use crate::kernels::number::Number;
use crate::kernels::simd::dispatch_halved;

/// Number of sweeps of a tile.
const SWEEPS: usize = 8;

/// Number of steps of a tile, at least [`SWEEPS`].
const STEPS: usize = 8;

/// Least number of tiles of a wave that threads share. Fewer are finished before another thread wakes up.
const SHARED_FROM: usize = 3;

/// The latest reflection `I - tau v v^T` of a sweep.
#[derive(Clone, Copy)]
struct Reflection<T> {
    v: [T; WIDTH],
    tau: T,
}

/// Reduces a band of order `n`, stored as described at [`position`], to tridiagonal form in place. All but
/// the diagonal and the first off-diagonals is then unspecified.
///
/// Under [`Strategy::Together`] the caller must run in the thread pool. After cancellation the band is
/// unspecified.
pub fn reduce_to_tridiagonal<T: Number>(band: &mut [T], n: usize, strategy: Strategy, cancel: &CancelToken) {
    let sweeps = n.saturating_sub(2);
    let mut reflections = vec![Reflection { v: [T::default(); WIDTH], tau: T::default() }; sweeps];
    let groups = sweeps.div_ceil(SWEEPS);
    let tiles = (n.div_ceil(WIDTH) + SWEEPS).div_ceil(STEPS);
    for wave in (0..tiles + 2 * groups).take_while(|_| !cancel.is_cancelled()) {
        let work = tiles_of_wave(wave, tiles, n, band, &mut reflections);
        match strategy {
            Strategy::Together if work.len() >= SHARED_FROM => {
                work.into_par_iter().with_max_len(1).for_each(dispatch_halved);
            }
            Strategy::Alone | Strategy::Together => work.into_iter().for_each(dispatch_halved),
        }
    }
}

/// Returns the tiles `(g, wave - 2 g)`, each with the columns and the reflections that only it touches.
fn tiles_of_wave<'a, T: Number>(
    wave: usize,
    tiles: usize,
    n: usize,
    band: &'a mut [T],
    reflections: &'a mut [Reflection<T>],
) -> Vec<Tile<'a, T>> {
    let mut rest = band;
    let mut work = Vec::new();
    // Later groups of sweeps use earlier columns: columns are split off from the end.
    for (group, reflections) in reflections.chunks_mut(SWEEPS).enumerate().take(wave / 2 + 1) {
        let (index, first_sweep) = (wave - 2 * group, group * SWEEPS);
        let columns = columns_of(first_sweep, index);
        if index >= tiles || columns.start >= n {
            continue;
        }
        let end = (columns.end * COLUMN).min(rest.len());
        let (head, _) = take(&mut rest).split_at_mut(end);
        let (head, band) = head.split_at_mut(columns.start * COLUMN);
        rest = head;
        work.push(Tile { band, first_column: columns.start, n, first_sweep, index, reflections });
    }
    work
}

/// Returns the columns that a tile reads or writes.
fn columns_of(first_sweep: usize, index: usize) -> Range<usize> {
    let start = match index {
        0 => first_sweep,
        // The last sweep of the tile is the furthest behind.
        _ => first_sweep + SWEEPS + (index * STEPS + 1 - SWEEPS) * WIDTH,
    };
    start..first_sweep + 1 + (index + 1) * STEPS * WIDTH
}

struct Tile<'a, T> {
    band: &'a mut [T],
    first_column: usize,
    n: usize,
    first_sweep: usize,
    index: usize,
    reflections: &'a mut [Reflection<T>],
}

impl<T: Number> WithSimd for Tile<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A column fills this number of vectors, a constant that keeps them in registers.
        match WIDTH / T::lanes::<S>() {
            2 => self.chase::<S, 2>(simd),
            4 => self.chase::<S, 4>(simd),
            8 => self.chase::<S, 8>(simd),
            16 => self.chase::<S, 16>(simd),
            _ => self.chase::<S, WIDTH>(simd),
        }
    }
}

impl<T: Number> Tile<'_, T> {
    #[inline(always)]
    fn chase<S: Simd, const VECTORS: usize>(self, simd: S) {
        let offset = self.first_column * COLUMN;
        for (behind, reflection) in self.reflections.iter_mut().enumerate() {
            let sweep = self.first_sweep + behind;
            if self.index == 0 {
                let column = &mut self.band[position(sweep + 1, sweep) - offset..][..WIDTH];
                let x = load::<T, S, VECTORS>(simd, column);
                *reflection = reflect::<T, S, VECTORS>(simd, &x, column);
            }
            let steps = (self.index * STEPS).saturating_sub(behind)..(self.index + 1) * STEPS - behind;
            for row in steps.map(|k| sweep + 1 + k * WIDTH).take_while(|row| *row < self.n) {
                let columns = &mut self.band[row * COLUMN - offset..][..WIDTH * COLUMN];
                *reflection = step::<T, S, VECTORS>(simd, columns, *reflection);
            }
        }
    }
}

/// Reflects the column `x` onto its first axis, writes its image to `column`, and returns the reflection.
#[inline(always)]
fn reflect<T: Number, S: Simd, const VECTORS: usize>(
    simd: S,
    x: &[T::Vector<S>; VECTORS],
    column: &mut [T],
) -> Reflection<T> {
    let (zero, one) = (T::default(), T::of(1.0));
    let mut axis = [zero; WIDTH];
    axis[0] = one;
    let axis = load::<T, S, VECTORS>(simd, &axis);
    let head = T::lanes_of::<S>(x)[0];
    let mut tail = *x;
    tail[0] = T::mul_add(simd, T::splat(simd, -head), axis[0], tail[0]);
    let squares = dot::<T, S, VECTORS>(simd, &tail, &tail);
    let (image, scale, tau) = if squares < T::SMALLEST {
        (head, zero, zero)
    } else {
        let norm = (head * head + squares).root();
        let image = if head > zero { -norm } else { norm };
        (image, one / (head - image), (image - head) / image)
    };
    column.fill(zero);
    column[0] = image;
    let scale = T::splat(simd, scale);
    for (x, axis) in tail.iter_mut().zip(axis) {
        *x = T::mul_add(simd, scale, *x, axis);
    }
    Reflection { v: stored::<T, S, VECTORS>(&tail), tau }
}

/// Applies a reflection to the diagonal block at the beginning of `columns`, from both sides, and to the
/// block below. Reflects the first column of that block, and returns this next reflection.
#[inline(always)]
fn step<T: Number, S: Simd, const VECTORS: usize>(
    simd: S,
    columns: &mut [T],
    by: Reflection<T>,
) -> Reflection<T> {
    let Reflection { v, tau } = by;
    mirror_last_row(columns);
    let v_vectors = load::<T, S, VECTORS>(simd, &v);
    let tau_vector = T::splat(simd, tau);

    // E - y v^T with y = tau E v. The first column comes first, as the critical path depends on it.
    let mut y = combine::<T, S, VECTORS>(simd, columns, 2 * WIDTH, &v);
    let first = &mut columns[2 * WIDTH..3 * WIDTH];
    let mut x = load::<T, S, VECTORS>(simd, first);
    for (x, y) in x.iter_mut().zip(&mut y) {
        *y = T::times(simd, tau_vector, *y);
        *x = T::mul_add(simd, T::splat(simd, -T::of(1.0)), *y, *x);
    }
    let next = reflect::<T, S, VECTORS>(simd, &x, first);

    // D - v w^T - w v^T with w = tau D v - tau^2 (v^T D v) v / 2.
    let by_v = combine::<T, S, VECTORS>(simd, columns, WIDTH, &v);
    let half = T::of(0.5) * tau * tau * dot::<T, S, VECTORS>(simd, &by_v, &v_vectors);
    let half = T::splat(simd, -half);
    let mut w_vectors = v_vectors;
    for (w, d) in w_vectors.iter_mut().zip(by_v) {
        *w = T::mul_add(simd, tau_vector, d, T::times(simd, half, *w));
    }
    let w = stored::<T, S, VECTORS>(&w_vectors);
    for c in 0..WIDTH {
        let column = &mut columns[c * COLUMN + WIDTH - c..][..WIDTH];
        subtract::<T, S, VECTORS>(simd, column, [(&v_vectors, w[c]), (&w_vectors, v[c])]);
    }

    // E - y v^T - u z^T with z = tau_u (E - y v^T)^T u.
    let u = load::<T, S, VECTORS>(simd, &next.v);
    let u_y = dot::<T, S, VECTORS>(simd, &u, &y);
    for c in 1..WIDTH {
        let column = &mut columns[c * COLUMN + 2 * WIDTH - c..][..WIDTH];
        let along = dot::<T, S, VECTORS>(simd, &u, &load::<T, S, VECTORS>(simd, column));
        let z = next.tau * (along - u_y * v[c]);
        subtract::<T, S, VECTORS>(simd, column, [(&y, v[c]), (&u, z)]);
    }
    next
}

/// Copies the last row of the diagonal block to its last column. The row is new to the block, as the blocks
/// of consecutive sweeps are shifted by one.
#[inline(always)]
fn mirror_last_row<T: Number>(columns: &mut [T]) {
    const LAST: usize = WIDTH - 1;
    for c in 0..LAST {
        columns[position(c, LAST)] = columns[position(LAST, c)];
    }
}

/// Returns the product of `v` and the block of `WIDTH` rows that begins `start` elements into the first
/// column.
#[inline(always)]
fn combine<T: Number, S: Simd, const VECTORS: usize>(
    simd: S,
    columns: &[T],
    start: usize,
    v: &[T; WIDTH],
) -> [T::Vector<S>; VECTORS] {
    let mut sums = [T::splat(simd, T::default()); VECTORS];
    for (c, factor) in v.iter().enumerate() {
        let column = T::vectors::<S>(&columns[c * COLUMN + start - c..][..WIDTH]);
        let factor = T::splat(simd, *factor);
        for (sum, vector) in sums.iter_mut().zip(column) {
            *sum = T::mul_add(simd, factor, *vector, *sum);
        }
    }
    sums
}

#[inline(always)]
fn load<T: Number, S: Simd, const VECTORS: usize>(simd: S, x: &[T]) -> [T::Vector<S>; VECTORS] {
    let mut vectors = [T::splat(simd, T::default()); VECTORS];
    vectors.copy_from_slice(T::vectors::<S>(&x[..WIDTH]));
    vectors
}

#[inline(always)]
fn stored<T: Number, S: Simd, const VECTORS: usize>(vectors: &[T::Vector<S>; VECTORS]) -> [T; WIDTH] {
    let mut numbers = [T::default(); WIDTH];
    T::vectors_mut::<S>(&mut numbers).copy_from_slice(vectors);
    numbers
}

/// Returns `x^T y`.
#[inline(always)]
fn dot<T: Number, S: Simd, const VECTORS: usize>(
    simd: S,
    x: &[T::Vector<S>; VECTORS],
    y: &[T::Vector<S>; VECTORS],
) -> T {
    let mut sums = [T::splat(simd, T::default()); 2];
    for i in 0..VECTORS / 2 {
        sums[0] = T::mul_add(simd, x[2 * i], y[2 * i], sums[0]);
        sums[1] = T::mul_add(simd, x[2 * i + 1], y[2 * i + 1], sums[1]);
    }
    T::sum(simd, T::plus(simd, sums[0], sums[1]))
}

/// Subtracts `a x + b y` from a column.
#[inline(always)]
fn subtract<T: Number, S: Simd, const VECTORS: usize>(
    simd: S,
    column: &mut [T],
    [(x, a), (y, b)]: [(&[T::Vector<S>; VECTORS], T); 2],
) {
    let (a, b) = (T::splat(simd, -a), T::splat(simd, -b));
    for (entry, (x, y)) in T::vectors_mut::<S>(column).iter_mut().zip(x.iter().zip(y)) {
        *entry = T::mul_add(simd, *y, b, T::mul_add(simd, *x, a, *entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eigen::band_layout::storage;
    use crate::exec::parallel;
    use crate::kernels::simd::tests::on_every_path;

    /// Returns a band of pseudo-random entries.
    fn band<T: Number>(n: usize) -> Vec<T> {
        let mut band = vec![T::default(); storage(n)];
        for j in 0..n {
            for i in j..n.min(j + WIDTH + 1) {
                let value = T::of(((i * 131 + j * 31 + i * j * 7) % 97) as f64 / 97.0 - 0.4);
                band[position(i, j)] = value;
                if i - j < WIDTH {
                    band[position(j, i)] = value;
                }
            }
        }
        band
    }

    fn eigenvalues<T: Number>(n: usize, band: &[T], width: usize) -> Vec<f64> {
        let matrix = nalgebra::DMatrix::from_fn(n, n, |i, j| {
            let (i, j) = (i.max(j), i.min(j));
            if i - j <= width { band[position(i, j)].to_f64() } else { 0.0 }
        });
        let mut values: Vec<f64> = matrix.symmetric_eigenvalues().iter().copied().collect();
        values.sort_by(f64::total_cmp);
        values
    }

    fn assert_similar<T: Number>(n: usize, epsilon: f64) {
        let mut band = band::<T>(n);
        let expected = eigenvalues(n, &band, WIDTH);
        reduce_to_tridiagonal(&mut band, n, Strategy::Alone, &CancelToken::default());
        let found = eigenvalues(n, &band, 1);
        let norm = expected.iter().fold(0.0f64, |norm, x| norm.max(x.abs()));
        for (x, y) in found.iter().zip(&expected) {
            assert!((x - y).abs() <= 8.0 * (n as f64).sqrt() * epsilon * norm, "order {n}: {x} {y}");
        }
    }

    #[test]
    fn eigenvalues_are_preserved_around_every_block_size() {
        for n in [1, 2, 3, 4, 31, 32, 33, 34, 63, 64, 65, 66, 97, 130, 260] {
            on_every_path(|_| {
                assert_similar::<f64>(n, f64::EPSILON);
                assert_similar::<f32>(n, f64::from(f32::EPSILON));
            });
        }
    }

    #[test]
    fn bits_are_independent_of_strategy_and_threads() {
        // More tiles per wave than one thread runs alone, and many groups of sweeps.
        let n = 3 * SHARED_FROM * STEPS * WIDTH + 77;
        let reduced = |strategy| {
            let mut band = band::<f64>(n);
            reduce_to_tridiagonal(&mut band, n, strategy, &CancelToken::default());
            (0..n)
                .map(|j| (band[position(j, j)].to_bits(), band[position(j + 1, j)].to_bits()))
                .collect::<Vec<_>>()
        };
        let alone = reduced(Strategy::Alone);
        for threads in [1, 3] {
            let together = parallel::pool(threads).unwrap().install(|| reduced(Strategy::Together));
            assert!(alone == together, "{threads} threads");
        }
        // Similarity transformations preserve the trace and the Frobenius norm.
        let whole = band::<f64>(n);
        let entry = |i: usize, j: usize| whole[position(i, j)];
        let trace: f64 = (0..n).map(|i| entry(i, i)).sum();
        let weight = |i: usize, j: usize| if i == j { 1.0 } else { 2.0 };
        let squares: f64 = (0..n)
            .map(|j| (j..n.min(j + WIDTH + 1)).map(|i| weight(i, j) * entry(i, j).powi(2)).sum::<f64>())
            .sum();
        let number = |bits: u64| f64::from_bits(bits);
        let found: f64 = alone.iter().map(|(d, _)| number(*d)).sum();
        assert!((found - trace).abs() < 1e-13 * squares.sqrt() * (n as f64).sqrt());
        let found: f64 = alone.iter().map(|(d, e)| number(*d).powi(2) + 2.0 * number(*e).powi(2)).sum();
        assert!((found / squares - 1.0).abs() < 1e-12);
    }

    #[test]
    fn tiles_of_a_wave_share_no_column() {
        let n = 3 * STEPS * WIDTH;
        let (mut whole, mut reflections) =
            (band::<f64>(n), vec![Reflection { v: [0.0; WIDTH], tau: 0.0 }; n - 2]);
        let mut seen = 0;
        for wave in 0..20 {
            let tiles = tiles_of_wave(wave, 8, n, &mut whole, &mut reflections);
            for pair in tiles.windows(2) {
                assert_eq!(pair[0].first_sweep + SWEEPS, pair[1].first_sweep);
                assert!(pair[1].first_column + pair[1].band.len() / COLUMN <= pair[0].first_column);
            }
            seen += tiles.len();
        }
        assert!(seen > 20);
    }
}
