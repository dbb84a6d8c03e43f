//! Effective ranks: the number of directions that carry a spectrum.
//!
//! The first three are scale-free, lie between 1 and `p`, equal `r` for `r` equal non-zero eigenvalues, and are
//! `NaN` for a zero matrix.

use crate::exec::cancel::CancelToken;
use crate::statistics::sort::sort;
use crate::statistics::spectrum::Spectrum;
use crate::{Error, Result};

/// Relative distance of sums that count as equal.
const SLACK: f64 = 1e-12;

/// Returns the stable rank `||W||_F^2 / ||W||_2^2 = sum(lambda) / lambda_max`.
#[must_use]
pub fn stable_rank(spectrum: &Spectrum) -> f64 {
    spectrum.sum() / spectrum.largest()
}

/// Returns the exponential of the entropy of the normalised eigenvalues: \[ERANK\], of eigenvalues instead of
/// singular values.
#[must_use]
pub fn effective_rank(spectrum: &Spectrum) -> f64 {
    if spectrum.largest() == 0.0 {
        return f64::NAN;
    }
    let entropy: f64 = shares(spectrum).map(|q| -q * q.ln()).sum();
    entropy.exp()
}

/// Returns the participation ratio `(sum lambda)^2 / sum lambda^2`.
#[must_use]
pub fn participation_ratio(spectrum: &Spectrum) -> f64 {
    if spectrum.largest() == 0.0 {
        return f64::NAN;
    }
    shares(spectrum).map(|q| q * q).sum::<f64>().recip()
}

/// Returns the smallest number of eigenvalues that hold a share of their sum, 0 if all are zero: the rank of
/// \[GARD\]. Negative eigenvalues count as zero.
///
/// # Errors
/// [`Error::InvalidInput`] at a NaN or an infinity, [`Error::OutOfMemory`], and [`Error::Cancelled`].
///
/// # Examples
/// ```
/// use lorank::{cancel::CancelToken, effective_rank::energy_rank};
///
/// assert_eq!(energy_rank(vec![4.0, 3.0, 2.0, 1.0], 0.7, &CancelToken::default()).unwrap(), 2);
/// ```
pub fn energy_rank(mut eigenvalues: Vec<f64>, energy: f64, cancel: &CancelToken) -> Result<usize> {
    if !eigenvalues.iter().all(|x| x.is_finite()) {
        return Err(Error::InvalidInput("eigenvalues must be finite".into()));
    }
    sort(&mut eigenvalues, cancel)?;
    let largest = eigenvalues.last().copied().unwrap_or(0.0);
    if largest <= 0.0 {
        return Ok(0);
    }
    // Division by the largest value keeps the sums of huge values finite.
    let descending = || eigenvalues.iter().rev().map(|x| x.max(0.0) / largest);
    let wanted = energy * (1.0 - SLACK) * descending().fold(0.0, |sum, x| sum + x);
    let mut sum = 0.0;
    let fewer = descending().take_while(|x| {
        sum += x;
        sum < wanted
    });
    Ok(fewer.count() + 1)
}

/// Returns the positive eigenvalues as shares of their sum, so that their squares cannot overflow.
fn shares(spectrum: &Spectrum) -> impl Iterator<Item = f64> {
    // The sum of the values themselves, as the shares must add up to 1.
    let sum: f64 = spectrum.eigenvalues().iter().sum();
    spectrum.eigenvalues().iter().map(move |x| x / sum).filter(|&q| q > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [fn(&Spectrum) -> f64; 3] = [stable_rank, effective_rank, participation_ratio];

    #[test]
    fn rank_of_equal_values_is_their_number() {
        for unit in [1e-60, 1.0, 1e60] {
            let spectrum = Spectrum::new([vec![unit; 5], vec![0.0; 3]].concat()).unwrap();
            for metric in ALL {
                assert!((metric(&spectrum) - 5.0).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn ranks_equal_results_by_hand() {
        let spectrum = Spectrum::new(vec![1.0, 3.0]).unwrap();
        assert!((stable_rank(&spectrum) - 4.0 / 3.0).abs() < 1e-15);
        assert!((participation_ratio(&spectrum) - 1.6).abs() < 1e-15);
        let entropy = 0.25 * 4f64.ln() + 0.75 * (4.0 / 3.0f64).ln();
        assert!((effective_rank(&spectrum) - entropy.exp()).abs() < 1e-15);
    }

    #[test]
    fn zero_spectrum_is_nan() {
        let zero = Spectrum::new(vec![0.0; 4]).unwrap();
        assert!(ALL.iter().all(|metric| metric(&zero).is_nan()));
    }

    proptest! {
        #[test]
        fn between_one_and_p(values in prop::collection::vec(0.0f64..1e6, 1..40)) {
            let spectrum = Spectrum::new(values).unwrap();
            prop_assume!(spectrum.largest() > 0.0);
            let p = spectrum.eigenvalues().len() as f64;
            for metric in ALL {
                prop_assert!((1.0 - 1e-12..=p * (1.0 + 1e-12)).contains(&metric(&spectrum)));
            }
        }
    }
}
