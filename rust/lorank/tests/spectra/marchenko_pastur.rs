//! Tests of the Marchenko-Pastur edge on noise, and on noise with a signal.

use lorank::marchenko_pastur::{Scale, marchenko_pastur};
use lorank::metrics::SpectralMetrics;
use nalgebra::DMatrix;

use crate::matrices::{Gaussian, spectrum_of};

const SHAPES: [(usize, usize); 10] = [
    (128, 128),
    (128, 256),
    (512, 128),
    (128, 2048),
    (8192, 128),
    (256, 256),
    (512, 256),
    (256, 1024),
    (4096, 256),
    (256, 16384),
];

#[test]
fn noise_ends_at_the_edge() {
    for (seed, (rows, cols)) in SHAPES.into_iter().enumerate() {
        let p = rows.min(cols);
        let noise = Gaussian::new(seed as u64).matrix(rows, cols) * 0.02;
        let spectrum = spectrum_of(&noise);
        for scale in [Scale::Mean, Scale::Median] {
            let law = marchenko_pastur(&spectrum, (rows, cols), scale).unwrap();
            assert!(law.spikes <= 2.max(p / 100), "{rows}x{cols} {scale:?}: {} spikes", law.spikes);
            // The largest eigenvalue must be close to the edge: an edge far too high would have no spikes
            // either.
            let ratio = spectrum.largest() / law.edge;
            assert!((0.85..1.15).contains(&ratio), "{rows}x{cols} {scale:?}: {ratio}");
        }
    }
}

#[test]
fn planted_directions_are_counted() {
    for (rows, cols) in [(256, 256), (1024, 256), (256, 4096), (16384, 256), (300, 512)] {
        for planted in 1..=5 {
            let mut gaussian = Gaussian::new(100 + planted as u64);
            let sigma = 0.01;
            let size = 2.0 * sigma * ((rows * cols) as f64).powf(0.25);
            let signal = gaussian.with_singular_values(rows, cols, &vec![size; planted]);
            let noise: DMatrix<f64> = gaussian.matrix(rows, cols) * sigma;
            let spectrum = spectrum_of(&(noise + signal));
            for scale in [Scale::Mean, Scale::Median] {
                let spikes = marchenko_pastur(&spectrum, (rows, cols), scale).unwrap().spikes;
                assert!(
                    (planted..=planted + 2).contains(&spikes),
                    "{rows}x{cols} {scale:?}: {spikes} spikes, {planted} planted"
                );
            }
        }
    }
}

#[test]
fn every_metric_of_noise_is_finite_and_in_range() {
    for (rows, cols) in [(2, 2), (5, 3), (64, 64), (200, 90), (90, 200)] {
        let matrix = Gaussian::new(11).matrix(rows, cols);
        let spectrum = spectrum_of(&matrix);
        let m = SpectralMetrics::new(&spectrum, (rows, cols)).unwrap();
        let p = rows.min(cols);
        assert_eq!(m.num_nonzero, p);
        for value in [
            m.alpha_hill,
            m.mp_edge,
            m.mp_edge_median,
            m.mp_soft_rank,
            m.powerlaw_alpha,
            m.powerlaw_xmin,
            m.powerlaw_distance,
            m.alpha_weighted,
        ] {
            assert!(value.is_finite(), "{rows}x{cols}: {m:?}");
        }
        assert!(m.alpha_hill_xmin_mid.is_finite() == (p >= 3), "{m:?}");
        assert!(m.alpha_hill > 1.0 && m.powerlaw_alpha > 1.0, "{m:?}");
        assert!((m.frobenius_norm / matrix.norm() - 1.0).abs() < 1e-13);
        let spectral = matrix.singular_values().max();
        assert!((m.spectral_norm / spectral - 1.0).abs() < 1e-13);
        let ranks = [m.stable_rank, m.participation_ratio, m.effective_rank];
        assert!(ranks.iter().all(|r| (1.0..=p as f64).contains(r)), "{m:?}");
    }
}

#[test]
fn rounding_noise_is_not_counted_as_spikes() {
    // More than half of the eigenvalues, and thus their median, are zero up to rounding.
    for rank in [1, 5, 20] {
        let mut gaussian = Gaussian::new(12);
        let product = gaussian.matrix(300, rank) * gaussian.matrix(rank, 100);
        let spectrum = spectrum_of(&product);
        for scale in [Scale::Mean, Scale::Median] {
            let spikes = marchenko_pastur(&spectrum, (300, 100), scale).unwrap().spikes;
            assert!(spikes <= rank, "{scale:?}: {spikes} spikes of a matrix of rank {rank}");
        }
    }
}
