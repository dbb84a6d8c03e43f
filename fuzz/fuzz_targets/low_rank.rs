//! Decomposes sums of products of arbitrary bits, truncates them at every rank, and compares with the dense
//! update.
#![no_main]

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use lorank::cancel::CancelToken;
use lorank::product_svd::{Buffers, decompose};
use lorank::source::{Buffer, StoredMatrix};
use lorank::truncation::Truncation;
use lorank_fuzz::Bits;
use nalgebra::DMatrix;

#[derive(Debug)]
struct Update {
    shape: (usize, usize),
    terms: Vec<(Bits, Bits, f64)>,
}

impl<'a> Arbitrary<'a> for Update {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let shape = (u.int_in_range(1..=10)?, u.int_in_range(1..=10)?);
        let mut terms = Vec::new();
        for _ in 0..u.int_in_range(1..=3)? {
            let r = u.int_in_range(0..=5)?;
            let weight = if u.ratio(1, 8)? { u.arbitrary()? } else { f64::from(u.arbitrary::<i8>()?) / 16.0 };
            terms.push((Bits::take(u, shape.0, r)?, Bits::take(u, r, shape.1)?, weight));
        }
        Ok(Self { shape, terms })
    }
}

fn numbers(matrix: &StoredMatrix, rows: usize, cols: usize) -> DMatrix<f64> {
    let values = matrix.load(&mut Buffer::default(), &CancelToken::default()).unwrap().to_row_major();
    DMatrix::from_row_slice(rows, cols, &values)
}

fuzz_target!(|update: Update| {
    let Update { shape: (out, fan_in), terms } = update;
    let cancel = CancelToken::default();
    let stored: Vec<_> = terms
        .iter()
        .map(|(b, a, weight)| lorank::low_rank::Term { b: b.stored(), a: a.stored(), weight: *weight })
        .collect();
    let all = || terms.iter().flat_map(|(b, a, w)| [b.values(), a.values(), vec![*w]]).flatten();
    let is_finite = all().all(f64::is_finite);
    // Far from the ends of float32, in which factors are written.
    let is_moderate = is_finite && all().all(|x| x == 0.0 || (1e-12..1e12).contains(&x.abs()));
    let found = match decompose(&stored, &mut Buffers::default(), &cancel) {
        Ok(found) => found,
        Err(error) => return assert!(!is_moderate, "{error}"),
    };
    assert!(is_finite);
    let values = found.singular_values.clone();
    assert!(values.is_sorted_by(|a, b| a >= b) && values.iter().all(|s| *s >= 0.0 && s.is_finite()));
    if !is_moderate {
        return;
    }
    let products = terms.iter().map(|(b, a, w)| (b.dense() * a.dense()) * *w);
    let dense = products.fold(DMatrix::zeros(out, fan_in), |sum, product| sum + product);
    // Terms may cancel: errors are relative to their sizes, not to the sum.
    let size: f64 = terms.iter().map(|(b, a, w)| b.dense().norm() * a.dense().norm() * w.abs()).sum();
    let mut expected: Vec<f64> = dense.clone().singular_values().iter().copied().collect();
    expected.sort_by(|a, b| b.total_cmp(a));
    for (k, theirs) in expected.iter().enumerate() {
        let mine = values.get(k).copied().unwrap_or(0.0);
        assert!((mine - theirs).abs() <= 2e-6 * size, "{mine:e} {theirs:e} of {size:e}");
    }
    let found = Arc::new(found);
    for rank in 0..=values.len() {
        let keep = (0..values.len()).map(|k| k < rank).collect();
        let factors = Truncation { decomposition: Arc::clone(&found), keep }.factors(&cancel).unwrap();
        let error = (&dense - numbers(&factors.b, out, rank) * numbers(&factors.a, rank, fan_in)).norm();
        let optimal = values[rank..].iter().map(|s| s * s).sum::<f64>().sqrt();
        assert!((error - optimal).abs() <= 5e-6 * size, "rank {rank}: {error:e} {optimal:e} of {size:e}");
    }
});
