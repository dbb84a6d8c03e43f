//! Speed of each phase relative to the limit of the machine, on one thread and on several:
//! `cargo bench --bench phases --features bench`.
//!
//! Options: `-- --threads 2 --orders 576,4096 --json FILE`. The limit (peak) is the speed of faer's product
//! of two square matrices in the same run. A line per spectrum divides the time beyond the peak among the
//! phases. Operation counts are those of the algorithm: half a product for a Gram matrix, `4/3 n^3` and
//! `7 w n^2` for the two stages of the reduction, half a Gram matrix of both factors for a decomposition.

use std::env::args;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, Par};
use lorank::bench::{
    Number, Tridiagonal, WIDTH, gram, gram_scratch, numbers as scratch_numbers, panel_size, position,
    reduce_to_band, reduce_to_band_scratch, reduce_to_tridiagonal, reduce_to_tridiagonal_scratch, stack,
    storage, tridiagonal_eigenvalues,
};
use lorank::cancel::CancelToken;
use lorank::dtype::DType;
use lorank::low_rank::{Buffers, Term};
use lorank::matrix::MatrixView;
use lorank::parallel::{Strategy, pool};
use lorank::product_svd::decompose;
use lorank::source::{Buffer, StoredMatrix};
use lorank::truncation::Truncation;
use lorank::workspace::Scratch;
use serde_json::{Value, json};

/// Duration of a measurement in seconds. A run that takes longer is not repeated.
const PATIENCE: f64 = 0.3;

/// Returns the median seconds of several runs after a warm-up run.
fn seconds(mut run: impl FnMut() -> f64) -> f64 {
    let first = run();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // A small positive number.
    let count = ((PATIENCE / first.max(1e-9)) as usize).clamp(1, 99);
    let mut found: Vec<f64> = (0..count).map(|_| run()).collect();
    found.sort_by(f64::total_cmp);
    found[found.len() / 2]
}

fn timed<R>(work: impl FnOnce() -> R) -> f64 {
    let start = Instant::now();
    black_box(work());
    start.elapsed().as_secs_f64()
}

/// Returns approximately normal numbers: sums of four uniform numbers from a linear congruential generator.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
}

struct Report {
    threads: usize,
    rows: Vec<Value>,
}

/// Time of a phase in seconds, and the part of it in excess of its arithmetic at the peak.
struct Phase {
    name: &'static str,
    seconds: f64,
    beyond_peak: f64,
}

/// Prints the share of the time that is arithmetic at the peak, and the division of the rest among the
/// phases.
fn print_rest(kind: &str, order: &str, phases: &[Phase]) {
    let total: f64 = phases.iter().map(|phase| phase.seconds).sum();
    let share = |seconds: f64| 100.0 * seconds / total;
    let beyond = phases.iter().map(|phase| phase.beyond_peak).sum::<f64>();
    let parts: Vec<String> =
        phases.iter().map(|phase| format!("{} {:.1} %", phase.name, share(phase.beyond_peak))).collect();
    println!(
        "{kind:8} {order:>12}  all: {:.1} ms, {:.1} % arithmetic at the peak; the rest: {}",
        total * 1e3,
        100.0 - share(beyond),
        parts.join(", ")
    );
}

impl Report {
    /// Prints and stores a row. `peak` is in operations per second.
    fn row(
        &mut self,
        kind: &str,
        order: &str,
        phase: &'static str,
        seconds: f64,
        operations: f64,
        peak: f64,
    ) -> Phase {
        let (speed, threads) = (operations / seconds, self.threads);
        println!(
            "{kind:8} {order:>12}  {phase:26} {threads} threads {:10.3} ms {:7.1} GF/s {:4.0} % of peak",
            seconds * 1e3,
            speed / 1e9,
            100.0 * speed / peak
        );
        self.rows.push(json!({
            "kind": kind, "order": order, "phase": phase, "threads": threads, "seconds": seconds,
            "gflops": speed / 1e9, "share_of_peak": speed / peak,
        }));
        Phase { name: phase, seconds, beyond_peak: seconds - operations / peak }
    }

    /// Returns the operations per second of a product of square matrices.
    fn peak<T: Number>(&mut self, kind: &str) -> f64 {
        const ORDER: usize = 2048;
        let a = Mat::from_fn(ORDER, ORDER, |i, j| T::of(((i * 7 + j * 3) % 17) as f64 - 8.0));
        let mut out = Mat::zeros(ORDER, ORDER);
        let par = if self.threads > 1 { Par::rayon(self.threads) } else { Par::Seq };
        let taken = seconds(|| timed(|| matmul(out.as_mut(), Accum::Replace, &a, &a, T::of(1.0), par)));
        let operations = 2.0 * (ORDER as f64).powi(3);
        self.row(kind, "2048", "product (the peak)", taken, operations, operations / taken);
        operations / taken
    }

