//! `PL_Alpha_Hill`: the Hill estimator of the power-law exponent of a spectrum's tail.
//!
//! Source: \[HTSR-LORA\], equation 2; the estimator: \[HILL\].

use crate::statistics::spectrum::Spectrum;

/// The definition of the tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// The largest `k = ceil(n/2)` eigenvalues, with the threshold `lambda_{n-k}` (1-based, ascending).
    Median,
    /// The eigenvalues from `lambda[n // 2]` on (0-based, ascending), with the first of them as threshold.
    /// The published code of \[ALPHAPRUNING\] and \[TEMPBALANCE\] uses this definition.
    XminMid,
}

/// Returns `1 + k / sum ln(lambda_i / threshold)` over the tail of the numerically non-zero eigenvalues.
///
/// The exponent is scale-free. It is `NaN` with fewer than two non-zero eigenvalues (three for
/// [`Convention::XminMid`], whose tail would be its threshold alone), and `+inf` if the eigenvalues of the
/// tail are equal within their precision.
///
/// # Examples
/// ```
/// use lorank::hill::{Convention, alpha_hill};
/// use lorank::spectrum::Spectrum;
///
/// let spectrum = Spectrum::new(vec![1.0, 2.0, 4.0, 16.0]).unwrap();
/// // n = 4: k = 2, threshold 2, tail 4 and 16.
/// let alpha = alpha_hill(&spectrum, Convention::Median);
/// assert!((alpha - (1.0 + 2.0 / 16f64.ln())).abs() < 1e-15);
/// ```
#[must_use]
pub fn alpha_hill(spectrum: &Spectrum, convention: Convention) -> f64 {
    let Some((threshold, tail)) = cut(spectrum.nonzero(), convention) else { return f64::NAN };
    if spectrum.largest() <= threshold * (1.0 + spectrum.resolution()) {
        return f64::INFINITY;
    }
    from_logarithms(tail.len(), tail.iter().map(|x| (x / threshold).ln()).sum())
}

/// Returns a bound on the error of [`alpha_hill`]: [`alpha_hill_spread`], plus the effect of counting or not
/// counting the eigenvalues that are indistinguishable from zero. `NaN` where the exponent is not finite.
#[must_use]
pub fn alpha_hill_error(spectrum: &Spectrum, convention: Convention) -> f64 {
    let alpha = alpha_hill(spectrum, convention);
    if !alpha.is_finite() {
        return f64::NAN;
    }
    let resolved = &spectrum.nonzero()[spectrum.num_unresolved()..];
    let Some((threshold, tail)) = cut(resolved, convention) else { return f64::INFINITY };
    let other = from_logarithms(tail.len(), tail.iter().map(|x| (x / threshold).ln()).sum());
    alpha_hill_spread(spectrum, convention) + (other - alpha).abs()
}

/// Returns a bound on the error of [`alpha_hill`] if every eigenvalue has the error [`Spectrum::error`] and
/// the set of non-zero eigenvalues is right. Infinite if the threshold is indistinguishable from zero, or
/// undefined.
#[must_use]
pub fn alpha_hill_spread(spectrum: &Spectrum, convention: Convention) -> f64 {
    let error = spectrum.error();
    let Some((threshold, tail)) = cut(spectrum.nonzero(), convention).filter(|cut| cut.0 > error) else {
        return f64::INFINITY;
    };
    let least: f64 = tail.iter().map(|x| ((x - error) / (threshold + error)).ln().max(0.0)).sum();
    let most: f64 = tail.iter().map(|x| ((x + error) / (threshold - error)).ln()).sum();
    from_logarithms(tail.len(), least) - from_logarithms(tail.len(), most)
}

/// Returns the threshold and the tail of ascending values.
fn cut(values: &[f64], convention: Convention) -> Option<(f64, &[f64])> {
    let n = values.len();
    match convention {
        Convention::Median if n >= 2 => {
            let k = n.div_ceil(2);
            Some((values[n - k - 1], &values[n - k..]))
        }
        Convention::XminMid if n >= 3 => Some((values[n / 2], &values[n / 2..])),
        _ => None,
    }
}

