use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::low_rank::cholesky_qr::Precision;
use crate::low_rank::truncation::{Factors, Truncation, rebuild_all};

fn stored(values: &[f64], rows: usize, cols: usize, dtype: DType) -> StoredMatrix {
    #[allow(clippy::cast_possible_truncation)]
    let bytes: Vec<u8> = match dtype {
        DType::F64 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
    };
    StoredMatrix::in_memory(Arc::new(bytes), dtype, (rows, cols), (cols, 1)).unwrap()
}

fn term(out: usize, fan_in: usize, b: &[f64], a: &[f64], weight: f64, dtype: DType) -> Term {
    let r = b.len() / out;
    Term { b: stored(b, out, r, dtype), a: stored(a, r, fan_in, dtype), weight }
}

/// Returns pseudo-random numbers between -1 and 1.
fn noise(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

fn dense(update: &[Term]) -> nalgebra::DMatrix<f64> {
    let matrix = |m: &StoredMatrix| {
        let (rows, cols) = m.shape();
        let mut out = Mat::zeros(rows, cols);
        upcast(m, 1.0, out.as_mut(), &mut Buffer::default(), &CancelToken::default()).unwrap();
        nalgebra::DMatrix::from_fn(rows, cols, |i, j| out[(i, j)])
    };
    update.iter().map(|t| matrix(&t.b) * matrix(&t.a) * t.weight).reduce(|sum, next| sum + next).unwrap()
}

fn numbers(matrix: &StoredMatrix) -> Vec<f64> {
    matrix.load(&mut Buffer::default(), &CancelToken::default()).unwrap().to_row_major()
}

fn decomposed(update: &[Term]) -> Decomposition {
    decompose(update, &mut Buffers::default(), &CancelToken::default()).unwrap()
}

/// Returns `B` and `A` of the marked values.
fn truncated(of: &Decomposition, keep: &[bool]) -> (Vec<f64>, Vec<f64>) {
    let truncation = Truncation { decomposition: Arc::new(of.clone()), keep: keep.to_vec() };
    let Factors { b, a } = truncation.factors(&CancelToken::default()).unwrap();
    (numbers(&b), numbers(&a))
}

/// Checks every singular value and every truncation against the dense update, relative to the largest value.
fn check(update: &[Term], tolerance: f64) {
    let found = decomposed(update);
    let target = dense(update);
    let (out, fan_in) = target.shape();
    let mut expected: Vec<f64> = target.clone().singular_values().iter().copied().collect();
    expected.sort_by(|a, b| b.total_cmp(a));
    let largest = expected[0].max(f64::MIN_POSITIVE);
    let k = found.singular_values.len();
    for (i, s) in found.singular_values.iter().enumerate() {
        assert!((s - expected[i]).abs() <= tolerance * largest, "{i}: {s:e} {:e}", expected[i]);
    }
    assert!(expected[k..].iter().all(|s| *s <= 1e-13 * largest));
    for r in 0..=k {
        let (b, a) = truncated(&found, &(0..k).map(|i| i < r).collect::<Vec<_>>());
        let left = nalgebra::DMatrix::from_row_slice(out, r, &b);
        let right = nalgebra::DMatrix::from_row_slice(r, fan_in, &a);
        let error = (&target - left * right).norm();
        let optimal = found.singular_values[r..].iter().map(|s| s * s).sum::<f64>().sqrt();
        assert!((error - optimal).abs() <= tolerance * target.norm(), "rank {r}: {error:e} {optimal:e}");
    }
}

#[test]
fn extreme_shapes_are_decomposed() {
    for (out, fan_in, r) in [(1, 1, 1), (1, 9, 3), (9, 1, 3), (6, 40, 4), (40, 6, 16), (30, 30, 8)] {
        for dtype in [DType::F32, DType::F64] {
            let (b, a) = (noise(out * r, 1), noise(r * fan_in, 2));
            let tolerance = if dtype == DType::F32 { 1e-6 } else { 1e-13 };
            check(&[term(out, fan_in, &b, &a, 2.0, dtype)], tolerance);
            let zero = vec![0.0; out * r];
            let found = decomposed(&[term(out, fan_in, &zero, &a, 2.0, dtype)]);
            assert!(found.singular_values.iter().all(|&s| s == 0.0));
            let (b, _) = truncated(&found, &vec![true; found.singular_values.len()]);
            assert!(b.iter().all(|&x| x == 0.0));
        }
    }
}

/// Tests both ways to a decomposition, in both precisions. Factors must be long for the float32 way.
#[test]
fn every_way_is_accurate_where_it_is_used() {
    let mut taken = [0; 3];
    for length in [60, 2000] {
        for spread in [10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-7] {
            for size in [1.0, 1e-20, 1e25] {
                let (out, fan_in, r) = (length, length + 20, 5);
                // Nearly parallel columns, the hard kind of ill-conditioned matrices.
                let (mut b, common) = (noise(out * r, 21), noise(out, 22));
                for (row, shared) in b.chunks_mut(r).zip(&common) {
                    for x in row {
                        *x = size * (shared + spread * *x);
                    }
                }
                let mut a = noise(r * fan_in, 23);
                for j in 0..fan_in {
                    (1..r).for_each(|i| a[i * fan_in + j] = a[j] + spread.max(0.1) * a[i * fan_in + j]);
                }
                let update = [term(out, fan_in, &b, &a, -1.5, DType::F32)];
                let way = match decomposed(&update).form {
                    Form::Basis { basis, .. } => usize::from(basis.precisions == [Precision::Double; 2]),
                    Form::Explicit { .. } => 2,
                };
                taken[way] += 1;
                if length == 60 {
                    check(&update, if way == 0 { 1e-6 } else { 2e-7 });
                }
                let (cancel, mut buffers) = (CancelToken::default(), Buffers::default());
                let exact = by_reflections(&update, (out, fan_in, r), &mut buffers.parts, &cancel).unwrap();
                let tolerance = [5e-7, 1e-10, 0.0][way] * exact.singular_values[0];
                for (mine, theirs) in decomposed(&update).singular_values.iter().zip(&exact.singular_values) {
                    assert!((mine - theirs).abs() <= tolerance, "{spread} {size}: {mine:e} {theirs:e}");
                }
            }
        }
    }
    assert!(taken.iter().all(|&times| times > 3), "{taken:?}");
}

#[test]
fn truncation_keeps_the_marked_values() {
    for dtype in [DType::F32, DType::F64] {
        let found = decomposed(&[term(30, 20, &noise(120, 31), &noise(80, 32), 1.0, dtype)]);
        let (whole_b, whole_a) = truncated(&found, &[true; 4]);
        let (b, a) = truncated(&found, &[true, false, true, false]);
        for i in 0..30 {
            assert!((b[i * 2] - whole_b[i * 4]).abs() < 1e-6);
            assert!((b[i * 2 + 1] - whole_b[i * 4 + 2]).abs() < 1e-6);
        }
        assert_eq!(a.len(), 40);
        assert!((0..20).all(|j| (a[20 + j] - whole_a[40 + j]).abs() < 1e-6));
        let misfit = Truncation { decomposition: Arc::new(found), keep: vec![true; 3] };
        let error = misfit.factors(&CancelToken::default()).unwrap_err();
        assert!(error.to_string().contains("3 marks for 4 singular values"));
    }
}

/// Tests that factors of different types and layouts are stacked without a copy of all of them.
#[test]
fn merges_use_the_fast_way() {
    let (out, fan_in) = (300, 200);
    let terms: Vec<Term> =
        [(4, 0.7, DType::F32), (9, -0.3, DType::Bf16), (0, 1.0, DType::F32), (3, 0.0, DType::F32)]
            .into_iter()
            .enumerate()
            .map(|(j, (r, weight, dtype))| {
                let seed = 40 + 2 * j as u64;
                let (b, a) = (noise(out * r, seed), noise(r * fan_in, seed + 1));
                Term { b: stored(&b, out, r, dtype), a: stored(&a, r, fan_in, dtype), weight }
            })
            .collect();
    let found = decomposed(&terms);
    assert!(matches!(found.form, Form::Basis { .. }));
    assert_eq!(found.singular_values.iter().filter(|&&s| s > 0.0).count(), 13);
    check(&terms, 1e-6);
}

#[test]
fn zero_values_are_exactly_zero() {
    let (mut b, a) = (noise(20 * 6, 3), noise(6 * 30, 4));
    for row in b.chunks_mut(6) {
        row[4] = row[0] - 2.0 * row[1]; // rank 4
        row[5] = row[2];
    }
    let update = [term(20, 30, &b, &a, 1.0, DType::F64)];
    let found = decomposed(&update);
    assert_eq!(found.singular_values.iter().filter(|&&s| s > 0.0).count(), 4);
    check(&update, 1e-13);
}

#[test]
fn accuracy_is_independent_of_the_scale() {
    let (b, a) = (noise(12 * 4, 5), noise(4 * 10, 6));
    let reference = decomposed(&[term(12, 10, &b, &a, 1.0, DType::F64)]).singular_values;
    for (b_size, a_size) in [(-100, 100), (100, -100), (-100, -100), (100, 100), (-110, 120)] {
        let scaled = |x: &[f64], e: i32| x.iter().map(|x| x * power_of_two(e)).collect::<Vec<_>>();
        let update = [term(12, 10, &scaled(&b, b_size), &scaled(&a, a_size), 1.0, DType::F64)];
        let found = decomposed(&update);
        for (mine, theirs) in found.singular_values.iter().zip(&reference) {
            let theirs = theirs * power_of_two(b_size + a_size);
            assert!((mine - theirs).abs() <= 1e-14 * theirs, "{mine:e} {theirs:e}");
        }
        let (left, right) = truncated(&found, &[true; 4]);
        let [left, right] = [left, right].map(|x| x.iter().fold(0.0f64, |m, x| m.max(x.abs())));
        assert!(left < 100.0 * right && right < 100.0 * left, "balanced: {left:e} {right:e}");
    }
}

#[test]
fn terms_are_added_with_their_weights() {
    let terms = |weights: &[f64]| -> Vec<Term> {
        (0..weights.len())
            .map(|j| {
                let (r, seed) = (2 + 3 * j, j as u64);
                let size = power_of_two(30 * i32::try_from(j).unwrap());
                let b: Vec<f64> = noise(14 * r, 7 + seed).iter().map(|x| x * size).collect();
                let a: Vec<f64> = noise(r * 11, 70 + seed).iter().map(|x| x / size).collect();
                term(14, 11, &b, &a, weights[j], DType::F64)
            })
            .collect()
    };
    check(&terms(&[0.7, 0.3]), 1e-13);
    check(&terms(&[0.5, -1.5, 1e-3]), 1e-13);
    check(&terms(&[1.0, 0.0, 0.0]), 1e-13);
    // A difference of nearly equal updates: cancellation loses some of the digits of float64.
    let (b, a) = (noise(14 * 4, 90), noise(4 * 11, 91));
    let close: Vec<f64> = b.iter().map(|x| x + 1e-6).collect();
    let pair = [term(14, 11, &b, &a, 1.0, DType::F64), term(14, 11, &close, &a, -1.0, DType::F64)];
    let found = decomposed(&pair).singular_values[0];
    let expected = dense(&pair).singular_values()[0];
    assert!((found - expected).abs() < 1e-9 * expected, "{found:e} {expected:e}");
    let same = [term(14, 11, &b, &a, 1.0, DType::F64), term(14, 11, &b, &a, -1.0, DType::F64)];
    assert!(decomposed(&same).singular_values.iter().all(|&s| s == 0.0));
}

#[test]
fn empty_selection_gives_factors_of_rank_0() {
    for (r, dtype) in [(4, DType::F32), (4, DType::F64), (9, DType::F32)] {
        let found = decomposed(&[term(12, 8, &noise(12 * r, 1), &noise(r * 8, 2), 1.0, dtype)]);
        let keep = vec![false; found.singular_values.len()];
        let Factors { b, a } =
            Truncation { decomposition: Arc::new(found), keep }.factors(&CancelToken::default()).unwrap();
        assert_eq!((b.shape(), a.shape()), ((12, 0), (0, 8)), "{r} {dtype:?}");
        assert!(numbers(&b).is_empty() && numbers(&a).is_empty());
    }
}

#[test]
fn invalid_updates_are_errors() {
    let good = term(4, 5, &noise(8, 1), &noise(10, 2), 1.0, DType::F64);
    let fail = |update: &[Term]| {
        decompose(update, &mut Buffers::default(), &CancelToken::default()).unwrap_err().to_string()
    };
    assert!(fail(&[]).contains("at least one term"));
    let other = term(3, 5, &noise(6, 1), &noise(10, 2), 1.0, DType::F64);
    assert!(fail(&[good.clone(), other]).contains("3x2 and 2x5 do not make a 4x5 update"));
    let inner = Term { a: stored(&noise(15, 1), 3, 5, DType::F64), ..good.clone() };
    assert!(fail(&[inner]).contains("4x2 and 3x5"));
    assert!(fail(&[Term { weight: f64::NAN, ..good.clone() }]).contains("not finite"));
    let mut nan = noise(8, 1);
    nan[3] = f64::NAN;
    assert!(fail(&[term(4, 5, &nan, &noise(10, 2), 1.0, DType::F32)]).contains("NaN"));
}

#[test]
fn bits_are_independent_of_threads() {
    let updates: Vec<Vec<Term>> = (1..20)
        .map(|i| vec![term(10 + i, 30, &noise((10 + i) * 4, i as u64), &noise(120, 99), 0.5, DType::F32)])
        .collect();
    let run = |threads| {
        let results = std::sync::Mutex::new(vec![None; updates.len()]);
        let cancel = CancelToken::default();
        decompose_all(&updates, threads, &cancel, &|i, result| {
            results.lock().unwrap()[i] = Some(result.unwrap());
        })
        .unwrap();
        let truncations: Vec<Truncation> = results
            .into_inner()
            .unwrap()
            .into_iter()
            .map(|found| Truncation {
                decomposition: Arc::new(found.unwrap()),
                keep: vec![true, false, true, false],
            })
            .collect();
        let factors = std::sync::Mutex::new(vec![None; updates.len()]);
        rebuild_all(&truncations, threads, &cancel, &|i, result| {
            let Factors { b, a } = result.unwrap();
            factors.lock().unwrap()[i] = Some((numbers(&b), numbers(&a)));
        })
        .unwrap();
        factors.into_inner().unwrap()
    };
    assert_eq!(run(1), run(4));
}

proptest! {
    #[test]
    fn any_update((out, fan_in, r, seed, dtype) in (1usize..14, 1usize..14, 1usize..9, any::<u64>(),
        prop_oneof![Just(DType::F32), Just(DType::F64)]))
    {
        let update = [term(out, fan_in, &noise(out * r, seed), &noise(r * fan_in, seed ^ 5), -3.0, dtype)];
        check(&update, if dtype == DType::F32 { 1e-6 } else { 1e-12 });
    }
}

#[test]
fn update_beyond_the_range_of_energies_is_an_error() {
    for (b, a, weight, dtype) in [
        (1e140, 1e140, 1.0, DType::F64),
        (1e-140, 1e-140, 1.0, DType::F64),
        (1.0, 1.0, 1e300, DType::F32),
        (1.0, 1.0, 1e-300, DType::F32),
        (1e-30, 1e-30, 1e-100, DType::F32),
        (1e30, 1e30, 1e100, DType::Bf16),
    ] {
        let update = [term(3, 2, &[b, b, -b], &[a, a], weight, dtype)];
        let error = decompose(&update, &mut Buffers::default(), &CancelToken::default()).unwrap_err();
        assert!(matches!(error, Error::Numerical(_)), "{error}");
    }
    for (b, weight) in [(0.0, 1e300), (1.0, 0.0), (0.0, 1e-300)] {
        let update = [term(3, 2, &[b, b, -b], &[1.0, 1.0], weight, DType::F32)];
        assert!(
            decompose(&update, &mut Buffers::default(), &CancelToken::default())
                .is_ok_and(|found| { found.singular_values == [0.0] })
        );
    }
}
