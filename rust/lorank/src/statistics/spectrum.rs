//! The spectrum of a matrix: the checked, ascending eigenvalues of `W^T W`.

use crate::exec::cancel::CancelToken;
use crate::statistics::sort::sort;
use crate::{Error, Result};

/// The `p = min(out, in)` largest eigenvalues of `W^T W`, ascending.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    eigenvalues: Vec<f64>,
    /// Index of the first numerically non-zero eigenvalue.
    first_nonzero: usize,
    error: f64,
    sum: Option<f64>,
}

impl Spectrum {
    /// Sorts and checks eigenvalues.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] at a NaN, an infinity, or a value that is negative beyond rounding.
    pub fn new(eigenvalues: Vec<f64>) -> Result<Self> {
        Self::checked(eigenvalues, &CancelToken::default())
    }

    /// Sorts and checks eigenvalues as [`new`](Self::new) does, until it is cancelled.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new), [`Error::OutOfMemory`], and [`Error::Cancelled`].
    pub fn checked(mut eigenvalues: Vec<f64>, cancel: &CancelToken) -> Result<Self> {
        if let Some(bad) = eigenvalues.iter().find(|x| !x.is_finite()) {
            return Err(Error::InvalidInput(format!("eigenvalues must be finite, one is {bad}")));
        }
        sort(&mut eigenvalues, cancel)?;
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

    /// Sets the error of every eigenvalue.
    #[must_use]
    pub fn with_error(self, error: f64) -> Self {
        Self { error, ..self }
    }

    /// Sets a sum that is more accurate than the sum of the eigenvalues.
    #[must_use]
    pub fn with_sum(self, sum: f64) -> Self {
        Self { sum: Some(sum), ..self }
    }

    /// Counts eigenvalues that are indistinguishable from zero as non-zero, unless all eigenvalues are zero.
    #[must_use]
    pub fn with_unresolved(self) -> Self {
        let first_nonzero = if self.largest() > 0.0 { 0 } else { self.eigenvalues.len() };
        Self { first_nonzero, ..self }
    }

    /// Returns all `p` eigenvalues, ascending.
    #[must_use]
    pub fn eigenvalues(&self) -> &[f64] {
        &self.eigenvalues
    }

    /// Returns all `p` eigenvalues, ascending, and consumes the spectrum.
    #[must_use]
    pub fn into_eigenvalues(self) -> Vec<f64> {
        self.eigenvalues
    }

    /// Returns the numerically non-zero eigenvalues, ascending: those above `p * eps(float64) * lambda_max`.
    #[must_use]
    pub fn nonzero(&self) -> &[f64] {
        &self.eigenvalues[self.first_nonzero..]
    }

    /// Returns the bound on the error of every eigenvalue, 0 if it is unknown.
    #[must_use]
    pub const fn error(&self) -> f64 {
        self.error
    }

    /// Returns the number of numerically non-zero eigenvalues that may be zero.
    #[must_use]
    pub fn num_unresolved(&self) -> usize {
        self.nonzero().partition_point(|&x| x <= self.error)
    }

    /// Returns the largest eigenvalue, 0 of an empty spectrum.
    #[must_use]
    pub fn largest(&self) -> f64 {
        self.eigenvalues.last().copied().unwrap_or(0.0)
    }

    /// Returns the sum of the eigenvalues: the squared Frobenius norm of `W`.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.sum.unwrap_or_else(|| self.eigenvalues.iter().sum())
    }

    /// Returns the precision of the eigenvalues relative to the largest: `p * eps`, or the relative error if
    /// it is larger.
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
    fn new_sorts_clips_and_finds_the_first_nonzero() {
        let spectrum = Spectrum::new(vec![4.0, -1e-17, 1.0, 1e-16, 0.0]).unwrap();
        assert_eq!(spectrum.eigenvalues(), [0.0, 0.0, 1e-16, 1.0, 4.0]);
        assert_eq!(spectrum.nonzero(), [1.0, 4.0]);
        assert!((spectrum.largest() - 4.0).abs() < 1e-300);
    }

    #[test]
    fn unresolved_eigenvalues_are_kept_and_counted() {
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
    fn invalid_eigenvalues_are_errors() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(Spectrum::new(vec![1.0, bad]).is_err());
        }
    }
}
