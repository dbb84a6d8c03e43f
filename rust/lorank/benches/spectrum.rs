//! The three steps of a spectrum, and the whole, for square float32 matrices on one thread.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use faer::Mat;
use faer::dyn_stack::{MemBuffer, MemStack};
use lorank::cancel::CancelToken;
use lorank::eigen::{Accuracy, spectrum_in_pool};
use lorank::gram::{gram, gram_scratch};
use lorank::matrix::MatrixView;
use lorank::parallel::Strategy;
use lorank::root_free_ql::tridiagonal_eigenvalues;
use lorank::tridiag::{tridiagonalize, tridiagonalize_scratch};
use lorank::workspace::Scratch;

const ORDERS: [usize; 3] = [256, 576, 1024];

/// Roughly normal numbers: the sum of four uniform ones from a linear congruential generator.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
}

fn steps(criterion: &mut Criterion) {
    let cancel = CancelToken::default();
    let alone = Strategy::Alone;
    for p in ORDERS {
        let weight = numbers(p * p);
        let view = MatrixView::from_f32(&weight, p, p).expect("p * p numbers");
        let mut memory = MemBuffer::new(gram_scratch::<f64>(p, p).or(tridiagonalize_scratch::<f64>(p)));
        let stack = MemStack::new(&mut memory);
        let mut product = Mat::<f64>::zeros(p, p);
        gram(&view, 1.0, alone, &cancel, product.as_mut(), stack).expect("nobody cancels");
        let reduced = tridiagonalize(product.clone().as_mut(), alone, stack);
        let mut scratch = Scratch::default();

        criterion.benchmark_group("gram").bench_function(BenchmarkId::from_parameter(p), |bencher| {
            let mut out = Mat::<f64>::zeros(p, p);
            bencher.iter(|| gram(black_box(&view), 1.0, alone, &cancel, out.as_mut(), stack));
        });
        criterion.benchmark_group("tridiagonalize").bench_function(
            BenchmarkId::from_parameter(p),
            |bencher| {
                bencher.iter_batched_ref(
                    || product.clone(),
                    |a| tridiagonalize(a.as_mut(), alone, stack),
                    BatchSize::LargeInput,
                );
            },
        );
        criterion.benchmark_group("tridiagonal_eigenvalues").bench_function(
            BenchmarkId::from_parameter(p),
            |bencher| {
                bencher.iter(|| tridiagonal_eigenvalues(black_box(&reduced)));
            },
        );
        criterion.benchmark_group("spectrum").bench_function(BenchmarkId::from_parameter(p), |bencher| {
            bencher
                .iter(|| spectrum_in_pool(black_box(&view), Accuracy::Exact, alone, &cancel, &mut scratch));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = steps
}
criterion_main!(benches);
