//! Singular value decomposition of the small core of an update, with vectors on demand.
//!
//! A truncation keeps a fraction of the values, which depends on the values of all updates. If the condition
//! number of a core `C (K, K)` is moderate, the eigenvalues of `C^T C` are the squares of the singular
//! values, with an error of `eps s_1^2`. Its eigenvectors are the right singular vectors, and are computed
//! for the kept values only ([`SelectedEigen`]); the left ones are `u_i = C v_i / s_i`. Little is stored of a
//! core, as touching new memory takes longer than the arithmetic. Other cores are decomposed in full by faer.

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::eigen::selected::{SelectedEigen, selected_eigen_scratch};
use crate::exec::memory::{collected, matrix};
use crate::exec::parallel::Strategy;
use crate::exec::product_memory::prepare_products;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::kernels::number::padded;
use crate::kernels::simd::LINE;
use crate::kernels::thin_gram::add_gram_of_columns;
use crate::svd::dense_svd;
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "the decomposition of an update";

/// Least `(s_n / s_1)^2` for the decomposition by eigenvalues of `C^T C`, whose square roots are then
/// accurate to 1e-9.
const SMALLEST_SQUARE: f64 = 1e-6;

/// Least distance between squares, relative to the largest. The vectors of closer ones are not determined.
const LEAST_GAP: f64 = 1e-11;

/// The singular values of a core, and its vectors or the data to compute them.
#[derive(Clone, Debug)]
pub(crate) struct CoreSvd {
    /// All singular values, descending.
    pub singular_values: Vec<f64>,
    pub vectors: Vectors,
}

/// The singular vectors of a core.
#[derive(Clone, Debug)]
pub(crate) enum Vectors {
    /// All vectors.
    All {
        /// `U diag(s) (K, K)`.
        left: Mat<f64>,
        /// `V (K, K)`.
        right: Mat<f64>,
    },
    /// Data to compute right singular vectors; `U diag(s) = C V`.
    OnDemand(Box<SelectedEigen>),
}

/// Returns the memory for [`CoreSvd::of`] a core of order `n`.
pub(crate) fn core_svd_scratch(n: usize) -> StackReq {
    let square = StackReq::new_aligned::<f64>(padded::<f64>(n).pow(2), LINE);
    square.and(square).and(selected_eigen_scratch(n))
}

impl CoreSvd {
    /// Decomposes the product of two square matrices.
    ///
    /// # Errors
    /// The errors of [`dense_svd`].
    pub(crate) fn of(left: MatRef<'_, f64>, right: MatRef<'_, f64>, stack: &mut MemStack) -> Result<Self> {
        let (n, stride) = (right.nrows(), padded::<f64>(right.nrows()));
        prepare_products([left.nrows(), left.ncols(), n], Strategy::Alone)?;
        let (mut rows, stack) = stack.make_aligned_with(n * stride, LINE, |_| 0.0);
        // In faer 0.24 the constructor for row-major slices takes the stride of columns.
        let core = MatMut::from_column_major_slice_with_stride_mut(&mut rows, n, n, stride).transpose_mut();
        matmul(core, Accum::Replace, left, right, 1.0, Par::Seq);
        let exponent = scale_to_one(&mut rows)?;
        let found = match Self::by_eigenvalues(&rows, n, stack)? {
            Some(found) => found,
            None => {
                Self::dense(MatRef::from_column_major_slice_with_stride(&rows, n, n, stride).transpose())?
            }
        };
        Ok(found.times(power_of_two(exponent)))
    }

    fn dense(core: MatRef<'_, f64>) -> Result<Self> {
        let svd = dense_svd(core)?;
        let s = &svd.singular_values;
        let left = matrix(svd.u.nrows(), s.len(), MEMORY, |i, j| svd.u[(i, j)] * s[j])?;
        let vectors = Vectors::All { left, right: svd.v };
        Ok(Self { singular_values: svd.singular_values, vectors })
    }

