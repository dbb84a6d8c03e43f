//! The singular value decomposition of the small core of an update: values at once, vectors of those that are kept
//! when these are known.
//!
//! A truncation keeps a quarter of the values, and which ones follows from the values of all updates. For a core
//! `C (K, K)` whose condition number is moderate, `C^T C = Q T Q^T` has the squares of the singular values for
//! eigenvalues, off by `eps s_1^2`; with eigenvectors `z_i` of `T` ([`SelectedEigen`]), `v_i = Q z_i` and
//! `u_i = C v_i / s_i`. What is kept of a core is `C Q` and `Q`, or what they are multiplied with: memory that is
//! touched for the first time costs more than the arithmetic. Other cores are decomposed by faer, all of them.

use faer::{Mat, MatRef};

use crate::Result;
use crate::dense::product;
use crate::exponent::{binary_exponent, power_of_two};
use crate::selected_eigen::SelectedEigen;
use crate::svd::dense_svd;

/// The least of `(s_n / s_1)^2` for which eigenvalues of `C^T C` are taken: values are then right to 1e-9.
const SMALLEST_SQUARE: f64 = 1e-6;

/// The least distance between squares, of the largest: closer ones have no vectors of their own.
const LEAST_GAP: f64 = 1e-11;

/// A core, decomposed as far as its singular values.
#[derive(Clone, Debug)]
pub(crate) struct CoreSvd {
    /// All of them, descending.
    pub singular_values: Vec<f64>,
    /// `C X (K, K)`.
    pub left: Mat<f64>,
    /// `X (K, K)`: the right singular vectors are `X Z`.
    pub right: Mat<f64>,
    pub rotation: Rotation,
}

/// `Z`, orthonormal.
#[derive(Clone, Debug)]
pub(crate) enum Rotation {
    /// The identity.
    None,
    /// Eigenvectors that are still to be found.
    Eigenvectors(SelectedEigen),
}

impl CoreSvd {
    /// Of a square core.
    ///
    /// # Errors
    /// As [`dense_svd`].
    pub(crate) fn of(core: MatRef<'_, f64>) -> Result<Self> {
        if let Some(found) = Self::by_eigenvalues(core) {
            return Ok(found);
        }
        let svd = dense_svd(core)?;
        let s = &svd.singular_values;
        let left = Mat::from_fn(svd.u.nrows(), s.len(), |i, j| svd.u[(i, j)] * s[j]);
        Ok(Self { left, right: svd.v, singular_values: svd.singular_values, rotation: Rotation::None })
    }

    /// `None` if the condition number is large, values are equal, or the matrix is none that has a condition number.
    fn by_eigenvalues(core: MatRef<'_, f64>) -> Option<Self> {
        let exponent = binary_exponent(core.norm_max()).ok()?;
        let unit = power_of_two(exponent);
        let scaled = core * faer::Scale(power_of_two(-exponent));
        let (eigen, q) = SelectedEigen::of(product(scaled.transpose(), scaled.as_ref())).ok()?;
        let largest = *eigen.values.last()?;
        let is_moderate = *eigen.values.first()? > SMALLEST_SQUARE * largest;
        let are_apart = eigen.values.windows(2).all(|pair| pair[1] - pair[0] > LEAST_GAP * largest);
        if !is_moderate || !are_apart {
            return None;
        }
        let singular_values = eigen.values.iter().rev().map(|square| square.sqrt() * unit).collect();
        let left = product(core, q.as_ref());
        Some(Self { singular_values, left, right: q, rotation: Rotation::Eigenvectors(eigen) })
    }
}

impl Rotation {
    /// `X Z` of the columns that belong to the values at these places, for some matrices `X (., K)`; `None` if
    /// vectors are not right, which [`LEAST_GAP`] should rule out.
    pub(crate) fn columns<const N: usize>(
        &self,
        of: [&Mat<f64>; N],
        places: &[usize],
    ) -> Option<[Mat<f64>; N]> {
        Some(match self {
            Self::None => of.map(|x| Mat::from_fn(x.nrows(), places.len(), |i, j| x[(i, places[j])])),
            Self::Eigenvectors(eigen) => {
                let last = eigen.values.len() - 1;
                let z = eigen.vectors(places.iter().map(|i| last - i))?;
                of.map(|x| product(x.as_ref(), z.as_ref()))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Orthonormal, `(n, n)`.
    fn orthonormal(n: usize, seed: usize) -> Mat<f64> {
        let noise = |i: usize| ((i * 7919 + seed * 31 + i * i * seed) % 1013) as f64 / 1013.0 - 0.5;
        dense_svd(Mat::from_fn(n, n, |i, j| noise(i * n + j)).as_ref()).unwrap().u
    }

    /// A matrix with these singular values.
    fn with_values(values: &[f64]) -> Mat<f64> {
        let n = values.len();
        let (u, v) = (orthonormal(n, 1), orthonormal(n, 2));
        Mat::from_fn(n, n, |i, j| u[(i, j)] * values[j]) * v.transpose()
    }

    /// The kept triplets of a matrix with these singular values, against what is known of them.
    fn check(values: &[f64], places: &[usize]) {
        let (core, size) = (with_values(values), values[0]);
        let found = CoreSvd::of(core.as_ref()).unwrap();
        for (x, s) in found.singular_values.iter().zip(values) {
            assert!((x - s).abs() <= 1e-12 * size, "{x:e} {s:e}");
        }
        let [mut u, v] = found.rotation.columns([&found.left, &found.right], places).unwrap();
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
        // Without them, the others are left.
        let mut others: Vec<f64> =
            (0..values.len()).filter(|i| !places.contains(i)).map(|i| values[i] / size).collect();
        others.resize(values.len(), 0.0);
        for (x, s) in dense_svd(left.as_ref()).unwrap().singular_values.iter().zip(&others) {
            assert!((x - s).abs() <= 1e-12, "{x:e} {s:e}");
        }
    }

    fn is_by_eigenvalues(core: &Mat<f64>) -> bool {
        matches!(CoreSvd::of(core.as_ref()).unwrap().rotation, Rotation::Eigenvectors(_))
    }

    #[test]
    fn every_condition_number_and_any_choice() {
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
    fn clusters() {
        // Pairs, and nearly pairs: two vectors of one eigenvalue must not be one and the same.
        for apart in [0.0, 1e-16, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6] {
            let values: Vec<f64> =
                (0..16).map(|i| 4.0 - 0.2 * f64::from(i / 2) - apart * f64::from(i % 2)).collect();
            for places in [vec![0, 1], vec![0, 1, 2, 3, 4], vec![2, 4, 6], (0..16).collect()] {
                check(&values, &places);
            }
        }
    }

    #[test]
    fn small_ones() {
        check(&[3.0], &[0]);
        check(&[3.0, 2.0], &[1]);
        for odd in [f64::NAN, f64::INFINITY] {
            assert!(CoreSvd::of(Mat::from_fn(3, 3, |_, _| odd).as_ref()).is_err());
        }
        let zero = CoreSvd::of(Mat::zeros(3, 3).as_ref()).unwrap();
        assert_eq!(zero.singular_values, [0.0; 3]);
        assert_eq!(zero.rotation.columns([&zero.right], &[0, 2]).unwrap()[0].ncols(), 2);
        let one = CoreSvd::of(Mat::from_fn(5, 5, |i, j| (i + 1) as f64 * (j + 1) as f64).as_ref()).unwrap();
        assert!((one.singular_values[0] - 55.0).abs() < 1e-12 && one.singular_values[1] < 1e-13);
    }
}
