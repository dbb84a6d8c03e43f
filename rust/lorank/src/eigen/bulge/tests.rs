use faer::dyn_stack::MemBuffer;

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
    let mut memory = MemBuffer::new(reduce_to_tridiagonal_scratch::<T>(n));
    reduce_to_tridiagonal(&mut band, n, Strategy::Alone, &CancelToken::default(), MemStack::new(&mut memory));
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
        let mut memory = MemBuffer::new(reduce_to_tridiagonal_scratch::<f64>(n));
        reduce_to_tridiagonal(&mut band, n, strategy, &CancelToken::default(), MemStack::new(&mut memory));
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
