//! The Marchenko-Pastur edge of a spectrum, and the number of eigenvalues beyond it ("spikes").
//!
//! Source: \[HTSR-LORA\], equations 3 and 4, with `Q = max(out, in) / min(out, in)`: only this `Q` gives the
//! edge of the `p = min(out, in)` eigenvalues. The law: \[MP\].

use std::f64::consts::PI;

use crate::statistics::spectrum::Spectrum;
use crate::{Error, Result};

/// The estimator of the variance `sigma^2` of the bulk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The mean of the `p` eigenvalues.
    Mean,
    /// The median of the eigenvalues divided by the median of the unit law. Spikes do not raise this
    /// estimate.
    Median,
}

/// The edge of the bulk, and the number of eigenvalues beyond it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MarchenkoPastur {
    /// `sigma^2 (1 + 1/sqrt(Q))^2`, in units of the eigenvalues.
    pub edge: f64,
    /// The number of eigenvalues above the edge. Eigenvalues that are zero up to rounding are never counted,
    /// even if the median of a rank-deficient matrix puts the edge among them.
    pub spikes: usize,
    /// The error of the number of spikes if every eigenvalue has the error [`Spectrum::error`].
    pub spikes_error: usize,
}

/// Returns the edge and the spikes of the spectrum of a `(rows, cols)` matrix.
///
/// # Errors
/// [`Error::InvalidInput`] unless there are exactly `min(rows, cols) >= 1` eigenvalues.
///
/// # Examples
/// ```
/// use lorank::marchenko_pastur::{Scale, marchenko_pastur};
/// use lorank::spectrum::Spectrum;
///
/// let spectrum = Spectrum::new(vec![1.0, 1.0, 1.0, 9.0]).unwrap();
/// let found = marchenko_pastur(&spectrum, (4, 16), Scale::Mean).unwrap();
/// assert_eq!(found.edge, 6.75); // mean 3, Q = 4: 3 (1 + 1/2)^2
/// assert_eq!(found.spikes, 1);
/// ```
pub fn marchenko_pastur(
    spectrum: &Spectrum,
    (rows, cols): (usize, usize),
    scale: Scale,
) -> Result<MarchenkoPastur> {
    let values = spectrum.eigenvalues();
    let p = rows.min(cols);
    if values.len() != p || p == 0 {
        return Err(Error::InvalidInput(format!(
            "a {rows}x{cols} matrix has {p} eigenvalues, got {}",
            values.len()
        )));
    }
    let ratio = p as f64 / rows.max(cols) as f64; // 1/Q
    let (location, unit) = match scale {
        Scale::Mean => (spectrum.sum() / p as f64, 1.0),
        Scale::Median => (f64::midpoint(values[(p - 1) / 2], values[p / 2]), unit_median(ratio)),
    };
    let per_location = (1.0 + ratio.sqrt()).powi(2) / unit;
    let edge = location * per_location;
    let nonzero = spectrum.nonzero();
    let above = |edge: f64| nonzero.len() - nonzero.partition_point(|&x| x <= edge);
    let spikes = above(edge);
    let shift = spectrum.error() * (per_location + 1.0);
    let spikes_error = (above(edge - shift) - spikes).max(spikes - above(edge + shift));
    Ok(MarchenkoPastur { edge, spikes, spikes_error })
}

