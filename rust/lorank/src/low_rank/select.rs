//! Which singular values of many modules are kept: by count, by energy, by a budget of parameters.
//!
//! Values come concatenated, module after module; the answer is a mask of the same length. Ties go to
//! the lower index: to the earlier module, then to the earlier value. Zeros are never kept.
//!
//! Nothing here sorts all values. Non-negative numbers have the order of their bit patterns, so the last
//! kept value is found by a histogram of patterns, then by one of the bucket that holds it, and so on.
//! Squares are summed as 128-bit integers: exactly, so that no count hangs on an order of summation.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::{Error, Result};

/// Bits of a pattern that one histogram tells apart: its buckets just fill a first-level cache.
const DIGIT: u32 = 11;

/// Values that [`check`] looks at together.
const LANES: usize = 8;

/// What a sum may fall short of, relatively: a share of 1 must not ask for rounding errors.
const SLACK: f64 = 1e-12;

/// Keeps the `count` largest, or all that are not zero.
///
/// # Errors
/// [`Error::InvalidInput`] for a NaN, infinite or negative score.
pub fn largest(scores: &[f64], count: usize) -> Result<Vec<bool>> {
    let range = check(scores)?;
    Ok(top(scores, range, |_| 1, |nonzero| nonzero.min(count as u128)))
}

/// Keeps the `count` smallest that are not zero, or all of those: the reverse pruning of the ablations.
///
/// # Errors
/// As [`largest`].
pub fn smallest(scores: &[f64], count: usize) -> Result<Vec<bool>> {
    let range = check(scores)?;
    // Counted down from infinity, patterns have the reverse order, and none becomes zero but that of zero.
    let reverse = |bits: u64| if bits == 0 { 0 } else { f64::INFINITY.to_bits() - bits };
    let patterns = scores.iter().map(|&x| reverse(pattern(x)));
    let range = range.map(|(low, high)| (reverse(high), reverse(low)));
    let cut = cut(patterns, range, |_| 1, |nonzero| nonzero.min(count as u128));
    Ok(mask(scores, cut.map(|cut| Cut { last: reverse(cut.last), ..cut }), |x, last| 0.0 < x && x <= last))
}

/// Keeps the fewest values, largest first, whose squares sum to at least `fraction` of the total.
///
/// # Errors
/// As [`largest`], and for a fraction outside `[0, 1]`.
pub fn energy(values: &[f64], fraction: f64) -> Result<Vec<bool>> {
    let range = check(values)?;
    if !(0.0..=1.0).contains(&fraction) {
        return Err(Error::InvalidInput(format!("the energy is a share between 0 and 1, not {fraction}")));
    }
    let squares = Squares::new(values.len(), range);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // A whole number below `total`.
    let share = |total: u128| (fraction * (1.0 - SLACK) * total as f64).ceil() as u128;
    Ok(top(values, range, |bits| squares.of(bits), share))
}

