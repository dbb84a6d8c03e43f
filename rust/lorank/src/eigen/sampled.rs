//! Estimated spectra of matrices too large to reduce: stochastic Lanczos quadrature (\[SLQ\]).
//!
//! From a random vector `v`, Lanczos iteration turns `G = X X^T` into a small tridiagonal matrix
//! `T = Q D Q^T`. Its eigenvalues `t_i`, with weights `w_i = q_1i^2`, are a Gauss quadrature:
//! `v^T f(G) v = sum w_i f(t_i)`, exact for polynomials of degree `2 steps - 1`. The mean over [`PROBES`]
//! vectors of random signs estimates `trace f(G) / p`, with a relative error of about `(PROBES p)^(-1/2)` for
//! functions of the bulk. The share of eigenvalues below `t_i` lies between the sums of the weights before
//! and up to `i`. The middle of the two is interpolated linearly in `ln t`. The `p` quantiles of this
//! distribution replace the eigenvalues.
//!
//! [`STEPS`] products of `G` with [`PROBES`] vectors in float32 take `4 STEPS PROBES p m` operations: at
//! `p = m = 8192`, a twentieth of those of a reduction.
//!
//! The error of a statistic is estimated in two ways: by leaving out each group of probes in turn
//! (jackknife), and by stopping after two thirds of the steps.

use crate::Result;
use crate::eigen::gram_product::{GramProduct, VECTORS};
use crate::exec::cancel::CancelToken;
use crate::exec::memory::{matrix, probe, zeros};
use crate::exec::parallel::Strategy;
use crate::kernels::dense::symmetric_eigen;
use crate::kernels::exponent::{binary_exponent, power_of_two};
use crate::kernels::number::Number;
use crate::matrix::MatrixView;
use crate::statistics::spectrum::Spectrum;

/// Purpose of the memory of this module.
const MEMORY: &str = "an estimate of a spectrum";

/// Number of random vectors.
const PROBES: usize = VECTORS;

/// Number of steps of the iteration.
const STEPS: usize = 24;

/// Number of groups of probes that are left out in turn.
const GROUPS: usize = 8;

/// Length of an error bar in standard errors. On real matrices, 2 covered nine of ten true values and 3
/// covered 97 %.
const ERRORS: f64 = 3.0;

/// Share of the largest eigenvalue below which eigenvalues are lost in float32.
const RESOLUTION: f64 = 1e-6;

/// An estimated spectrum, with the estimates from parts of the data.
#[derive(Clone, Debug)]
pub struct SampledSpectrum {
    /// The estimate from all probes, as `p` quantiles.
    pub spectrum: Spectrum,
    /// The estimates without each group of probes.
    without: Vec<Spectrum>,
    /// The estimate from fewer steps.
    coarse: Spectrum,
}

impl SampledSpectrum {
    /// Returns the length of the error bar of a statistic of the spectrum.
    pub fn error(&self, statistic: impl Fn(&Spectrum) -> f64) -> f64 {
        let found: Vec<f64> = self.without.iter().map(&statistic).collect();
        let count = found.len() as f64;
        let mean = found.iter().sum::<f64>() / count;
        let squares: f64 = found.iter().map(|x| (x - mean) * (x - mean)).sum();
        let by_chance = (squares * (count - 1.0) / count).sqrt();
        let by_steps = (statistic(&self.spectrum) - statistic(&self.coarse)).abs();
        ERRORS * by_chance.hypot(by_steps)
    }
}