/// Returns the median of the Marchenko-Pastur law of mean 1 and ratio `y = 1/Q`, `0 < y <= 1`.
///
/// With `x = 1 + y - 2 sqrt(y) cos t`, `t` in `[0, pi]`, the density of the law becomes
/// `g(t) = (2/pi) sin^2 t / x(t)`. This function is smooth: Simpson's rule is accurate to about 1e-13.
#[must_use]
pub fn unit_median(y: f64) -> f64 {
    const INTERVALS: usize = 2048;
    let x = |t: f64| 1.0 + y - 2.0 * y.sqrt() * t.cos();
    // At y = 1, t = 0 the quotient is 0/0; its limit is (1 + cos t)/2 for y = 1, and 0 otherwise.
    let density = |t: f64| {
        if t == 0.0 { if y < 1.0 { 0.0 } else { 2.0 / PI } } else { 2.0 / PI * t.sin().powi(2) / x(t) }
    };
    let step = PI / INTERVALS as f64;
    let simpson =
        |a: f64, b: f64| (b - a) / 6.0 * (density(a) + 4.0 * density(f64::midpoint(a, b)) + density(b));
    let mut below = 0.0;
    for i in 0..INTERVALS {
        let start = i as f64 * step;
        let mass = simpson(start, start + step);
        if below + mass >= 0.5 {
            // Bisection within the interval.
            let (mut low, mut high) = (start, start + step);
            for _ in 0..60 {
                let middle = f64::midpoint(low, high);
                if below + simpson(start, middle) < 0.5 { low = middle } else { high = middle }
            }
            return x(low);
        }
        below += mass;
    }
    x(PI / 2.0) // unreachable: the density has mass 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn law(values: &[f64], shape: (usize, usize), scale: Scale) -> MarchenkoPastur {
        marchenko_pastur(&Spectrum::new(values.to_vec()).unwrap(), shape, scale).unwrap()
    }

    #[test]
    fn law_equals_results_by_hand() {
        // Mean 3, Q = 4: edge 3 (1 + 1/2)^2 = 6.75, in both orientations.
        for shape in [(4, 16), (16, 4)] {
            let found = law(&[1.0, 1.0, 1.0, 9.0], shape, Scale::Mean);
            assert!((found.edge - 6.75).abs() < 1e-15);
            assert_eq!(found.spikes, 1);
        }
    }

    #[test]
    fn error_of_the_number_of_spikes() {
        // Edge 6.75; an error of 0.1 moves the edge by up to 0.225, and the eigenvalue by 0.1.
        for (top, expected) in [(6.5, 1), (6.3, 0), (7.0, 1), (7.2, 0)] {
            let low = (12.0 - top) / 3.0;
            let spectrum = Spectrum::new(vec![low, low, low, top]).unwrap().with_error(0.1);
            let found = marchenko_pastur(&spectrum, (4, 16), Scale::Mean).unwrap();
            assert_eq!((found.spikes, found.spikes_error), (usize::from(top > 6.75), expected), "{top}");
        }
    }

    #[test]
    fn zero_and_equal_spectra_have_no_spikes() {
        for scale in [Scale::Mean, Scale::Median] {
            assert_eq!(law(&[0.0; 4], (4, 9), scale).spikes, 0);
            assert_eq!(law(&[5.0; 4], (4, 9), scale).spikes, 0);
        }
    }

    #[test]
    fn median_scale_is_independent_of_large_spikes() {
        let mut values: Vec<f64> = (1..=99).map(|i| f64::from(i) / 50.0).collect();
        let plain = law(&values, (99, 99), Scale::Median).edge;
        values[98] = 1e6;
        assert!((law(&values, (99, 99), Scale::Median).edge - plain).abs() < 1e-12);
        assert!(law(&values, (99, 99), Scale::Mean).edge > 100.0 * plain);
    }

    #[test]
    fn median_of_the_unit_law() {
        // For y -> 0 the law shrinks to a point at 1; at y = 1, x = u^2 with u semicircular on [0, 2]:
        // P(u <= a) = (a sqrt(4 - a^2) / 2 + 2 asin(a/2)) / pi = 1/2 defines the median a^2.
        assert!((unit_median(1e-9) - 1.0).abs() < 1e-4);
        let a = unit_median(1.0).sqrt();
        let below = (a * (4.0 - a * a).sqrt() / 2.0 + 2.0 * (a / 2.0).asin()) / PI;
        assert!((below - 0.5).abs() < 1e-11, "{below}");
    }

    #[test]
    fn wrong_number_of_eigenvalues_is_an_error() {
        let spectrum = Spectrum::new(vec![1.0; 3]).unwrap();
        assert!(marchenko_pastur(&spectrum, (4, 4), Scale::Mean).is_err());
        let empty = Spectrum::new(vec![]).unwrap();
        assert!(marchenko_pastur(&empty, (0, 4), Scale::Mean).is_err());
    }
}