/// Keeps what fits into `parameters`, the most energy per parameter first: by `value^2 / cost`, where a
/// module of `lengths[m]` descending values pays `costs[m]` for each that it keeps.
///
/// Within a module values leave smallest first. Where the globally largest values, up to the first that
/// does not fit (PARA's own choice at this size), hold more energy than this greedy set, they are kept.
///
/// # Errors
/// As [`largest`], and if lengths do not add up, a cost is 0, or a module's values are not descending.
pub fn budget(values: &[f64], lengths: &[usize], costs: &[u64], parameters: u64) -> Result<Vec<bool>> {
    let range = check(values)?;
    let modules = modules(values, lengths, costs)?;
    // The squares of values below 1e-160 of the largest may vanish: their order is then that of modules.
    let unit = range.map_or(1.0, |(_, high)| 2f64.powi(-exponent(high)));
    let density = |x: f64, cost: u64| (x * unit).powi(2) / cost as f64;
    let greedy = fill(&modules, parameters, Misfit::ClosesModule, density);
    let plain = fill(&modules, parameters, Misfit::EndsAll, |x, _| x);
    let squares = Squares::new(values.len(), range);
    let held = |kept: &[usize]| -> u128 {
        let values = modules.iter().zip(kept).flat_map(|(module, &count)| &module.values[..count]);
        values.map(|&x| squares.of(pattern(x))).sum()
    };
    let best = if held(&greedy) >= held(&plain) { greedy } else { plain };
    let mask = |(module, count): (&Module<'_>, usize)| (0..module.values.len()).map(move |i| i < count);
    Ok(modules.iter().zip(best).flat_map(mask).collect())
}

/// The bit pattern of a non-negative number, and that of zero for either zero.
fn pattern(x: f64) -> u64 {
    (x + 0.0).to_bits()
}

/// The smallest and the largest pattern that are not zero.
type Range = Option<(u64, u64)>;

/// The range of the scores, if all of them are valid.
fn check(scores: &[f64]) -> Result<Range> {
    // In lanes and by plain comparisons, which compilers turn into vector instructions. What is no valid
    // score becomes infinite.
    let (mut low, mut high) = ([f64::INFINITY; LANES], [0.0f64; LANES]);
    let mut see = |chunk: &[f64; LANES]| {
        for i in 0..LANES {
            let x = if chunk[i] >= 0.0 { chunk[i] } else { f64::INFINITY };
            let positive = if x > 0.0 { x } else { f64::INFINITY };
            high[i] = if x > high[i] { x } else { high[i] };
            low[i] = if positive < low[i] { positive } else { low[i] };
        }
    };
    let (chunks, rest) = scores.as_chunks();
    chunks.iter().for_each(&mut see);
    let mut padded = [0.0; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    see(&padded);
    let low = low.into_iter().fold(f64::INFINITY, f64::min);
    let high = high.into_iter().fold(0.0, f64::max);
    if high.is_infinite() {
        let bad = scores.iter().enumerate().find(|(_, x)| !(x.is_finite() && **x >= 0.0));
        let bad = bad.map_or_else(String::new, |(i, x)| format!("value {i} is {x}: "));
        return Err(Error::InvalidInput(format!("{bad}singular values and scores are finite, not negative")));
    }
    Ok((high > 0.0).then_some((low.to_bits(), high.to_bits())))
}

fn range(patterns: &[u64]) -> (u64, u64) {
    patterns.iter().fold((u64::MAX, 0), |(low, high), &bits| (low.min(bits), high.max(bits)))
}

/// The mask of the fewest non-zero values, largest first, whose weights reach what is `wanted` of the total.
fn top(
    values: &[f64],
    range: Range,
    weight: impl Fn(u64) -> u128,
    wanted: impl FnOnce(u128) -> u128,
) -> Vec<bool> {
    mask(values, cut(values.iter().map(|&x| pattern(x)), range, weight, wanted), |x, last| x >= last)
}

fn mask(values: &[f64], cut: Option<Cut>, keeps: impl Fn(f64, f64) -> bool) -> Vec<bool> {
    let Some(Cut { last, surplus }) = cut else { return vec![false; values.len()] };
    let score = f64::from_bits(last);
    let mut mask: Vec<bool> = values.iter().map(|&x| keeps(x, score)).collect();
    // Of the values equal to the last one the later ones go.
    let ties = (0..values.len()).rev().filter(|&i| pattern(values[i]) == last);
    (0..surplus).zip(ties).for_each(|(_, i)| mask[i] = false);
    mask
}

/// Where a selection ends.
#[derive(Clone, Copy)]
struct Cut {
    /// The pattern of the last value that is kept.
    last: u64,
    /// How many values equal to the last one are not.
    surplus: u128,
}

/// Where the weights of the non-zero patterns, from the largest, reach what is `wanted` of the total.
fn cut(
    patterns: impl Iterator<Item = u64> + Clone,
    range_of_patterns: Range,
    weight: impl Fn(u64) -> u128,
    wanted: impl FnOnce(u128) -> u128,
) -> Option<Cut> {
    let (mut rest, mut wanted) = narrow(patterns, range_of_patterns?, &weight, wanted)?;
    loop {
        let (low, high) = range(&rest);
        if low == high {
            return Some(Cut { last: low, surplus: rest.len() as u128 - wanted.div_ceil(weight(low)) });
        }
        (rest, wanted) = narrow(rest.iter().copied(), (low, high), &weight, |_| wanted)?;
    }
}

/// The patterns of the one bucket in which the weights, summed from the largest pattern, reach what is
/// `wanted` of the total, and what the larger ones leave wanted. `None` if nothing is wanted.
fn narrow(
    patterns: impl Iterator<Item = u64> + Clone,
    (low, high): (u64, u64),
    weight: &impl Fn(u64) -> u128,
    wanted: impl FnOnce(u128) -> u128,
) -> Option<(Vec<u64>, u128)> {
    let shift = (u64::BITS - (high - low).leading_zeros()).saturating_sub(DIGIT);
    // Zero, less than `low`, wraps round and comes to lie beyond the last bucket.
    let bucket = |bits: u64| usize::try_from(bits.wrapping_sub(low) >> shift).unwrap_or(usize::MAX);
    let mut sums = vec![0u128; bucket(high) + 1];
    for bits in patterns.clone() {
        if let Some(sum) = sums.get_mut(bucket(bits)) {
            *sum += weight(bits);
        }
    }
    let (mut wanted, mut chosen) = (wanted(sums.iter().sum()), sums.len() - 1);
    if wanted == 0 {
        return None;
    }
    while sums[chosen] < wanted {
        wanted -= sums[chosen];
        chosen -= 1;
    }
    Some((patterns.filter(|&bits| bucket(bits) == chosen).collect(), wanted))
}

/// Squares as integers, in a unit that lets as many as there are be summed in 128 bits.
///
/// The largest has some 100 bits; what a smaller one loses below the unit is beyond any `f64` sum.
#[derive(Clone, Copy)]
struct Squares {
    /// Of the largest value.
    exponent: u64,
    /// By which mantissas grow where all values are subnormal, for none of these to have its full length.
    lift: u32,
    /// By which squares shrink, for `count` of 106 bits not to overflow.
    spare: u64,
}

impl Squares {
    fn new(count: usize, range: Range) -> Self {
        let (_, high) = range.unwrap_or((1, 1));
        let (mantissa, exponent) = parts(high);
        let carries = u64::from(usize::BITS - count.leading_zeros());
        Self { exponent, lift: mantissa.leading_zeros() - 11, spare: carries.saturating_sub(22) }
    }

    #[inline]
    fn of(self, bits: u64) -> u128 {
        let (mantissa, exponent) = parts(bits);
        let mantissa = u128::from(mantissa << self.lift);
        (mantissa * mantissa) >> (2 * (self.exponent - exponent) + self.spare).min(127)
    }
}

/// The mantissa as an integer, and the biased exponent (1 for subnormal numbers, too).
#[inline]
fn parts(bits: u64) -> (u64, u64) {
    let (fraction, exponent) = (bits & ((1 << 52) - 1), bits >> 52);
    (fraction | (u64::from(exponent > 0) << 52), exponent.max(1))
}

/// The exponent of a number of this pattern; that of the smallest normal one for subnormal numbers.
fn exponent(bits: u64) -> i32 {
    i32::try_from(parts(bits).1).unwrap_or(0) - 1023
}

/// What every value of one module costs, and the values.
struct Module<'a> {
    values: &'a [f64],
    cost: u64,
}

fn modules<'a>(values: &'a [f64], lengths: &[usize], costs: &[u64]) -> Result<Vec<Module<'a>>> {
    let total = lengths.iter().try_fold(0usize, |sum, &length| sum.checked_add(length));
    if lengths.len() != costs.len() || total != Some(values.len()) {
        return Err(Error::InvalidInput(format!(
            "{} lengths and {} costs do not describe {} values",
            lengths.len(),
            costs.len(),
            values.len()
        )));
    }
    let mut rest = values;
    let module = |(m, (&length, &cost)): (usize, (&usize, &u64))| {
        let values;
        (values, rest) = rest.split_at(length);
        if cost == 0 {
            return Err(Error::InvalidInput(format!("the values of module {m} cost nothing")));
        }
        if !values.is_sorted_by(|a, b| a >= b) {
            return Err(Error::InvalidInput(format!("the values of module {m} are not descending")));
        }
        Ok(Module { values, cost })
    };
    lengths.iter().zip(costs).enumerate().map(module).collect()
}

/// What a value that does not fit any more puts an end to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Misfit {
    /// Its module: the kept values of a module stay its largest.
    ClosesModule,
    /// The whole selection.
    EndsAll,
}

/// How many values of every module are taken, the best score first, within the budget.
fn fill(
    modules: &[Module<'_>],
    mut parameters: u64,
    misfit: Misfit,
    score: impl Fn(f64, u64) -> f64,
) -> Vec<usize> {
    let mut kept = vec![0; modules.len()];
    // Values descend, so only the next one of every module can be the best: no sorting of them all.
    let next = |m: usize, count: usize| {
        let x = modules[m].values.get(count).filter(|x| **x > 0.0)?;
        Some((score(*x, modules[m].cost).to_bits(), Reverse(m)))
    };
    let mut queue: BinaryHeap<_> = (0..modules.len()).filter_map(|m| next(m, 0)).collect();
    while let Some((_, Reverse(m))) = queue.pop() {
        if let Some(left) = parameters.checked_sub(modules[m].cost) {
            parameters = left;
            kept[m] += 1;
            queue.extend(next(m, kept[m]));
        } else if misfit == Misfit::EndsAll {
            break;
        }
    }
    kept
}

#[cfg(test)]
mod tests;