    /// Decomposes a core by eigenvalues. `rows` is row-major with a largest entry near 1. Returns `None` if
    /// the condition number is large or values are too close.
    fn by_eigenvalues(rows: &[f64], n: usize, stack: &mut MemStack) -> Result<Option<Self>> {
        let stride = padded::<f64>(n);
        let (mut squares, stack) = stack.make_aligned_with(stride * stride, LINE, |_| 0.0);
        // The columns of `C^T` are the rows of `C`.
        add_gram_of_columns(rows, stride, &mut squares);
        for i in 0..n {
            for j in 0..i {
                squares[j * stride + i] = squares[i * stride + j];
            }
        }
        let eigen = match SelectedEigen::of(&mut squares, n, stack) {
            Ok(eigen) => eigen,
            Err(error @ Error::OutOfMemory { .. }) => return Err(error),
            Err(_) => return Ok(None),
        };
        let (Some(&smallest), Some(&largest)) = (eigen.values.first(), eigen.values.last()) else {
            return Ok(None);
        };
        let is_moderate = smallest > SMALLEST_SQUARE * largest;
        let are_apart = eigen.values.windows(2).all(|pair| pair[1] - pair[0] > LEAST_GAP * largest);
        if !is_moderate || !are_apart {
            return Ok(None);
        }
        let roots = eigen.values.iter().rev().map(|square| square.sqrt());
        let singular_values = collected(roots, n, MEMORY)?;
        Ok(Some(Self { singular_values, vectors: Vectors::OnDemand(Box::new(eigen)) }))
    }

    /// Returns the decomposition of the core times a positive number.
    fn times(mut self, factor: f64) -> Self {
        self.singular_values.iter_mut().for_each(|s| *s *= factor);
        if let Vectors::All { left, .. } = &mut self.vectors {
            *left *= faer::Scale(factor);
        }
        self
    }
}

/// Divides numbers by a power of two, so that the largest is near 1, and returns the exponent. Zeros are not
/// changed.
fn scale_to_one(numbers: &mut [f64]) -> Result<i32> {
    let largest = numbers.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    if largest == 0.0 || largest.is_infinite() {
        return Ok(0); // The decomposition reports NaN and infinities.
    }
    let exponent = binary_exponent(largest)?;
    let scale = power_of_two(-exponent);
    for x in numbers {
        *x *= scale;
    }
    Ok(exponent)
}

#[cfg(test)]
mod tests {
    use faer::dyn_stack::MemBuffer;

    use super::*;

    /// Returns an orthogonal matrix `(n, n)`.
    fn orthonormal(n: usize, seed: usize) -> Mat<f64> {
        let noise = |i: usize| ((i * 7919 + seed * 31 + i * i * seed) % 1013) as f64 / 1013.0 - 0.5;
        dense_svd(Mat::from_fn(n, n, |i, j| noise(i * n + j)).as_ref()).unwrap().u
    }

    /// Returns a matrix with given singular values.
    fn with_values(values: &[f64]) -> Mat<f64> {
        let n = values.len();
        let (u, v) = (orthonormal(n, 1), orthonormal(n, 2));
        Mat::from_fn(n, n, |i, j| u[(i, j)] * values[j]) * v.transpose()
    }

    fn decomposed(core: &Mat<f64>) -> CoreSvd {
        let mut memory = MemBuffer::new(core_svd_scratch(core.nrows()));
        let identity = Mat::<f64>::identity(core.nrows(), core.nrows());
        CoreSvd::of(core.as_ref(), identity.as_ref(), MemStack::new(&mut memory)).unwrap()
    }

    /// Returns `U diag(s)` and `V` of the values with the given indices.
    fn triplets(found: &CoreSvd, core: &Mat<f64>, places: &[usize]) -> [Mat<f64>; 2] {
        match &found.vectors {
            Vectors::All { left, right } => {
                [left, right].map(|x| Mat::from_fn(x.nrows(), places.len(), |i, j| x[(i, places[j])]))
            }
            Vectors::OnDemand(eigen) => {
                let last = core.nrows() - 1;
                let v = eigen.vectors(places.iter().map(|i| last - i)).unwrap().unwrap();
                [core * &v, v]
            }
        }
    }

