//! The singular value decomposition of the small core of an update: values at once, vectors of those that are kept
//! when these are known.
//!
//! A truncation keeps a quarter of the values, and which ones follows from the values of all updates. For a core
//! `C (K, K)` whose condition number is moderate, `C^T C` has the squares of the singular values for eigenvalues, off
//! by `eps s_1^2`, and for eigenvectors the `v_i` ([`SelectedEigen`]); `u_i = C v_i / s_i`. What is found so is looked
//! at: `C^T u_i = s_i v_i` must hold, which makes the `u_i` orthonormal, too. Else, and for other cores, faer
//! decomposes all of `C`.

use faer::{Mat, MatRef};

use crate::Result;
use crate::dense::product;
use crate::exponent::{binary_exponent, power_of_two};
use crate::selected_eigen::SelectedEigen;
use crate::svd::{ThinSvd, dense_svd};

/// The least of `(s_n / s_1)^2` for which eigenvalues of `C^T C` are taken: values are then right to 1e-9.
const SMALLEST_SQUARE: f64 = 1e-6;

/// What `C^T u_i - s_i v_i` may be, of the least value that is kept.
const TOLERANCE: f64 = 1e-9;

/// A core, decomposed as far as its singular values.
#[derive(Clone, Debug)]
pub(crate) struct CoreSvd {
    /// All of them, descending.
    pub singular_values: Vec<f64>,
    vectors: Vectors,
}

#[derive(Clone, Debug)]
enum Vectors {
    /// All of them.
    Known { u: Mat<f64>, v: Mat<f64> },
    /// By eigenvectors: of `core / unit`.
    Later { core: Mat<f64>, unit: f64, eigen: SelectedEigen },
}

/// Some singular triplets.
pub(crate) struct Kept {
    /// `(K, k)`.
    pub u: Mat<f64>,
    /// As many values.
    pub singular_values: Vec<f64>,
    /// `(K, k)`.
    pub v: Mat<f64>,
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
        let ThinSvd { u, singular_values, v } = dense_svd(core)?;
        Ok(Self { singular_values, vectors: Vectors::Known { u, v } })
    }

    /// `None` if the condition number is large, or the matrix is none that has one.
    fn by_eigenvalues(core: MatRef<'_, f64>) -> Option<Self> {
        let exponent = binary_exponent(core.norm_max()).ok()?;
        let unit = power_of_two(exponent);
        let core = core * faer::Scale(power_of_two(-exponent));
        let eigen = SelectedEigen::of(product(core.transpose(), core.as_ref())).ok()?;
        let is_moderate = *eigen.values.first()? > SMALLEST_SQUARE * *eigen.values.last()?;
        if !is_moderate {
            return None;
        }
        let singular_values = eigen.values.iter().rev().map(|square| square.sqrt() * unit).collect();
        Some(Self { singular_values, vectors: Vectors::Later { core, unit, eigen } })
    }

    /// The triplets of the values at these places.
    ///
    /// # Errors
    /// As [`dense_svd`].
    pub(crate) fn kept(&self, places: &[usize]) -> Result<Kept> {
        let select = |of: &Mat<f64>| Mat::from_fn(of.nrows(), places.len(), |i, j| of[(i, places[j])]);
        let triplets = |u: &Mat<f64>, values: &[f64], v: &Mat<f64>| Kept {
            u: select(u),
            singular_values: places.iter().map(|&i| values[i]).collect(),
            v: select(v),
        };
        match &self.vectors {
            Vectors::Known { u, v } => Ok(triplets(u, &self.singular_values, v)),
            Vectors::Later { core, unit, eigen } => {
                if let Some(kept) = by_eigenvectors(core, *unit, eigen, places) {
                    return Ok(kept);
                }
                let ThinSvd { u, singular_values, v } = dense_svd((core * faer::Scale(*unit)).as_ref())?;
                Ok(triplets(&u, &singular_values, &v))
            }
        }
    }
}

/// `None` where eigenvalues are so close to each other that vectors are not right.
fn by_eigenvectors(core: &Mat<f64>, unit: f64, eigen: &SelectedEigen, places: &[usize]) -> Option<Kept> {
    let last = eigen.values.len() - 1;
    let v = eigen.vectors(places.iter().map(|i| last - i))?;
    let mut u = product(core.as_ref(), v.as_ref());
    let lengths: Vec<f64> = u.col_iter().map(|column| column.norm_l2()).collect();
    for (column, length) in u.col_iter_mut().zip(&lengths) {
        let inverse = length.recip();
        column.iter_mut().for_each(|x| *x *= inverse);
    }
    let least = lengths.iter().copied().fold(f64::INFINITY, f64::min);
    let image = product(core.transpose(), u.as_ref());
    let is_singular = |(j, length): (usize, &f64)| {
        image.col(j).iter().zip(v.col(j).iter()).all(|(x, v)| (x - length * v).abs() <= TOLERANCE * least)
    };
    if !lengths.iter().enumerate().all(is_singular) {
        return None;
    }
    Some(Kept { u, singular_values: lengths.iter().map(|length| length * unit).collect(), v })
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
        let Kept { u, singular_values, v } = found.kept(places).unwrap();
        assert_eq!((u.ncols(), v.ncols(), singular_values.len()), (places.len(), places.len(), places.len()));
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
        matches!(CoreSvd::of(core.as_ref()).unwrap().vectors, Vectors::Later { .. })
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
        assert_eq!(by_eigenvalues, 12);
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
        assert_eq!(zero.kept(&[0, 2]).unwrap().v.ncols(), 2);
        let one = CoreSvd::of(Mat::from_fn(5, 5, |i, j| (i + 1) as f64 * (j + 1) as f64).as_ref()).unwrap();
        assert!((one.singular_values[0] - 55.0).abs() < 1e-12 && one.singular_values[1] < 1e-13);
    }
}
