//! `PL_Alpha_Hill`: the Hill estimator of the power-law exponent of a spectrum's tail.
//!
//! Source: *Fine-Tuning Large Language Models using `LoRA` with Adaptive Rank Allocation Based on
//! Spectral Analysis*, equation 2.

use crate::spectrum::Spectrum;

/// Where the tail begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// The upper `k = ceil(n/2)` eigenvalues over `lambda_{n-k}` (1-based, ascending).
    Median,
    /// Threshold `lambda[n // 2]` (0-based, ascending), itself part of the tail: that of the
    /// published `AlphaPruning` and `TempBalance` code.
    XminMid,
}

/// `1 + k / sum ln(lambda_i / threshold)` over the tail, from the numerically non-zero eigenvalues.
///
/// Scale-free. `NaN` with fewer than two non-zero eigenvalues (three for [`Convention::XminMid`],
/// whose tail would be its threshold alone); `+inf` if the tail is all equal to within the
/// precision of the eigenvalues.
#[must_use]
pub fn alpha_hill(spectrum: &Spectrum, convention: Convention) -> f64 {
    let values = spectrum.nonzero();
    let n = values.len();
    let (threshold, tail) = match convention {
        Convention::Median if n >= 2 => {
            let k = n.div_ceil(2);
            (values[n - k - 1], &values[n - k..])
        }
        Convention::XminMid if n >= 3 => (values[n / 2], &values[n / 2..]),
        _ => return f64::NAN,
    };
    if spectrum.largest() <= threshold * (1.0 + spectrum.resolution()) {
        return f64::INFINITY;
    }
    let logarithms: f64 = tail.iter().map(|x| (x / threshold).ln()).sum();
    1.0 + tail.len() as f64 / logarithms
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alpha(values: &[f64], convention: Convention) -> f64 {
        alpha_hill(&Spectrum::new(values.to_vec()).unwrap(), convention)
    }

    #[test]
    fn worked_by_hand() {
        // n = 4: k = 2, threshold 2; tail 4, 16: ln 2 + ln 8 = 4 ln 2.
        let four = [1.0, 2.0, 4.0, 16.0];
        assert!((alpha(&four, Convention::Median) - (1.0 + 2.0 / (4.0 * 2f64.ln()))).abs() < 1e-15);
        // i = 2, threshold 4, tail 4, 16: 0 + ln 4.
        assert!((alpha(&four, Convention::XminMid) - (1.0 + 2.0 / 4f64.ln())).abs() < 1e-15);
        // n = 5: k = 3, threshold 2; tail 4, 8, 16. A zero does not count.
        let five = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0];
        assert!((alpha(&five, Convention::Median) - (1.0 + 3.0 / (6.0 * 2f64.ln()))).abs() < 1e-15);
        // i = 5 // 2 = 2, threshold 4; tail 4, 8, 16.
        assert!((alpha(&five, Convention::XminMid) - (1.0 + 3.0 / (3.0 * 2f64.ln()))).abs() < 1e-15);
    }

    #[test]
    fn undefined_and_infinite() {
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

    proptest! {
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
