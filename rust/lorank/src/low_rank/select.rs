//! Selection among the singular values of many modules: by count, by energy, or by a budget of parameters.
//!
//! The values of all modules are concatenated; the result is a mask of the same length. Among equal values
//! the lower index is kept: that of the earlier module, then of the earlier value. Zeros are never kept.
//!
//! Values are not sorted. Non-negative numbers have the order of their bit patterns. The last kept value is
//! found by a histogram of the leading bits, then by a histogram within its bucket, and so on. Squares are
//! summed exactly as 128-bit integers, so that the number of kept values does not depend on the order of
//! summation.

mod squares;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::exec::cancel::CancelToken;
use crate::exec::memory::probe;
use crate::low_rank::select::squares::{Squares, exponent};
use crate::{Error, Result};

/// Number of bits that one histogram resolves. Its buckets fill a level-1 cache.
const DIGIT: u32 = 11;

/// Number of values that [`check`] processes together.
const LANES: usize = 8;

/// Number of chunks of [`LANES`] values that are checked between two polls of the cancel token.
const POLLED: usize = 1 << 20;

/// Relative tolerance of a sum: rounding errors must not matter for a share of 1.
const SLACK: f64 = 1e-12;

/// Keeps the `count` largest scores, or all that are not zero.
///
/// # Errors
/// [`Error::InvalidInput`] for a NaN, infinite or negative score; [`Error::OutOfMemory`].
///
/// # Examples
/// ```
/// assert_eq!(lorank::select::largest(&[2.0, 3.0, 0.0, 3.0], 2).unwrap(), [false, true, false, true]);
/// ```
pub fn largest(scores: &[f64], count: usize) -> Result<Vec<bool>> {
    largest_until(scores, count, &CancelToken::default())
}

/// Selects as [`largest`] does, until it is cancelled.
///
/// # Errors
/// The errors of [`largest`], and [`Error::Cancelled`].
pub fn largest_until(scores: &[f64], count: usize, cancel: &CancelToken) -> Result<Vec<bool>> {
    let range = check(scores, cancel)?;
    top(scores, range, |_| 1, |nonzero| nonzero.min(count as u128), cancel)
}

/// Keeps the `count` smallest scores that are not zero, or all of them: the reverse pruning of the ablations
/// in \[PARA\].
///
/// # Errors
/// The errors of [`largest`].
pub fn smallest(scores: &[f64], count: usize) -> Result<Vec<bool>> {
    smallest_until(scores, count, &CancelToken::default())
}

/// Selects as [`smallest`] does, until it is cancelled.
///
/// # Errors
/// The errors of [`smallest`], and [`Error::Cancelled`].
pub fn smallest_until(scores: &[f64], count: usize, cancel: &CancelToken) -> Result<Vec<bool>> {
    let range = check(scores, cancel)?;
    // Subtraction from infinity reverses the order of patterns, and maps only zero to zero.
    let reverse = |bits: u64| if bits == 0 { 0 } else { f64::INFINITY.to_bits() - bits };
    let patterns = scores.iter().map(|&x| reverse(pattern(x)));
    let range = range.map(|(low, high)| (reverse(high), reverse(low)));
    let cut = cut(patterns, range, |_| 1, |nonzero| nonzero.min(count as u128), cancel)?;
    Ok(mask(scores, cut.map(|cut| Cut { last: reverse(cut.last), ..cut }), |x, last| 0.0 < x && x <= last))
}

/// Keeps the fewest values, largest first, whose squares sum to at least `fraction` of the total.
///
/// # Errors
/// The errors of [`largest`], and [`Error::InvalidInput`] for a fraction outside of `[0, 1]`.
///
/// # Examples
/// ```
/// // 16 of 25 are 64 %.
/// assert_eq!(lorank::select::energy(&[4.0, 3.0], 0.64).unwrap(), [true, false]);
/// ```
pub fn energy(values: &[f64], fraction: f64) -> Result<Vec<bool>> {
    energy_until(values, fraction, &CancelToken::default())
}

/// Selects as [`energy`] does, until it is cancelled.
///
/// # Errors
/// The errors of [`energy`], and [`Error::Cancelled`].
pub fn energy_until(values: &[f64], fraction: f64, cancel: &CancelToken) -> Result<Vec<bool>> {
    let range = check(values, cancel)?;
    if !(0.0..=1.0).contains(&fraction) {
        return Err(Error::InvalidInput(format!(
            "the fraction of the energy must be between 0 and 1, not {fraction}"
        )));
    }
    let squares = Squares::new(values.len(), range);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // A whole number below `total`.
    let share = |total: u128| (fraction * (1.0 - SLACK) * total as f64).ceil() as u128;
    top(values, range, |bits| squares.of(bits), share, cancel)
}

