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

use faer::dyn_stack::{MemStack, StackReq};
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

/// Returns the memory for [`reduce_to_tridiagonal`] of a band of order `n`.
#[must_use]
pub fn reduce_to_tridiagonal_scratch<T: Number>(n: usize) -> StackReq {
    StackReq::new::<Reflection<T>>(n)
}

/// Reduces a band of order `n`, stored as described at [`position`], to tridiagonal form in place. All but
/// the diagonal and the first off-diagonals is then unspecified.
///
/// Under [`Strategy::Together`] the caller must run in the thread pool. After cancellation the band is
/// unspecified.
pub fn reduce_to_tridiagonal<T: Number>(
    band: &mut [T],
    n: usize,
    strategy: Strategy,
    cancel: &CancelToken,
    stack: &mut MemStack,
) {
    let sweeps = n.saturating_sub(2);
    let none = Reflection { v: [T::default(); WIDTH], tau: T::default() };
    let (mut reflections, _) = stack.make_with(sweeps, |_| none);
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
mod tests;