    fn spectrum<T: Number>(&mut self, kind: &str, p: usize, peak: f64) {
        let (cancel, order) = (CancelToken::default(), format!("{p}x{p}"));
        let strategy = if self.threads > 1 { Strategy::for_single(p, p) } else { Strategy::Alone };
        let weight = numbers(p * p);
        let view = MatrixView::from_f32(&weight, p, p).expect("p * p numbers");
        let (mut scratch, mut product, n) = (Scratch::default(), Mat::<T>::zeros(p, p), p as f64);

        let taken = seconds(|| {
            let memory = scratch_numbers::<T>(&mut scratch, panel_size::<T>(p, p), gram_scratch(p, p));
            let (panel, stack) = memory.expect("memory");
            timed(|| gram(&view, 1.0, strategy, &cancel, product.as_mut(), panel, stack))
        });
        let formed = self.row(kind, &order, "Gram matrix", taken, n.powi(3), peak);

        let mut band = vec![T::default(); storage(p)];
        let taken = seconds(|| {
            let (mut a, stack) = (product.clone(), stack(&mut scratch, reduce_to_band_scratch::<T>(p)));
            let stack = stack.expect("memory");
            timed(|| reduce_to_band(a.as_mut(), strategy, &cancel, &mut band, stack))
        });
        let reduced = self.row(kind, &order, "reduction to a band", taken, 4.0 / 3.0 * n.powi(3), peak);

        let mut chased = band.clone();
        let taken = seconds(|| {
            chased.copy_from_slice(&band);
            let stack = stack(&mut scratch, reduce_to_tridiagonal_scratch::<T>(p)).expect("memory");
            timed(|| reduce_to_tridiagonal(&mut chased, p, strategy, &cancel, stack))
        });
        let operations = 7.0 * WIDTH as f64 * n * n;
        let chasing = self.row(kind, &order, "band to tridiagonal", taken, operations, peak);

        let tridiagonal = Tridiagonal {
            diagonal: (0..p).map(|i| chased[position(i, i)].to_f64()).collect(),
            off_diagonal: (1..p).map(|i| chased[position(i, i - 1)].to_f64()).collect(),
        };
        let taken = seconds(|| timed(|| tridiagonal_eigenvalues(&tridiagonal, &cancel)));
        // A division and fourteen other operations in each of some 1.2 n^2 steps, on one thread.
        let solved = self.row(kind, &order, "eigenvalues of that", taken, 1.2 * 15.0 * n * n, peak);
        print_rest(kind, &order, &[formed, reduced, chasing, solved]);
    }

    /// Measures one thread, as the other threads work on other modules.
    fn adapter(&mut self, length: usize, r: usize, peak: f64) {
        let (cancel, mut buffers) = (CancelToken::default(), Buffers::default());
        let order = format!("{length}, r={r}");
        let stored = |rows, cols| {
            let bytes: Vec<u8> = numbers(length * r).iter().flat_map(|x| x.to_le_bytes()).collect();
            StoredMatrix::in_memory(Arc::new(bytes), DType::F32, (rows, cols), (cols, 1)).expect("fits")
        };
        let update = [Term { b: stored(length, r), a: stored(r, length), weight: 0.5 }];
        let taken = seconds(|| timed(|| decompose(&update, &mut buffers, &cancel)));
        let (sides, rank) = (2.0 * length as f64, r as f64);
        self.row("float32", &order, "decomposition of a module", taken, rank * rank * sides, peak);

        let decomposition = Arc::new(decompose(&update, &mut buffers, &cancel).expect("finite"));
        let kept = r.div_ceil(4);
        let keep = (0..r).map(|i| i < kept).collect();
        let factors = Truncation { decomposition, keep }.factors(&cancel).expect("a mark for each");
        let mut buffer = Buffer::default();
        let taken = seconds(|| {
            timed(|| {
                factors.b.load(&mut buffer, &cancel).expect("computed");
                factors.a.load(&mut buffer, &cancel).expect("computed");
            })
        });
        self.row(
            "float32",
            &order,
            "a quarter of its factors",
            taken,
            2.0 * rank * kept as f64 * sides,
            peak,
        );
    }
}

fn main() {
    let words: Vec<String> = args().collect();
    let option = |name: &str| words.iter().position(|w| w == name).and_then(|i| words.get(i + 1));
    let most: usize = option("--threads").map_or(2, |x| x.parse().expect("a number"));
    let orders = option("--orders").map_or("576,1024,2048,4096", String::as_str);
    let mut report = Report { threads: 1, rows: Vec::new() };
    for threads in if most > 1 { vec![1, most] } else { vec![1] } {
        report.threads = threads;
        pool(threads).expect("threads").install(|| {
            let (double, single) = (report.peak::<f64>("float64"), report.peak::<f32>("float32"));
            for order in orders.split(',').map(|x| x.parse().expect("a number")) {
                report.spectrum::<f64>("float64", order, double);
                report.spectrum::<f32>("float32", order, single);
            }
            for r in if threads == 1 { &[16, 64][..] } else { &[] } {
                report.adapter(4096, *r, single);
            }
        });
    }
    if let Some(file) = option("--json") {
        let text = serde_json::to_string_pretty(&json!({"rows": report.rows})).expect("plain values");
        std::fs::write(file, text + "\n").expect("a file that can be written");
    }
}
