//! The continuous power-law fit of a spectrum's tail: `p(x) ~ x^-alpha` for `x >= xmin`.
//!
//! Source: \[CSN\]. Every eigenvalue is a candidate for `xmin`; its exponent is the maximum-likelihood
//! estimate `alpha = 1 + n / sum ln(x_i / xmin)`. The chosen `xmin` has the smallest Kolmogorov-Smirnov
//! distance. The distance compares the fitted distribution at the i-th of n tail values (0-based) with
//! `i / n`, as in the authors' own code.

use crate::exec::cancel::CancelToken;
use crate::statistics::spectrum::Spectrum;
use crate::{Error, Result};

/// A fitted tail. All fields are `NaN` if there is no fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerLaw {
    /// Exponent of the density.
    pub alpha: f64,
    /// First value of the tail, in units of the eigenvalues.
    pub xmin: f64,
    /// Kolmogorov-Smirnov distance between the tail and the fitted law.
    pub distance: f64,
}

impl PowerLaw {
    const NONE: Self = Self { alpha: f64::NAN, xmin: f64::NAN, distance: f64::NAN };
}

/// Number of candidates for `xmin` whose distances are computed first, to bound the distances of the others.
const PROBES: usize = 16;

/// Number of values of a tail that are compared between two polls of the cancel token.
const POLLED: usize = 1 << 16;

/// Fits the numerically non-zero eigenvalues. At least two of them must differ.
///
/// The search is exhaustive: a candidate is abandoned only when its distance exceeds that of a finished one.
/// The worst case is `n^2 / 2` exponentials; a real spectrum needs a few per cent of them.
///
/// # Examples
/// ```
/// use lorank::powerlaw::fit_power_law;
/// use lorank::spectrum::Spectrum;
///
/// let found = fit_power_law(&Spectrum::new(vec![1.0, 2.0]).unwrap());
/// assert!((found.alpha - (1.0 + 2.0 / 2f64.ln())).abs() < 1e-12);
/// ```
#[must_use]
pub fn fit_power_law(spectrum: &Spectrum) -> PowerLaw {
    // The only errors are cancellation and a lack of memory.
    fit_until(spectrum, &CancelToken::default()).unwrap_or(PowerLaw::NONE)
}

/// Fits as [`fit_power_law`] does, until it is cancelled.
///
/// # Errors
/// [`Error::Cancelled`] and [`Error::OutOfMemory`].
pub fn fit_until(spectrum: &Spectrum, cancel: &CancelToken) -> Result<PowerLaw> {
    let values = spectrum.nonzero();
    let n = values.len();
    let largest = spectrum.largest();
    let (mut logarithms, mut suffix_sums) = (Vec::new(), Vec::new());
    for memory in [&mut logarithms, &mut suffix_sums] {
        let bytes = (n + 1).saturating_mul(size_of::<f64>());
        memory.try_reserve_exact(n + 1).map_err(|_| Error::no_memory(bytes, "a power-law fit"))?;
    }
    for piece in values.chunks(POLLED) {
        cancel.check()?;
        logarithms.extend(piece.iter().map(|&x| log_ratio(x, largest)));
    }
    // Sums of logarithms from each index on, so that the exponent of a candidate costs O(1).
    suffix_sums.resize(n + 1, 0.0);
    for i in (0..n).rev() {
        suffix_sums[i] = suffix_sums[i + 1] + logarithms[i];
    }
    let slope = |i: usize| {
        let tail = (n - i) as f64;
        tail / (suffix_sums[i] - tail * logarithms[i])
    };
    // Equal values share one tail, which begins at the first of them. The largest value has no tail.
    let is_candidate = |i: usize| {
        (i == 0 || values[i - 1] < values[i])
            && values[i] * (1.0 + spectrum.resolution()) < spectrum.largest()
    };

    let mut bound = f64::INFINITY;
    for i in (0..n).step_by(n.div_ceil(PROBES).max(1)).filter(|&i| is_candidate(i)) {
        if let Some(distance) = distance_within(&logarithms[i..], slope(i), bound, cancel)? {
            bound = distance;
        }
    }
    let mut best = PowerLaw::NONE;
    for i in (0..n).filter(|&i| is_candidate(i)) {
        if let Some(distance) = distance_within(&logarithms[i..], slope(i), bound, cancel)?
            && (distance < bound || best.alpha.is_nan())
        {
            bound = distance;
            best = PowerLaw { alpha: 1.0 + slope(i), xmin: values[i], distance };
        }
    }
    Ok(best)
}

/// Returns `ln(x / largest)` without cancellation for close values.
fn log_ratio(x: f64, largest: f64) -> f64 {
    if x > largest / 2.0 { ((x - largest) / largest).ln_1p() } else { (x / largest).ln() }
}

