//! Thin QR decomposition: `A = Q R` with `Q (m, k)`, `R (k, n)`, `k = min(m, n)`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply_reflections,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::{Conj, Mat, MatRef, Par, Spec};

/// Orthonormal columns and an upper triangular factor.
#[derive(Clone, Debug)]
pub struct ThinQr {
    /// `(m, k)`, orthonormal columns, also where `A` is rank-deficient or zero.
    pub q: Mat<f64>,
    /// `(k, n)`, upper triangular (trapezoidal for `m < n`).
    pub r: Mat<f64>,
}

/// Factors `a`, `(m, n)`, by blocked Householder reflections on the calling thread:
/// `2 n^2 (m - n/3)` operations for `R` and as many for `Q`.
#[must_use]
pub fn thin_qr(a: MatRef<'_, f64>) -> ThinQr {
    let (m, n) = (a.nrows(), a.ncols());
    let k = m.min(n);
    let mut factors = a.to_owned();
    let block = recommended_block_size::<f64>(m, n);
    let mut reflections = Mat::zeros(block, k);
    let par = Par::Seq;
    let mut memory = MemBuffer::new(
        qr_in_place_scratch::<f64>(m, n, block, par, Spec::default()).or(apply_scratch::<f64>(m, block, k)),
    );
    let stack = MemStack::new(&mut memory);
    qr_in_place(factors.as_mut(), reflections.as_mut(), par, stack, Spec::default());

    let r = Mat::from_fn(k, n, |i, j| if i <= j { factors[(i, j)] } else { 0.0 });
    let mut q = Mat::identity(m, k);
    let basis = factors.as_ref().subcols(0, k);
    apply_reflections(basis, reflections.as_ref(), Conj::No, q.as_mut(), par, stack);
    ThinQr { q, r }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assert_factors(a: &Mat<f64>) {
        let ThinQr { q, r } = thin_qr(a.as_ref());
        let k = a.nrows().min(a.ncols());
        assert_eq!((q.nrows(), q.ncols(), r.nrows(), r.ncols()), (a.nrows(), k, k, a.ncols()));
        let tolerance = 1e-14 * (a.nrows() + a.ncols()) as f64;
        assert!((q.transpose() * &q - Mat::<f64>::identity(k, k)).norm_max() < tolerance);
        assert!((&q * &r - a).norm_max() <= tolerance * a.norm_max());
        assert!((0..k).all(|i| (0..i.min(a.ncols())).all(|j| r[(i, j)] == 0.0)));
    }

    #[test]
    fn shapes_that_hurt() {
        for (m, n) in [(1, 1), (1, 7), (7, 1), (5, 5), (90, 3), (3, 90), (200, 64)] {
            assert_factors(&Mat::zeros(m, n));
            assert_factors(&Mat::from_fn(m, n, |_, _| 2.5)); // rank 1
            assert_factors(&Mat::from_fn(m, n, |i, j| if j == 0 { 0.0 } else { (i * j) as f64 - 3.0 }));
        }
    }

    proptest! {
        #[test]
        fn any_matrix((m, n, values) in (1usize..30, 1usize..30).prop_flat_map(|(m, n)| {
            (Just(m), Just(n), prop::collection::vec(-1e3f64..1e3, m * n))
        })) {
            assert_factors(&Mat::from_fn(m, n, |i, j| values[i * n + j]));
        }
    }
}