/// Keeps values within a budget of `parameters`, in descending order of energy per parameter,
/// `value^2 / cost`. Module `m` has `lengths[m]` descending values, each of which costs `costs[m]`.
///
/// The values of a module are kept from the largest on. The result is compared with another selection, that
/// of \[PARA\]: the largest values of all modules, up to the first that exceeds the budget. The selection
/// with more energy is returned.
///
/// # Errors
/// The errors of [`largest`], and [`Error::InvalidInput`] if the lengths do not sum to the number of values,
/// a cost is 0, or the values of a module are not descending.
///
/// # Examples
/// ```
/// // Two modules: 9 parameters per value, and 2 parameters per value.
/// let kept = lorank::select::budget(&[3.0, 2.0, 2.0, 1.0], &[2, 2], &[9, 2], 12).unwrap();
/// assert_eq!(kept, [true, false, true, false]);
/// ```
pub fn budget(values: &[f64], lengths: &[usize], costs: &[u64], parameters: u64) -> Result<Vec<bool>> {
    budget_until(values, lengths, costs, parameters, &CancelToken::default())
}

/// Selects as [`budget`] does, until it is cancelled.
///
/// # Errors
/// The errors of [`budget`], and [`Error::Cancelled`].
pub fn budget_until(
    values: &[f64],
    lengths: &[usize],
    costs: &[u64],
    parameters: u64,
    cancel: &CancelToken,
) -> Result<Vec<bool>> {
    let range = check(values, cancel)?;
    let modules = modules(values, lengths, costs)?;
    // Squares of values below 1e-160 of the largest may underflow; their order is then that of the modules.
    let unit = range.map_or(1.0, |(_, high)| 2f64.powi(-exponent(high)));
    let density = |x: f64, cost: u64| (x * unit).powi(2) / cost as f64;
    let greedy = fill(&modules, parameters, Misfit::ClosesModule, density, cancel)?;
    let plain = fill(&modules, parameters, Misfit::EndsAll, |x, _| x, cancel)?;
    let squares = Squares::new(values.len(), range);
    let held = |kept: &[usize]| -> u128 {
        let values = modules.iter().zip(kept).flat_map(|(module, &count)| &module.values[..count]);
        values.map(|&x| squares.of(pattern(x))).sum()
    };
    let best = if held(&greedy) >= held(&plain) { greedy } else { plain };
    let mask = |(module, count): (&Module<'_>, usize)| (0..module.values.len()).map(move |i| i < count);
    Ok(modules.iter().zip(best).flat_map(mask).collect())
}

/// Returns the bit pattern of a non-negative number. Negative zero has the pattern of zero.
fn pattern(x: f64) -> u64 {
    (x + 0.0).to_bits()
}

/// Checks that there is memory for the patterns and marks of all values.
fn check_memory(count: usize) -> Result<()> {
    /// Bytes per value: patterns in a growing vector, and marks.
    const EACH: usize = 5 * size_of::<u64>();
    probe(count.saturating_mul(EACH), "a selection of singular values")
}

/// The smallest and the largest non-zero pattern.
type Range = Option<(u64, u64)>;

/// Returns the range of the scores, after checking that all are valid.
///
/// # Errors
/// [`Error::InvalidInput`], and [`Error::OutOfMemory`] if there is no memory for a selection.
fn check(scores: &[f64], cancel: &CancelToken) -> Result<Range> {
    check_memory(scores.len())?;
    // Lanes and plain comparisons, which compilers vectorise. Invalid scores become infinite.
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
    for chunks in chunks.chunks(POLLED) {
        cancel.check()?;
        chunks.iter().for_each(&mut see);
    }
    let mut padded = [0.0; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    see(&padded);
    let low = low.into_iter().fold(f64::INFINITY, f64::min);
    let high = high.into_iter().fold(0.0, f64::max);
    if high.is_infinite() {
        let bad = scores.iter().enumerate().find(|(_, x)| !(x.is_finite() && **x >= 0.0));
        let bad = bad.map_or_else(String::new, |(i, x)| format!("value {i} is {x}: "));
        return Err(Error::InvalidInput(format!(
            "{bad}singular values and scores must be finite and not negative"
        )));
    }
    Ok((high > 0.0).then_some((low.to_bits(), high.to_bits())))
}

fn range(patterns: &[u64]) -> (u64, u64) {
    patterns.iter().fold((u64::MAX, 0), |(low, high), &bits| (low.min(bits), high.max(bits)))
}

/// Returns the mask of the fewest non-zero values, largest first, whose weights reach `wanted` of the total.
fn top(
    values: &[f64],
    range: Range,
    weight: impl Fn(u64) -> u128,
    wanted: impl FnOnce(u128) -> u128,
    cancel: &CancelToken,
) -> Result<Vec<bool>> {
    let cut = cut(values.iter().map(|&x| pattern(x)), range, weight, wanted, cancel)?;
    cancel.check()?;
    Ok(mask(values, cut, |x, last| x >= last))
}

fn mask(values: &[f64], cut: Option<Cut>, keeps: impl Fn(f64, f64) -> bool) -> Vec<bool> {
    let Some(Cut { last, surplus }) = cut else { return vec![false; values.len()] };
    let score = f64::from_bits(last);
    let mut mask: Vec<bool> = values.iter().map(|&x| keeps(x, score)).collect();
    // Of the values equal to the last one, the later ones are dropped.
    let ties = (0..values.len()).rev().filter(|&i| pattern(values[i]) == last);
    (0..surplus).zip(ties).for_each(|(_, i)| mask[i] = false);
    mask
}

/// The end of a selection.
#[derive(Clone, Copy)]
struct Cut {
    /// Pattern of the last kept value.
    last: u64,
    /// Number of values equal to the last one that are not kept.
    surplus: u128,
}

/// Returns the end of the selection in which the weights of non-zero patterns, largest first, reach `wanted`
/// of the total.
fn cut(
    patterns: impl Iterator<Item = u64> + Clone,
    range_of_patterns: Range,
    weight: impl Fn(u64) -> u128,
    wanted: impl FnOnce(u128) -> u128,
    cancel: &CancelToken,
) -> Result<Option<Cut>> {
    let Some(range_of_patterns) = range_of_patterns else { return Ok(None) };
    let Some((mut rest, mut wanted)) = refine(patterns, range_of_patterns, &weight, wanted, cancel)? else {
        return Ok(None);
    };
    loop {
        let (low, high) = range(&rest);
        if low == high {
            let kept = wanted.div_ceil(weight(low));
            return Ok(Some(Cut { last: low, surplus: rest.len() as u128 - kept }));
        }
        let refined = refine(rest.iter().copied(), (low, high), &weight, |_| wanted, cancel)?;
        let Some(refined) = refined else { return Ok(None) };
        (rest, wanted) = refined;
    }
}

/// Returns the patterns of the bucket in which the weights, summed from the largest pattern, reach `wanted`
/// of the total, and the weight still needed from that bucket. `None` if the wanted weight is 0.
fn refine(
    patterns: impl Iterator<Item = u64> + Clone,
    (low, high): (u64, u64),
    weight: &impl Fn(u64) -> u128,
    wanted: impl FnOnce(u128) -> u128,
    cancel: &CancelToken,
) -> Result<Option<(Vec<u64>, u128)>> {
    cancel.check()?;
    let shift = (u64::BITS - (high - low).leading_zeros()).saturating_sub(DIGIT);
    // Zero is less than `low`: the difference wraps around to beyond the last bucket.
    let bucket = |bits: u64| usize::try_from(bits.wrapping_sub(low) >> shift).unwrap_or(usize::MAX);
    let mut sums = vec![0u128; bucket(high) + 1];
    for bits in patterns.clone() {
        if let Some(sum) = sums.get_mut(bucket(bits)) {
            *sum += weight(bits);
        }
    }
    let (mut wanted, mut chosen) = (wanted(sums.iter().sum()), sums.len() - 1);
    if wanted == 0 {
        return Ok(None);
    }
    cancel.check()?;
    while sums[chosen] < wanted {
        wanted -= sums[chosen];
        chosen -= 1;
    }
    Ok(Some((patterns.filter(|&bits| bucket(bits) == chosen).collect(), wanted)))
}

/// The values of one module, and the cost of each.
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
            return Err(Error::InvalidInput(format!("the cost of module {m} is 0: costs must be positive")));
        }
        if !values.is_sorted_by(|a, b| a >= b) {
            return Err(Error::InvalidInput(format!("the values of module {m} are not descending")));
        }
        Ok(Module { values, cost })
    };
    lengths.iter().zip(costs).enumerate().map(module).collect()
}

/// The effect of a value that exceeds the budget.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Misfit {
    /// It ends the selection in its module: the kept values of a module are its largest.
    ClosesModule,
    /// It ends the whole selection.
    EndsAll,
}

/// Returns the number of values taken of every module, in descending order of score within the budget.
fn fill(
    modules: &[Module<'_>],
    mut parameters: u64,
    misfit: Misfit,
    score: impl Fn(f64, u64) -> f64,
    cancel: &CancelToken,
) -> Result<Vec<usize>> {
    let mut kept = vec![0; modules.len()];
    // Values descend, so that the best value is the next one of a module.
    let next = |m: usize, count: usize| {
        let x = modules[m].values.get(count).filter(|x| **x > 0.0)?;
        Some((score(*x, modules[m].cost).to_bits(), Reverse(m)))
    };
    let mut queue: BinaryHeap<_> = (0..modules.len()).filter_map(|m| next(m, 0)).collect();
    while let Some((_, Reverse(m))) = queue.pop() {
        cancel.check()?;
        if let Some(left) = parameters.checked_sub(modules[m].cost) {
            parameters = left;
            kept[m] += 1;
            queue.extend(next(m, kept[m]));
        } else if misfit == Misfit::EndsAll {
            break;
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests;