fn from_logarithms(count: usize, sum: f64) -> f64 {
    1.0 + count as f64 / sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alpha(values: &[f64], convention: Convention) -> f64 {
        alpha_hill(&Spectrum::new(values.to_vec()).unwrap(), convention)
    }

    #[test]
    fn exponents_equal_results_by_hand() {
        // n = 4: k = 2, threshold 2; tail 4, 16: ln 2 + ln 8 = 4 ln 2.
        let four = [1.0, 2.0, 4.0, 16.0];
        assert!((alpha(&four, Convention::Median) - (1.0 + 2.0 / (4.0 * 2f64.ln()))).abs() < 1e-15);
        // i = 2, threshold 4, tail 4, 16: 0 + ln 4.
        assert!((alpha(&four, Convention::XminMid) - (1.0 + 2.0 / 4f64.ln())).abs() < 1e-15);
        // n = 5: k = 3, threshold 2; tail 4, 8, 16. The zero is not counted.
        let five = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0];
        assert!((alpha(&five, Convention::Median) - (1.0 + 3.0 / (6.0 * 2f64.ln()))).abs() < 1e-15);
        // i = 5 // 2 = 2, threshold 4; tail 4, 8, 16.
        assert!((alpha(&five, Convention::XminMid) - (1.0 + 3.0 / (3.0 * 2f64.ln()))).abs() < 1e-15);
    }

    #[test]
    fn exponent_of_few_or_equal_values_is_undefined_or_infinite() {
        for convention in [Convention::Median, Convention::XminMid] {
            for few in [&[][..], &[0.0, 0.0], &[0.0, 3.0]] {
                assert!(alpha(few, convention).is_nan());
            }
            assert!(alpha(&[7.0; 6], convention).is_infinite());
            assert!(alpha(&[7.0, 7.0 * (1.0 + f64::EPSILON), 7.0, 7.0], convention).is_infinite());
        }
        assert!(alpha(&[1.0, 2.0], Convention::Median).is_finite());
        assert!(alpha(&[1.0, 2.0], Convention::XminMid).is_nan());
    }

    #[test]
    fn error_covers_unresolved_eigenvalues() {
        // Four values above 1, and two that may be zero but are counted: n = 6 or n = 4.
        let values = vec![1e-9, 2e-9, 1.0, 2.0, 4.0, 16.0];
        let spectrum = Spectrum::new(values.clone()).unwrap().with_error(1e-8).with_unresolved();
        let (with, without) = (alpha(&values, Convention::Median), alpha(&values[2..], Convention::Median));
        assert!((with - without).abs() > 0.1);
        let found = alpha_hill_error(&spectrum, Convention::Median);
        assert!((found - (with - without).abs()).abs() < 1e-6, "{found}");
        // The threshold may be zero.
        let spectrum = Spectrum::new(values).unwrap().with_error(1.5).with_unresolved();
        assert!(alpha_hill_error(&spectrum, Convention::Median).is_infinite());
        assert!(alpha_hill_error(&Spectrum::new(vec![3.0]).unwrap(), Convention::Median).is_nan());
    }

    proptest! {
        #[test]
        fn error_covers_what_values_may_be(
            entries in prop::collection::vec((1e-2f64..1e3, -1.0f64..1.0), 3..50),
            error in 0.0f64..5e-3,
        ) {
            let given: Vec<f64> = entries.iter().map(|(x, _)| *x).collect();
            let truth: Vec<f64> = entries.iter().map(|(x, shift)| x + shift * error).collect();
            let spectrum = Spectrum::new(given.clone()).unwrap().with_error(error);
            for convention in [Convention::Median, Convention::XminMid] {
                let bound = alpha_hill_error(&spectrum, convention);
                let off = (alpha(&given, convention) - alpha(&truth, convention)).abs();
                prop_assert!(off <= bound * (1.0 + 1e-9) + 1e-12 || !off.is_finite(), "{off} {bound}");
            }
        }

        #[test]
        fn scale_free(values in prop::collection::vec(1e-3f64..1e3, 3..50), exponent in -90i32..90) {
            let scaled: Vec<f64> = values.iter().map(|x| x * 2f64.powi(exponent)).collect();
            for convention in [Convention::Median, Convention::XminMid] {
                let (a, b) = (alpha(&values, convention), alpha(&scaled, convention));
                prop_assert!((a - b).abs() <= 1e-9 * a.abs() || a.is_infinite() && b.is_infinite());
                prop_assert!(a > 1.0);
            }
        }
    }
}