/// Returns the distance between a tail and its law, or `None` as soon as the distance exceeds `bound`.
fn distance_within(logarithms: &[f64], slope: f64, bound: f64, cancel: &CancelToken) -> Result<Option<f64>> {
    cancel.check()?;
    let n = logarithms.len();
    let deviation =
        |i: usize| (i as f64 / n as f64 + (slope * (logarithms[0] - logarithms[i])).exp() - 1.0).abs();
    // A coarse pass first: most rejected candidates deviate somewhere in the middle.
    let coarse = (0..n).step_by(n.div_ceil(32));
    let mut largest = 0.0f64;
    for i in coarse {
        largest = largest.max(deviation(i));
        if largest > bound {
            return Ok(None);
        }
    }
    for start in (0..n).step_by(POLLED) {
        cancel.check()?;
        for i in start..n.min(start + POLLED) {
            largest = largest.max(deviation(i));
            if largest > bound {
                return Ok(None);
            }
        }
    }
    Ok(Some(largest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Computes every distance of every candidate, with powers instead of exponentials.
    fn oracle(values: &[f64]) -> Option<(f64, f64, f64)> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let mut best: Option<(f64, f64, f64)> = None;
        for (i, &xmin) in sorted.iter().enumerate() {
            if (i > 0 && sorted[i - 1] >= xmin) || xmin >= sorted[sorted.len() - 1] {
                continue;
            }
            let tail = &sorted[i..];
            let n = tail.len() as f64;
            let alpha = 1.0 + n / tail.iter().map(|x| (x / xmin).ln()).sum::<f64>();
            let distance = tail
                .iter()
                .enumerate()
                .map(|(j, x)| (1.0 - (x / xmin).powf(1.0 - alpha) - j as f64 / n).abs())
                .fold(0.0, f64::max);
            if best.is_none_or(|(_, _, least)| distance < least) {
                best = Some((alpha, xmin, distance));
            }
        }
        best
    }

    fn fit(values: &[f64]) -> PowerLaw {
        fit_power_law(&Spectrum::new(values.to_vec()).unwrap())
    }

    #[test]
    fn recovers_the_exponent_of_an_exact_law() {
        // Quantiles of x^-2.5 above 1.
        let values: Vec<f64> =
            (0..2000).map(|i| (1.0 - (f64::from(i) + 0.5) / 2000.0).powf(-1.0 / 1.5)).collect();
        let found = fit(&values);
        assert!((found.alpha - 2.5).abs() < 0.02, "{found:?}");
        assert!(found.distance < 0.002);
    }

    #[test]
    fn fit_of_fewer_than_two_different_values_is_nan() {
        for few in [&[][..], &[1.0], &[3.0, 3.0, 3.0], &[0.0, 2.0]] {
            assert!(fit(few).alpha.is_nan());
        }
        assert!((fit(&[1.0, 2.0]).alpha - (1.0 + 2.0 / 2f64.ln())).abs() < 1e-12);
    }

    #[test]
    fn fit_of_nearly_equal_values_is_accurate_in_any_unit() {
        let spread = |unit: f64| -> Vec<f64> {
            (0..40).map(|i| unit * (1.0 + f64::from(i * i) * 2f64.powi(-30))).collect()
        };
        let expected = fit(&spread(1.0)).alpha;
        for unit in [2f64.powi(-200), 2f64.powi(200)] {
            let found = fit(&spread(unit)).alpha;
            assert!((found - expected).abs() < 1e-12 * expected, "{found} {expected}");
        }
        let two = fit(&[2f64.powi(200), 2f64.powi(200) * (1.0 + 2f64.powi(-30))]).alpha;
        let exact = 1.0 + 2.0 / 2f64.powi(-30).ln_1p();
        assert!((two - exact).abs() < 1e-12 * exact, "{two} {exact}");
    }

    proptest! {
        #[test]
        fn equals_exhaustive_search(values in prop::collection::vec(
            prop_oneof![0.1f64..10.0, Just(1.0), Just(2.0), 1e-3f64..1e3], 2..80))
        {
            let found = fit(&values);
            match oracle(&values) {
                None => prop_assert!(found.alpha.is_nan()),
                // Several tails may have the same distance up to rounding: only the distance is unique.
                Some((alpha, xmin, distance)) => {
                    prop_assert!((found.distance - distance).abs() < 1e-12, "{found:?} {distance}");
                    if found.xmin.to_bits() == xmin.to_bits() {
                        prop_assert!((found.alpha - alpha).abs() < 1e-9 * alpha);
                    }
                }
            }
        }
    }
}
