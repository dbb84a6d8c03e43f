//! Thin QR decomposition: `A = Q R` with `Q (m, k)`, `R (k, n)`, `k = min(m, n)`.

use faer::dyn_stack::MemStack;
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply_reflections,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::{Conj, Mat, MatMut, MatRef, Par, Spec};

use crate::Result;
use crate::exec::memory::{buffer, copied, identity, matrix, zero_matrix};
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;

/// Purpose of the memory of this module.
const MEMORY: &str = "a QR decomposition";

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
/// # Errors
/// [`OutOfMemory`](crate::Error::OutOfMemory).
///
/// # Examples
/// ```
/// use faer::Mat;
/// use lorank::qr::thin_qr;
///
/// let a = Mat::from_fn(3, 2, |i, j| (i * 2 + j) as f64);
/// let qr = thin_qr(a.as_ref()).unwrap();
/// assert!((&qr.q * &qr.r - &a).norm_max() < 1e-14);
/// ```
pub fn thin_qr(a: MatRef<'_, f64>) -> Result<ThinQr> {
    let factored = HouseholderQr::new(copied(a, MEMORY)?)?;
    let mut q = identity(a.nrows(), factored.rank_bound(), MEMORY)?;
    factored.apply(q.as_mut())?;
    Ok(ThinQr { q, r: factored.r()? })
}

/// A QR decomposition whose `Q` is stored as reflections. Applying them costs less than forming `Q`.
#[derive(Clone, Debug)]
pub(crate) struct HouseholderQr {
    factors: Mat<f64>,
    reflections: Mat<f64>,
}

impl HouseholderQr {
    /// Factors a matrix `(m, n)` in place, on the calling thread.
    pub(crate) fn new(mut a: Mat<f64>) -> Result<Self> {
        let (m, n) = (a.nrows(), a.ncols());
        prepare_products([m, n, m.min(n)], Strategy::Alone)?;
        let block = recommended_block_size::<f64>(m, n);
        let mut reflections = zero_matrix(block, m.min(n), MEMORY)?;
        let request = qr_in_place_scratch::<f64>(m, n, block, Par::Seq, Spec::default());
        let mut memory = buffer(request, MEMORY)?;
        let stack = MemStack::new(&mut memory);
        qr_in_place(a.as_mut(), reflections.as_mut(), Par::Seq, stack, Spec::default());
        Ok(Self { factors: a, reflections })
    }

    /// Returns `k = min(m, n)`, the number of columns of `Q`.
    #[must_use]
    pub(crate) fn rank_bound(&self) -> usize {
        self.reflections.ncols()
    }

    /// Returns `R (k, n)`.
    pub(crate) fn r(&self) -> Result<Mat<f64>> {
        let at = |i, j| if i <= j { self.factors[(i, j)] } else { 0.0 };
        matrix(self.rank_bound(), self.factors.ncols(), MEMORY, at)
    }

    /// Applies the reflections to `x (m, l)`. If the rows of `x` after the first `k` are zero, the result is
    /// `Q` times the first `k` rows.
    ///
    /// # Panics
    /// Panics if `x` has another number of rows than the factored matrix.
    pub(crate) fn apply(&self, x: MatMut<'_, f64>) -> Result<()> {
        let (m, block) = (self.factors.nrows(), self.reflections.nrows());
        assert_eq!(x.nrows(), m, "as many rows as the factored matrix");
        prepare_products([m, x.ncols(), self.rank_bound()], Strategy::Alone)?;
        let mut memory = buffer(apply_scratch::<f64>(m, block, x.ncols()), MEMORY)?;
        let basis = self.factors.as_ref().subcols(0, self.rank_bound());
        let stack = MemStack::new(&mut memory);
        apply_reflections(basis, self.reflections.as_ref(), Conj::No, x, Par::Seq, stack);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy as _, *};

    fn assert_factors(a: &Mat<f64>) {
        let ThinQr { q, r } = thin_qr(a.as_ref()).unwrap();
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