/// Estimates the eigenvalues of `W^T W`. The estimate depends on the matrix alone, not on the number of
/// threads.
///
/// Under [`Strategy::Together`] the caller must run in the thread pool.
///
/// # Errors
/// [`Error::Numerical`](crate::Error::Numerical) if `W` contains NaN or infinite values, or values beyond
/// `2^±480`; [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::Cancelled`](crate::Error::Cancelled).
///
/// # Examples
/// ```
/// use lorank::{cancel::CancelToken, matrix::MatrixView, parallel::Strategy, sampled::sampled_spectrum};
///
/// let identity: Vec<f32> = (0..32 * 32).map(|i| f32::from(u8::from(i % 33 == 0))).collect();
/// let view = MatrixView::from_f32(&identity, 32, 32).unwrap();
/// let sample = sampled_spectrum(&view, Strategy::Alone, &CancelToken::default()).unwrap();
/// assert!((sample.spectrum.largest() - 1.0).abs() < 1e-5);
/// assert!(sample.error(|spectrum| spectrum.largest()) < 1e-5);
/// ```
pub fn sampled_spectrum(
    view: &MatrixView<'_>,
    strategy: Strategy,
    cancel: &CancelToken,
) -> Result<SampledSpectrum> {
    let wide = view.wide();
    let p = wide.rows();
    let largest = view.max_abs_until(cancel)?;
    // The spectrum, those of parts of the probes, and a copy of each.
    probe(2 * (GROUPS + 2) * p * size_of::<f64>(), MEMORY)?;
    if largest == 0.0 {
        let spectrum = Spectrum::new(zeros(p, MEMORY)?)?;
        return Ok(SampledSpectrum { without: vec![spectrum.clone()], coarse: spectrum.clone(), spectrum });
    }
    let exponent = binary_exponent(largest)?;
    let scale = power_of_two(-exponent);
    let mut product = GramProduct::new(&wide, scale, strategy, cancel)?;
    let recurrences = iterate(p, product.height(), cancel, |v, u| product.apply(v, u))?;

    let rules: Vec<Rule> =
        recurrences.iter().map(|found| found.rule(found.diagonal.len())).collect::<Result<_>>()?;
    let coarse: Vec<Rule> = recurrences
        .iter()
        .map(|found| found.rule(found.diagonal.len().div_ceil(3) * 2))
        .collect::<Result<_>>()?;
    let unit = power_of_two(2 * exponent);
    let squares = view.sum_of_squares(scale);
    let spectrum = |rules: &[&Rule]| {
        let values = quantiles(rules, p).into_iter().map(|x| x * unit).collect();
        let spectrum = Spectrum::new(values)?.with_sum(squares * unit);
        let error = RESOLUTION * spectrum.largest();
        Ok(spectrum.with_error(error).with_unresolved())
    };
    let without = (0..GROUPS)
        .map(|group| {
            let others = rules.iter().enumerate().filter(|(i, _)| i % GROUPS != group);
            spectrum(&others.map(|(_, rule)| rule).collect::<Vec<_>>())
        })
        .collect::<Result<_>>()?;
    Ok(SampledSpectrum {
        spectrum: spectrum(&rules.iter().collect::<Vec<_>>())?,
        without,
        coarse: spectrum(&coarse.iter().collect::<Vec<_>>())?,
    })
}

/// The tridiagonal matrix of one probe.
#[derive(Default)]
struct Recurrence {
    diagonal: Vec<f64>,
    off_diagonal: Vec<f64>,
}

/// Nodes of a quadrature, ascending, and their weights.
struct Rule {
    nodes: Vec<f64>,
    weights: Vec<f64>,
}

impl Recurrence {
    /// Returns the Gauss quadrature of the first `steps` steps.
    fn rule(&self, steps: usize) -> Result<Rule> {
        let steps = steps.min(self.diagonal.len());
        let entries = matrix(steps, steps, MEMORY, |i, j| match i.abs_diff(j) {
            0 => self.diagonal[i],
            1 => self.off_diagonal[i.min(j)],
            _ => 0.0,
        })?;
        let (nodes, vectors) = symmetric_eigen(entries.as_ref())?;
        Ok(Rule { nodes, weights: (0..steps).map(|i| vectors[(0, i)] * vectors[(0, i)]).collect() })
    }
}

/// Runs Lanczos iteration for all probes together. Probes are the columns of matrices of `height` rows, of
/// which the first `p` are used. The iteration of a probe ends early if its Krylov space is exhausted.
fn iterate(
    p: usize,
    height: usize,
    cancel: &CancelToken,
    mut apply: impl FnMut(&[f32], &mut [f32]),
) -> Result<Vec<Recurrence>> {
    // Relative size of the remainder that rounding leaves of a zero.
    const EXHAUSTED: f64 = 1e-5;
    let mut found: Vec<Recurrence> = (0..PROBES).map(|_| Recurrence::default()).collect();
    let mut ended = [false; PROBES];
    let (mut v, mut before) = (signs(p, height)?, zeros::<f32>(height * PROBES, MEMORY)?);
    let mut u = zeros::<f32>(height * PROBES, MEMORY)?;
    let mut last = [0.0; PROBES];
    for _ in 0..STEPS {
        cancel.check()?;
        apply(&v, &mut u);
        cancel.check()?;
        let (size, diagonal) = (dots(&u, &u), dots(&u, &v));
        each_row([&mut u, &mut v, &mut before], |probe, [u, v, before]| {
            *u = f32::of(f64::from(*u) - diagonal[probe] * f64::from(*v) - last[probe] * f64::from(*before));
        });
        let squares = dots(&u, &u);
        let mut inverse = [0.0; PROBES];
        for (probe, recurrence) in found.iter_mut().enumerate() {
            if ended[probe] {
                continue;
            }
            last[probe] = squares[probe].sqrt();
            recurrence.diagonal.push(diagonal[probe]);
            recurrence.off_diagonal.push(last[probe]);
            ended[probe] = last[probe] <= EXHAUSTED * size[probe].sqrt();
            inverse[probe] = if ended[probe] { 0.0 } else { 1.0 / last[probe] };
        }
        each_row([&mut u, &mut v, &mut before], |probe, [u, v, before]| {
            *before = *v;
            *v = f32::of(f64::from(*u) * inverse[probe]);
        });
    }
    Ok(found)
}

