//! Thin QR decomposition: `A = Q R` with `Q (m, k)`, `R (k, n)`, `k = min(m, n)`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply_reflections,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::{Conj, Mat, MatMut, MatRef, Par, Spec};

/// Orthonormal columns and an upper triangular factor.
#[derive(Clone, Debug)]
pub struct ThinQr {
    /// `(m, k)`, orthonormal columns, also for rank-deficient or zero `A`.
    pub q: Mat<f64>,
    /// `(k, n)`, upper triangular (trapezoidal for `m < n`).
    pub r: Mat<f64>,
}

/// Factors `a (m, n)` by blocked Householder reflections on the calling thread, in `2 n^2 (m - n/3)`
/// operations for `R` and as many for `Q`.
///
/// # Examples
/// ```
/// use faer::Mat;
/// use lorank::qr::thin_qr;
///
/// let a = Mat::from_fn(3, 2, |i, j| (i * 2 + j) as f64);
/// let qr = thin_qr(a.as_ref());
/// assert!((&qr.q * &qr.r - &a).norm_max() < 1e-14);
/// ```
#[must_use]
pub fn thin_qr(a: MatRef<'_, f64>) -> ThinQr {
    let factored = HouseholderQr::new(a.to_owned());
    let mut q = Mat::identity(a.nrows(), factored.rank_bound());
    factored.apply(q.as_mut());
    ThinQr { q, r: factored.r() }
}

/// A QR decomposition whose `Q` is stored as reflections. Applying them costs less than forming `Q`.
#[derive(Clone, Debug)]
pub(crate) struct HouseholderQr {
    factors: Mat<f64>,
    reflections: Mat<f64>,
}

impl HouseholderQr {
    /// Factors a matrix `(m, n)` in place, on the calling thread.
    #[must_use]
    pub(crate) fn new(mut a: Mat<f64>) -> Self {
        let (m, n) = (a.nrows(), a.ncols());
        let block = recommended_block_size::<f64>(m, n);
        let mut reflections = Mat::zeros(block, m.min(n));
        let request = qr_in_place_scratch::<f64>(m, n, block, Par::Seq, Spec::default());
        let mut memory = MemBuffer::new(request);
        let stack = MemStack::new(&mut memory);
        qr_in_place(a.as_mut(), reflections.as_mut(), Par::Seq, stack, Spec::default());
        Self { factors: a, reflections }
    }

    /// Returns `k = min(m, n)`, the number of columns of `Q`.
    #[must_use]
    pub(crate) fn rank_bound(&self) -> usize {
        self.reflections.ncols()
    }

    /// Returns `R (k, n)`.
    #[must_use]
    pub(crate) fn r(&self) -> Mat<f64> {
        let at = |i, j| if i <= j { self.factors[(i, j)] } else { 0.0 };
        Mat::from_fn(self.rank_bound(), self.factors.ncols(), at)
    }

    /// Applies the reflections to `x (m, l)`. If the rows of `x` after the first `k` are zero, the result is
    /// `Q` times the first `k` rows.
    ///
    /// # Panics
    /// Panics if `x` has another number of rows than the factored matrix.
    pub(crate) fn apply(&self, x: MatMut<'_, f64>) {
        let (m, block) = (self.factors.nrows(), self.reflections.nrows());
        assert_eq!(x.nrows(), m, "as many rows as the factored matrix");
        let mut memory = MemBuffer::new(apply_scratch::<f64>(m, block, x.ncols()));
        let basis = self.factors.as_ref().subcols(0, self.rank_bound());
        let stack = MemStack::new(&mut memory);
        apply_reflections(basis, self.reflections.as_ref(), Conj::No, x, Par::Seq, stack);
    }
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
    fn factors_of_extreme_shapes_are_accurate() {
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
