//! Every per-module number of a spectral report.

use crate::Result;
use crate::effective_rank::{effective_rank, participation_ratio, stable_rank};
use crate::hill::{Convention, alpha_hill};
use crate::marchenko_pastur::{Scale, marchenko_pastur};
use crate::powerlaw::fit_power_law;
use crate::spectrum::Spectrum;

/// The metrics of one matrix. What is undefined is `NaN`: everything scale-free for a zero matrix,
/// exponents with too few eigenvalues.
#[derive(Clone, Copy, Debug)]
pub struct SpectralMetrics {
    /// `n`: eigenvalues above `p * eps * lambda_max`.
    pub num_nonzero: usize,
    /// [`alpha_hill`] with [`Convention::Median`].
    pub alpha_hill: f64,
    /// [`alpha_hill`] with [`Convention::XminMid`].
    pub alpha_hill_xmin_mid: f64,
    /// Marchenko-Pastur edge with [`Scale::Mean`].
    pub mp_edge: f64,
    /// Eigenvalues above that edge.
    pub mp_spikes: usize,
    /// Marchenko-Pastur edge with [`Scale::Median`].
    pub mp_edge_median: f64,
    /// Eigenvalues above the edge with [`Scale::Median`].
    pub mp_spikes_median: usize,
    /// `mp_edge / lambda_max`.
    pub mp_soft_rank: f64,
    /// Exponent of the continuous power-law fit.
    pub powerlaw_alpha: f64,
    /// Where the fitted tail begins.
    pub powerlaw_xmin: f64,
    /// Kolmogorov-Smirnov distance of the fit.
    pub powerlaw_distance: f64,
    /// `powerlaw_alpha * log10(lambda_max)`.
    pub alpha_weighted: f64,
    /// `sqrt(sum lambda)`.
    pub frobenius_norm: f64,
    /// `sqrt(lambda_max)`.
    pub spectral_norm: f64,
    /// See [`stable_rank`].
    pub stable_rank: f64,
    /// See [`effective_rank`].
    pub effective_rank: f64,
    /// See [`participation_ratio`].
    pub participation_ratio: f64,
}

impl SpectralMetrics {
    /// Condenses the spectrum of an `(rows, cols)` matrix.
    ///
    /// # Errors
    /// [`crate::Error::InvalidInput`] unless there are `min(rows, cols) >= 1` eigenvalues.
    pub fn new(spectrum: &Spectrum, shape: (usize, usize)) -> Result<Self> {
        let mean = marchenko_pastur(spectrum, shape, Scale::Mean)?;
        let median = marchenko_pastur(spectrum, shape, Scale::Median)?;
        let power_law = fit_power_law(spectrum);
        Ok(Self {
            num_nonzero: spectrum.nonzero().len(),
            alpha_hill: alpha_hill(spectrum, Convention::Median),
            alpha_hill_xmin_mid: alpha_hill(spectrum, Convention::XminMid),
            mp_edge: mean.edge,
            mp_spikes: mean.spikes,
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