    /// Checks the kept triplets of a matrix with given singular values.
    fn check(values: &[f64], places: &[usize]) {
        let (core, size) = (with_values(values), values[0]);
        let found = decomposed(&core);
        for (x, s) in found.singular_values.iter().zip(values) {
            assert!((x - s).abs() <= 1e-12 * size, "{x:e} {s:e}");
        }
        let [mut u, v] = triplets(&found, &core, places);
        assert_eq!((u.ncols(), v.ncols()), (places.len(), places.len()));
        let singular_values: Vec<f64> = u.col_iter().map(|column| column.norm_l2()).collect();
        for (column, s) in u.col_iter_mut().zip(&singular_values) {
            column.iter_mut().for_each(|x| *x /= s);
        }
        let identity = Mat::<f64>::identity(places.len(), places.len());
        assert!((u.transpose() * &u - &identity).norm_max() < 1e-9);
        assert!((v.transpose() * &v - &identity).norm_max() < 1e-13);
        let mut left = core * faer::Scale(size.recip());
        for (j, &i) in places.iter().enumerate() {
            assert!((singular_values[j] - values[i]).abs() <= 1e-13 * size);
            left -= faer::Scale(singular_values[j] / size) * u.col(j) * v.col(j).transpose();
        }
        // Subtracting the kept triplets leaves the others.
        let mut others: Vec<f64> =
            (0..values.len()).filter(|i| !places.contains(i)).map(|i| values[i] / size).collect();
        others.resize(values.len(), 0.0);
        for (x, s) in dense_svd(left.as_ref()).unwrap().singular_values.iter().zip(&others) {
            assert!((x - s).abs() <= 1e-12, "{x:e} {s:e}");
        }
    }

    fn is_by_eigenvalues(core: &Mat<f64>) -> bool {
        matches!(decomposed(core).vectors, Vectors::OnDemand(_))
    }

    #[test]
    fn any_condition_number_and_selection() {
        let n = 24;
        let mut by_eigenvalues = 0;
        for spread in [0.0, 1.0, 2.0, 2.9, 3.1, 8.0, 14.0] {
            for size in [1e-140, 1.0, 1e140] {
                let last = (n - 1) as f64;
                let values: Vec<f64> = (0..n).map(|i| size * 10f64.powf(-spread * i as f64 / last)).collect();
                by_eigenvalues += usize::from(is_by_eigenvalues(&with_values(&values)));
                let all: Vec<usize> = (0..n).collect();
                for places in [&[][..], &all[..1], &all[..7], &[0, 3, 23], &all[20..], &all] {
                    check(&values, places);
                }
            }
        }
        assert_eq!(by_eigenvalues, 9);
    }

    #[test]
    fn clustered_values() {
        // Equal and nearly equal pairs: their two vectors must not coincide.
        for apart in [0.0, 1e-16, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6] {
            let values: Vec<f64> =
                (0..16).map(|i| 4.0 - 0.2 * f64::from(i / 2) - apart * f64::from(i % 2)).collect();
            for places in [vec![0, 1], vec![0, 1, 2, 3, 4], vec![2, 4, 6], (0..16).collect()] {
                check(&values, &places);
            }
        }
    }

    #[test]
    fn small_cores() {
        check(&[3.0], &[0]);
        check(&[3.0, 2.0], &[1]);
        for odd in [f64::NAN, f64::INFINITY] {
            let mut memory = MemBuffer::new(core_svd_scratch(3));
            let core = Mat::from_fn(3, 3, |_, _| odd);
            assert!(CoreSvd::of(core.as_ref(), core.as_ref(), MemStack::new(&mut memory)).is_err());
        }
        let zero = decomposed(&Mat::zeros(3, 3));
        assert_eq!(zero.singular_values, [0.0; 3]);
        assert_eq!(triplets(&zero, &Mat::zeros(3, 3), &[0, 2])[1].ncols(), 2);
        let one = decomposed(&Mat::from_fn(5, 5, |i, j| (i + 1) as f64 * (j + 1) as f64));
        assert!((one.singular_values[0] - 55.0).abs() < 1e-12 && one.singular_values[1] < 1e-13);
    }
}
