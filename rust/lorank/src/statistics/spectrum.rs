//! The spectrum of a matrix: the eigenvalues of `W^T W`, checked and in order.

use crate::{Error, Result};

/// The `p = min(out, in)` possibly non-zero eigenvalues of `W^T W`, ascending.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    eigenvalues: Vec<f64>,
    /// Index of the first numerically non-zero eigenvalue.
    first_nonzero: usize,
    error: f64,
    sum: Option<f64>,
}

impl Spectrum {
    /// Sorts and checks eigenvalues in any order.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] at a NaN, an infinity, or a value negative beyond rounding.
    pub fn new(mut eigenvalues: Vec<f64>) -> Result<Self> {
        if let Some(bad) = eigenvalues.iter().find(|x| !x.is_finite()) {
            return Err(Error::InvalidInput(format!("eigenvalues must be finite, one is {bad}")));
        }
        eigenvalues.sort_unstable_by(f64::total_cmp);
        let largest = eigenvalues.last().copied().unwrap_or(0.0).max(0.0);
        let cut_off = eigenvalues.len() as f64 * f64::EPSILON * largest;
        if let Some(&smallest) = eigenvalues.first()
            && smallest < -cut_off
        {
            return Err(Error::InvalidInput(format!(
                "eigenvalues of W^T W cannot be negative, one is {smallest:e} (the largest is {largest:e})"
            )));
        }
        for value in eigenvalues.iter_mut().take_while(|x| **x <= 0.0) {
            *value = 0.0;
        }
        let first_nonzero = eigenvalues.partition_point(|&x| x <= cut_off);
        Ok(Self { eigenvalues, first_nonzero, error: 0.0, sum: None })
    }

    /// The same, each eigenvalue known to within `error`.
    #[must_use]
    pub fn with_error(self, error: f64) -> Self {
        Self { error, ..self }
    }

    /// The same, with a sum that is known better than its terms.
    #[must_use]
    pub fn with_sum(self, sum: f64) -> Self {
        Self { sum: Some(sum), ..self }
    }

    /// The same, eigenvalues that cannot be told from zero counted as non-zero, unless all are zero.
    #[must_use]
    pub fn with_unresolved(self) -> Self {
        let first_nonzero = if self.largest() > 0.0 { 0 } else { self.eigenvalues.len() };
        Self { first_nonzero, ..self }
    }

    /// All `p` eigenvalues, ascending.
    #[must_use]
    pub fn eigenvalues(&self) -> &[f64] {
        &self.eigenvalues
    }

    /// The eigenvalues, given away.
    #[must_use]
    pub fn into_eigenvalues(self) -> Vec<f64> {
        self.eigenvalues
    }

    /// The eigenvalues above `p * eps(float64) * lambda_max`, ascending: the numerically non-zero.
    #[must_use]
    pub fn nonzero(&self) -> &[f64] {
        &self.eigenvalues[self.first_nonzero..]
    }

    /// What each eigenvalue may be off by; 0 if nothing is known.
    #[must_use]
    pub const fn error(&self) -> f64 {
        self.error
    }

    /// How many of the numerically non-zero eigenvalues may be zero.
    #[must_use]
    pub fn num_unresolved(&self) -> usize {
        self.nonzero().partition_point(|&x| x <= self.error)
    }

    /// The largest eigenvalue; 0 if there is none.
    #[must_use]
    pub fn largest(&self) -> f64 {
        self.eigenvalues.last().copied().unwrap_or(0.0)
    }

    /// The sum of the eigenvalues: the squared Frobenius norm of `W`.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.sum.unwrap_or_else(|| self.eigenvalues.iter().sum())
    }

    /// The precision, relative to the largest, to which eigenvalues of this many dimensions are known.
    #[must_use]
    pub fn resolution(&self) -> f64 {
        let rounding = self.eigenvalues.len() as f64 * f64::EPSILON;
        if self.error > 0.0 { rounding.max(self.error / self.largest()) } else { rounding }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_clips_and_cuts_off() {
        let spectrum = Spectrum::new(vec![4.0, -1e-17, 1.0, 1e-16, 0.0]).unwrap();
        assert_eq!(spectrum.eigenvalues(), [0.0, 0.0, 1e-16, 1.0, 4.0]);
        assert_eq!(spectrum.nonzero(), [1.0, 4.0]);
        assert!((spectrum.largest() - 4.0).abs() < 1e-300);
    }

    #[test]
    fn what_is_not_resolved_is_kept_and_counted() {
        let values = vec![0.0, 1e-20, 1e-9, 1e-3, 1.0];
        let exact = Spectrum::new(values.clone()).unwrap();
        assert_eq!((exact.nonzero().len(), exact.num_unresolved()), (3, 0));
        let fast = Spectrum::new(values).unwrap().with_error(1e-6).with_unresolved();
        assert_eq!((fast.nonzero().len(), fast.num_unresolved()), (5, 3));
        assert!((fast.resolution() - 1e-6).abs() < 1e-18);
        let zero = Spectrum::new(vec![0.0; 3]).unwrap().with_error(1e-6).with_unresolved();
        assert_eq!((zero.nonzero().len(), zero.num_unresolved()), (0, 0));
    }

    #[test]
    fn zero_and_empty_have_no_nonzero_part() {
        assert!(Spectrum::new(vec![0.0; 3]).unwrap().nonzero().is_empty());
        assert!(Spectrum::new(vec![]).unwrap().nonzero().is_empty());
    }

    #[test]
    fn refuses_what_no_gram_matrix_has() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(Spectrum::new(vec![1.0, bad]).is_err());
        }
    }
}
