//! All metrics of one matrix in a spectral report.

use crate::Result;
use crate::exec::cancel::CancelToken;
use crate::exec::memory::probe;
use crate::statistics::effective_rank::{effective_rank, participation_ratio, stable_rank};
use crate::statistics::hill::{Convention, alpha_hill, alpha_hill_error};
use crate::statistics::marchenko_pastur::{Scale, marchenko_pastur};
use crate::statistics::powerlaw::fit_until;
use crate::statistics::spectrum::Spectrum;

/// The metrics of one matrix. Undefined metrics are `NaN`: all scale-free metrics of a zero matrix, and
/// exponents of too few eigenvalues.
#[derive(Clone, Copy, Debug)]
pub struct SpectralMetrics {
    /// Number of eigenvalues above `p * eps * lambda_max`.
    pub num_nonzero: usize,
    /// Error of every eigenvalue: [`Spectrum::error`].
    pub eigenvalue_error: f64,
    /// Number of eigenvalues that may be zero: [`Spectrum::num_unresolved`].
    pub num_unresolved: usize,
    /// [`alpha_hill`] with [`Convention::Median`].
    pub alpha_hill: f64,
    /// Error of `alpha_hill`: [`alpha_hill_error`].
    pub alpha_hill_error: f64,
    /// [`alpha_hill`] with [`Convention::XminMid`].
    pub alpha_hill_xmin_mid: f64,
    /// Marchenko-Pastur edge with [`Scale::Mean`].
    pub mp_edge: f64,
    /// Number of eigenvalues above `mp_edge`.
    pub mp_spikes: usize,
    /// Error of `mp_spikes`.
    pub mp_spikes_error: usize,
    /// Marchenko-Pastur edge with [`Scale::Median`].
    pub mp_edge_median: f64,
    /// Number of eigenvalues above `mp_edge_median`.
    pub mp_spikes_median: usize,
    /// `mp_edge / lambda_max`.
    pub mp_soft_rank: f64,
    /// Exponent of the continuous power-law fit.
    pub powerlaw_alpha: f64,
    /// First value of the fitted tail.
    pub powerlaw_xmin: f64,
    /// Kolmogorov-Smirnov distance of the fit.
    pub powerlaw_distance: f64,
    /// `powerlaw_alpha * log10(lambda_max)`.
    pub alpha_weighted: f64,
    /// `sqrt(sum lambda)`.
    pub frobenius_norm: f64,
    /// `sqrt(lambda_max)`.
    pub spectral_norm: f64,
    /// [`stable_rank`].
    pub stable_rank: f64,
    /// [`effective_rank`].
    pub effective_rank: f64,
    /// [`participation_ratio`].
    pub participation_ratio: f64,
}

impl SpectralMetrics {
    /// Computes the metrics of the spectrum of a `(rows, cols)` matrix.
    ///
    /// # Errors
    /// [`crate::Error::InvalidInput`] unless there are `min(rows, cols) >= 1` eigenvalues;
    /// [`crate::Error::OutOfMemory`].
    pub fn new(spectrum: &Spectrum, shape: (usize, usize)) -> Result<Self> {
        Self::until(spectrum, shape, &CancelToken::default())
    }

