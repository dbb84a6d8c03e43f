//! Computes all statistics of arbitrary eigenvalues, and checks the inequalities between them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lorank::effective_rank::{effective_rank, participation_ratio, stable_rank};
use lorank::hill::{Convention, alpha_hill};
use lorank::marchenko_pastur::{Scale, marchenko_pastur};
use lorank::metrics::SpectralMetrics;
use lorank::powerlaw::fit_power_law;
use lorank::spectrum::Spectrum;

fuzz_target!(|input: (Vec<f64>, u8)| {
    let (eigenvalues, longer) = input;
    let count = eigenvalues.len();
    let largest = eigenvalues.iter().fold(0.0f64, |m, x| m.max(*x));
    // Rounding may make eigenvalues of zero slightly negative.
    let least = -(count as f64) * f64::EPSILON * largest;
    let is_valid = eigenvalues.iter().all(|x| x.is_finite() && *x >= least);
    let Ok(spectrum) = Spectrum::new(eigenvalues.clone()) else { return assert!(!is_valid) };
    assert!(is_valid);
    assert!(spectrum.eigenvalues().is_sorted());
    let _ = alpha_hill(&spectrum, Convention::Median);
    let fit = fit_power_law(&spectrum);
    assert!(!fit.alpha.is_finite() || fit.alpha >= 1.0);
    let shape = (count, count + usize::from(longer));
    let _ = marchenko_pastur(&spectrum, shape, Scale::Median);
    let _ = SpectralMetrics::new(&spectrum, shape);
    let sum: f64 = eigenvalues.iter().sum();
    if largest > 1e-100 && sum < 1e100 {
        let ranks = [stable_rank(&spectrum), participation_ratio(&spectrum), effective_rank(&spectrum)];
        for rank in ranks {
            assert!((0.999_999..=count as f64 * 1.000_001).contains(&rank), "{ranks:?} of {count}");
        }
    }
});