/// Calls `work` with the index of every probe and its entry in each of the three matrices, row by row.
fn each_row([a, b, c]: [&mut [f32]; 3], work: impl Fn(usize, [&mut f32; 3])) {
    let (a, b, c) =
        (a.as_chunks_mut::<PROBES>().0, b.as_chunks_mut::<PROBES>().0, c.as_chunks_mut::<PROBES>().0);
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        for probe in 0..PROBES {
            work(probe, [&mut a[probe], &mut b[probe], &mut c[probe]]);
        }
    }
}

/// Returns unit vectors of pseudo-random signs as columns, the same for every matrix of order `p`.
fn signs(p: usize, height: usize) -> Result<Vec<f32>> {
    let mut state = 0x6c6f_7261_6e6b_u64;
    let unit = f32::of(1.0 / (p as f64).sqrt());
    let mut vectors = zeros(height * PROBES, MEMORY)?;
    for place in &mut vectors[..p * PROBES] {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *place = if (z ^ (z >> 31)) & 1 == 0 { unit } else { -unit };
    }
    Ok(vectors)
}

/// Returns the inner products of corresponding columns, in float64.
fn dots(a: &[f32], b: &[f32]) -> [f64; PROBES] {
    let mut sums = [0.0; PROBES];
    for (a, b) in a.as_chunks::<PROBES>().0.iter().zip(b.as_chunks::<PROBES>().0) {
        for ((sum, x), y) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*x) * f64::from(*y);
        }
    }
    sums
}

/// Returns the `p` quantiles `(i + 1/2) / p` of the mean of the rules' distributions, ascending. The last is
/// replaced by the largest node, which converges first.
fn quantiles(rules: &[&Rule], p: usize) -> Vec<f64> {
    let largest = rules.iter().filter_map(|rule| rule.nodes.last()).fold(0.0f64, |max, &x| max.max(x));
    let floor = largest * RESOLUTION * 1e-3;
    let place = |node: f64| node.max(floor).ln();
    let mut knots: Vec<f64> =
        rules.iter().flat_map(|rule| rule.nodes.iter().map(|&node| place(node))).collect();
    knots.sort_unstable_by(f64::total_cmp);
    let mut shares = vec![0.0; knots.len()];
    for rule in rules {
        let (mut before, mut next) = ((f64::NEG_INFINITY, 0.0), 0);
        let mut below = 0.0;
        let corner = |i: usize, below: f64| (place(rule.nodes[i]), below + 0.5 * rule.weights[i]);
        for (knot, share) in knots.iter().zip(&mut shares) {
            while next < rule.nodes.len() && place(rule.nodes[next]) <= *knot {
                before = corner(next, below);
                below += rule.weights[next];
                next += 1;
            }
            *share += if next == rule.nodes.len() {
                1.0
            } else if before.0 == f64::NEG_INFINITY {
                0.0
            } else {
                let after = corner(next, below);
                before.1 + (after.1 - before.1) * (knot - before.0) / (after.0 - before.0)
            };
        }
    }
    let mut values = Vec::with_capacity(p);
    let mut i = 0;
    for index in 0..p {
        let wanted = (index as f64 + 0.5) / p as f64 * rules.len() as f64;
        while i < knots.len() && shares[i] < wanted {
            i += 1;
        }
        let at = if i == 0 {
            knots[0]
        } else if i == knots.len() {
            knots[i - 1]
        } else {
            let part = (wanted - shares[i - 1]) / (shares[i] - shares[i - 1]);
            knots[i - 1] + (knots[i] - knots[i - 1]) * part
        };
        values.push(at.exp());
    }
    if let Some(last) = values.last_mut() {
        *last = largest;
    }
    values
}