    /// Computes the metrics as [`new`](Self::new) does, until it is cancelled.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new), and [`crate::Error::Cancelled`].
    pub fn until(spectrum: &Spectrum, shape: (usize, usize), cancel: &CancelToken) -> Result<Self> {
        let mean = marchenko_pastur(spectrum, shape, Scale::Mean)?;
        let median = marchenko_pastur(spectrum, shape, Scale::Median)?;
        // The logarithms of a power-law fit, and their sums.
        probe(2 * (spectrum.eigenvalues().len() + 1) * size_of::<f64>(), "statistics of a spectrum")?;
        let power_law = fit_until(spectrum, cancel)?;
        let alpha_hill = |convention| {
            cancel.check()?;
            Ok(alpha_hill(spectrum, convention))
        };
        let (by_median, by_middle) = (alpha_hill(Convention::Median)?, alpha_hill(Convention::XminMid)?);
        let alpha_hill_error = alpha_hill_error(spectrum, Convention::Median);
        cancel.check()?;
        Ok(Self {
            num_nonzero: spectrum.nonzero().len(),
            eigenvalue_error: spectrum.error(),
            num_unresolved: spectrum.num_unresolved(),
            alpha_hill: by_median,
            alpha_hill_error,
            alpha_hill_xmin_mid: by_middle,
            mp_edge: mean.edge,
            mp_spikes: mean.spikes,
            mp_spikes_error: mean.spikes_error,
            mp_edge_median: median.edge,
            mp_spikes_median: median.spikes,
            mp_soft_rank: mean.edge / spectrum.largest(),
            powerlaw_alpha: power_law.alpha,
            powerlaw_xmin: power_law.xmin,
            powerlaw_distance: power_law.distance,
            alpha_weighted: power_law.alpha * spectrum.largest().log10(),
            frobenius_norm: spectrum.sum().sqrt(),
            spectral_norm: spectrum.largest().sqrt(),
            stable_rank: stable_rank(spectrum),
            effective_rank: effective_rank(spectrum),
            participation_ratio: participation_ratio(spectrum),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_norms_of_a_zero_matrix_are_defined() {
        let m = SpectralMetrics::new(&Spectrum::new(vec![0.0; 3]).unwrap(), (3, 8)).unwrap();
        assert_eq!((m.num_nonzero, m.mp_spikes, m.mp_spikes_median), (0, 0, 0));
        for zero in [m.frobenius_norm, m.spectral_norm, m.mp_edge, m.mp_edge_median] {
            assert!(zero == 0.0, "{m:?}");
        }
        for undefined in [
            m.alpha_hill,
            m.alpha_hill_error,
            m.alpha_hill_xmin_mid,
            m.mp_soft_rank,
            m.powerlaw_alpha,
            m.powerlaw_xmin,
            m.powerlaw_distance,
            m.alpha_weighted,
            m.stable_rank,
            m.effective_rank,
            m.participation_ratio,
        ] {
            assert!(undefined.is_nan(), "{m:?}");
        }
    }

    #[test]
    fn metrics_equal_results_by_hand() {
        let m = SpectralMetrics::new(&Spectrum::new(vec![1.0, 1.0, 1.0, 100.0]).unwrap(), (4, 16)).unwrap();
        let close = |x: f64, y: f64| (x - y).abs() < 1e-12;
        // Mean 25.75, Q = 4: edge 25.75 (3/2)^2.
        assert!(close(m.mp_edge, 25.75 * 2.25) && close(m.mp_soft_rank, 25.75 * 2.25 / 100.0), "{m:?}");
        assert_eq!((m.num_nonzero, m.mp_spikes), (4, 1));
        assert!(close(m.frobenius_norm, 103f64.sqrt()) && close(m.spectral_norm, 10.0));
        assert!(close(m.stable_rank, 1.03) && close(m.participation_ratio, 103.0 * 103.0 / 10003.0));
        assert!(close(m.alpha_hill, 1.0 + 2.0 / 100f64.ln()), "{m:?}");
        assert!(close(m.alpha_weighted, 2.0 * m.powerlaw_alpha), "{m:?}");
    }

    #[test]
    fn exponents_of_one_eigenvalue_are_undefined() {
        let m = SpectralMetrics::new(&Spectrum::new(vec![4.0]).unwrap(), (1, 9)).unwrap();
        assert!(m.alpha_hill.is_nan() && m.powerlaw_alpha.is_nan() && m.alpha_weighted.is_nan());
        assert!((m.stable_rank - 1.0).abs() < 1e-15 && (m.effective_rank - 1.0).abs() < 1e-15);
    }

    #[test]
    fn wrong_shape_is_an_error() {
        let spectrum = Spectrum::new(vec![1.0; 3]).unwrap();
        assert!(SpectralMetrics::new(&spectrum, (4, 4)).is_err());
        assert!(SpectralMetrics::new(&Spectrum::new(vec![]).unwrap(), (0, 4)).is_err());
    }
}
