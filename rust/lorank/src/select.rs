//! Which singular values of many modules are kept: by count, by energy, by a budget of parameters.
//!
//! Values come concatenated, module after module; the answer is a mask of the same length. Ties go to
//! the lower index: to the earlier module, then to the earlier value. Zeros are never kept.
//!
//! Source: PARA, Post-Optimization Adaptive Rank Allocation for `LoRA`, equations 6 to 12. Non-negative
//! numbers have the order of their bit patterns, so thresholds are found by counting patterns digit by
//! digit, in passes over what is left in doubt, and never by sorting.

use crate::eigen::power_of_two;
use crate::{Error, Result};

/// Bits that one pass decides.
const DIGIT: u32 = 11;

/// What a sum may fall short of, relatively: an energy of 1 must not ask for rounding errors.
const SLACK: f64 = 1e-12;

/// Keeps the `count` largest, or all that are not zero.
///
/// # Errors
/// [`Error::InvalidInput`] for a NaN, infinite or negative score.
pub fn largest(scores: &[f64], count: usize) -> Result<Vec<bool>> {
    check(scores)?;
    let nonzero = scores.iter().filter(|&&x| x > 0.0).count();
    Ok(top(scores, count.min(nonzero)))
}

/// Keeps the `count` smallest that are not zero: the paper's reverse pruning.
///
/// # Errors
/// As [`largest`].
pub fn smallest(scores: &[f64], count: usize) -> Result<Vec<bool>> {
    check(scores)?;
    // Reciprocal order: patterns are counted down from that of infinity.
    let flipped =
        |x: &f64| if *x > 0.0 { f64::from_bits(f64::INFINITY.to_bits() - x.to_bits()) } else { 0.0 };
    let reversed: Vec<f64> = scores.iter().map(flipped).collect();
    largest(&reversed, count)
}

/// Keeps the fewest values, largest first, whose squares sum to at least `fraction` of the total.
///
/// # Errors
/// As [`largest`], and for a fraction outside `[0, 1]`.
pub fn energy(values: &[f64], fraction: f64) -> Result<Vec<bool>> {
    check(values)?;
    if !(0.0..=1.0).contains(&fraction) {
        return Err(Error::InvalidInput(format!("the energy is a share between 0 and 1, not {fraction}")));
    }
    let unit = unit(values);
    let target = fraction * (1.0 - SLACK) * sum_of_squares(values.iter().copied(), unit);
    Ok(top(values, fewest(values, unit, target)))
}

/// Keeps what fits into `parameters`, the most energy per parameter first: by `value^2 / cost`, where a
/// module of `lengths[m]` descending values pays `costs[m]` for each.
///
/// Within a module values leave smallest first. Where the globally largest values that fit (PARA's own
/// choice) hold more energy than this greedy set, they are returned instead.
///
/// # Errors
/// As [`largest`], and if lengths do not add up, a cost is 0, or a module's values are not descending.
pub fn budget(values: &[f64], lengths: &[usize], costs: &[u64], parameters: u64) -> Result<Vec<bool>> {
    check(values)?;
    let modules = modules(values, lengths, costs)?;
    let unit = unit(values);
    let density: Vec<f64> = modules
        .iter()
        .flat_map(|&(start, end, cost)| {
            values[start..end].iter().map(move |x| (x * unit).powi(2) / cost as f64)
        })
        .collect();
    let greedy = fill(&by_score(values, &density), &modules, parameters, Skip::Module);
    let plain = fill(&by_score(values, values), &modules, parameters, Skip::Everything);
    let held = |prefixes: &[usize]| {
        let kept = modules.iter().zip(prefixes).flat_map(|(&(start, _, _), &n)| &values[start..start + n]);
        sum_of_squares(kept.copied(), unit)
    };
    let best = if held(&greedy) >= held(&plain) { greedy } else { plain };
    let mut mask = vec![false; values.len()];
    for (&(start, _, _), n) in modules.iter().zip(best) {
        mask[start..start + n].fill(true);
    }
    Ok(mask)
}

fn check(scores: &[f64]) -> Result<()> {
    match scores.iter().position(|x| !(x.is_finite() && *x >= 0.0)) {
        None => Ok(()),
        Some(i) => Err(Error::InvalidInput(format!(
            "value {i} is {}: singular values and scores are finite and not negative",
            scores[i]
        ))),
    }
}

/// `(start, end, cost)` of every module.
fn modules(values: &[f64], lengths: &[usize], costs: &[u64]) -> Result<Vec<(usize, usize, u64)>> {
    if lengths.len() != costs.len() || lengths.iter().sum::<usize>() != values.len() {
        return Err(Error::InvalidInput(format!(
            "{} lengths and {} costs do not describe {} values",
            lengths.len(),
            costs.len(),
            values.len()
        )));
    }
    let mut start = 0;
    let mut modules = Vec::with_capacity(lengths.len());
    for (m, (&length, &cost)) in lengths.iter().zip(costs).enumerate() {
        let end = start + length;
        if cost == 0 {
            return Err(Error::InvalidInput(format!("module {m} costs nothing")));
        }
        if values[start..end].is_sorted_by(|a, b| a >= b) {
            modules.push((start, end, cost));
        } else {
            return Err(Error::InvalidInput(format!("the values of module {m} are not descending")));
        }
        start = end;
    }
    Ok(modules)
}

/// A power of two by which values can be multiplied so that squares and their sums are normal numbers.
fn unit(values: &[f64]) -> f64 {
    let largest = values.iter().fold(0.0f64, |m, &x| m.max(x));
    if largest == 0.0 {
        return 1.0;
    }
    #[allow(clippy::cast_possible_wrap, clippy::cast_possible_truncation)] // Eleven bits.
    let exponent = (largest.to_bits() >> 52) as i32 - 1023;
    power_of_two((-exponent).clamp(-1000, 1000))
}

/// Compensated (Neumaier), as the count that an energy asks for hangs on the last digits.
fn sum_of_squares(values: impl Iterator<Item = f64>, unit: f64) -> f64 {
    let mut sum = Compensated::default();
    for x in values {
        sum.add((x * unit) * (x * unit));
    }
    sum.value()
}

#[derive(Clone, Copy, Default)]
struct Compensated {
    sum: f64,
    lost: f64,
}

impl Compensated {
    #[inline]
    fn add(&mut self, x: f64) {
        let next = self.sum + x;
        self.lost += if self.sum >= x { (self.sum - next) + x } else { (x - next) + self.sum };
        self.sum = next;
    }

    const fn value(self) -> f64 {
        self.sum + self.lost
    }
}

/// The mask of the `count` largest.
fn top(scores: &[f64], count: usize) -> Vec<bool> {
    let (threshold, mut ties) = threshold(scores, count);
    scores
        .iter()
        .map(|x| {
            let bits = x.to_bits();
            let is_tie = bits == threshold && ties > 0;
            ties -= usize::from(is_tie);
            bits > threshold || is_tie
        })
        .collect()
}

/// The pattern of the `count`-th largest score, and how many of that very score are wanted.
fn threshold(scores: &[f64], count: usize) -> (u64, usize) {
    if count == 0 {
        return (u64::MAX, 0);
    }
    let mut candidates: Vec<u64> = Vec::new();
    let (mut wanted, mut prefix, mut shift) = (count, 0u64, u64::BITS);
    while shift > 0 {
        let width = DIGIT.min(shift);
        shift -= width;
        let digit = |bits: u64| usize::try_from(bits >> shift & ((1 << width) - 1)).unwrap_or(0);
        let mut counts = vec![0usize; 1 << width];
        let all = || scores.iter().map(|x| x.to_bits());
        if shift + width == u64::BITS {
            for bits in all() {
                counts[digit(bits)] += 1;
            }
        } else {
            for &bits in &candidates {
                counts[digit(bits)] += 1;
            }
        }
        let mut chosen = counts.len() - 1;
        while wanted > counts[chosen] {
            wanted -= counts[chosen];
            chosen -= 1;
        }
        prefix = prefix << width | chosen as u64;
        if shift + width == u64::BITS {
            candidates = all().filter(|&bits| digit(bits) == chosen).collect();
        } else {
            candidates.retain(|&bits| digit(bits) == chosen);
        }
    }
    (prefix, wanted)
}

/// How many of the largest values reach a sum of squares.
fn fewest(values: &[f64], unit: f64, target: f64) -> usize {
    let square = |bits: u64| (f64::from_bits(bits) * unit).powi(2);
    let mut candidates: Vec<u64> = values.iter().map(|x| x.to_bits()).filter(|&bits| bits > 0).collect();
    let (mut reached, mut kept, mut shift) = (Compensated::default(), 0, u64::BITS);
    if target <= 0.0 {
        return 0;
    }
    while shift > 0 {
        let width = DIGIT.min(shift);
        shift -= width;
        let digit = |bits: u64| usize::try_from(bits >> shift & ((1 << width) - 1)).unwrap_or(0);
        let mut buckets = vec![(0usize, Compensated::default()); 1 << width];
        for &bits in &candidates {
            let bucket = &mut buckets[digit(bits)];
            bucket.0 += 1;
            bucket.1.add(square(bits));
        }
        // The bucket in which the sum is reached; the last occupied one if rounding hides it.
        let mut chosen = None;
        for (index, (count, sum)) in buckets.iter().enumerate().rev().filter(|(_, (count, _))| *count > 0) {
            if let Some(previous) = chosen.replace(index) {
                let (count, sum): (usize, Compensated) = buckets[previous];
                kept += count;
                reached.add(sum.sum);
                reached.add(sum.lost);
            }
            let mut with = reached;
            with.add(sum.sum);
            with.add(sum.lost);
            if with.value() >= target {
                break;
            }
            debug_assert!(*count > 0);
        }
        let Some(chosen) = chosen else { return kept };
        candidates.retain(|&bits| digit(bits) == chosen);
    }
    // All candidates are equal now.
    let each = candidates.first().map_or(0.0, |&bits| square(bits));
    let mut taken = 0;
    while taken < candidates.len() && reached.value() < target {
        // Exact for equal values: no sum of many small terms.
        let missing = ((target - reached.value()) / each).ceil().max(1.0);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Clamped, positive.
        let step = missing.min((candidates.len() - taken) as f64) as usize;
        let step = if step > 1 { step - 1 } else { 1 };
        reached.add(each * step as f64);
        taken += step;
    }
    kept + taken
}

/// Indices of the non-zero values, best score first, earlier index first among equals.
fn by_score(values: &[f64], scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).filter(|&i| values[i] > 0.0).collect();
    order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]).then(i.cmp(&j)));
    order
}

/// What a value that does not fit any more closes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Skip {
    /// Its module, so that the kept values of a module stay its largest.
    Module,
    /// The whole selection.
    Everything,
}

/// How many values of every module are taken, in the given order, within the budget.
fn fill(order: &[usize], modules: &[(usize, usize, u64)], parameters: u64, skip: Skip) -> Vec<usize> {
    let (mut prefixes, mut closed) = (vec![0; modules.len()], vec![false; modules.len()]);
    let mut left = parameters;
    for &i in order {
        let m = modules.partition_point(|&(_, end, _)| end <= i);
        let cost = modules[m].2;
        if closed[m] {
            continue;
        }
        if cost <= left {
            left -= cost;
            prefixes[m] += 1;
        } else if skip == Skip::Everything {
            break;
        } else {
            closed[m] = true;
        }
    }
    prefixes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Indices by the definition: sorted, largest first, earlier first among equals.
    fn order(values: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[j].partial_cmp(&values[i]).unwrap().then(i.cmp(&j)));
        order
    }

    fn mask(length: usize, kept: &[usize]) -> Vec<bool> {
        let mut mask = vec![false; length];
        for &i in kept {
            mask[i] = true;
        }
        mask
    }

    fn energy_of(values: &[f64], mask: &[bool]) -> f64 {
        values.iter().zip(mask).filter(|&(_, &kept)| kept).map(|(x, _)| x * x).sum()
    }

    fn scores() -> impl Strategy<Value = Vec<f64>> {
        let one = prop_oneof![Just(0.0), Just(1.0), Just(2.0), 0.0f64..3.0, Just(1.0 + f64::EPSILON)];
        prop::collection::vec(one, 0..40)
    }

    proptest! {
        #[test]
        fn largest_and_smallest_are_exact(values in scores(), count in 0usize..45) {
            let order = order(&values);
            let nonzero: Vec<usize> = order.iter().copied().filter(|&i| values[i] > 0.0).collect();
            let best = &nonzero[..count.min(nonzero.len())];
            prop_assert_eq!(largest(&values, count).unwrap(), mask(values.len(), best));
            let mut worst = nonzero.clone();
            worst.sort_by(|&i, &j| values[i].partial_cmp(&values[j]).unwrap().then(i.cmp(&j)));
            worst.truncate(count);
            prop_assert_eq!(smallest(&values, count).unwrap(), mask(values.len(), &worst));
        }

        #[test]
        fn energy_keeps_the_fewest(values in scores(), fraction in prop_oneof![Just(0.0), Just(1.0), 0.0f64..1.0],
            exponent in prop_oneof![Just(0), Just(-990), Just(990)])
        {
            let kept = energy(&values.iter().map(|x| x * power_of_two(exponent)).collect::<Vec<_>>(), fraction).unwrap();
            let total: f64 = values.iter().map(|x| x * x).sum();
            let target = fraction * (1.0 - SLACK) * total;
            let (mut sum, mut best) = (0.0, Vec::new());
            for i in order(&values) {
                if sum >= target || values[i] == 0.0 {
                    break;
                }
                sum += values[i] * values[i];
                best.push(i);
            }
            // A sum that meets the target to the last bit may go either way.
            let count = kept.iter().filter(|&&k| k).count();
            prop_assert!(count.abs_diff(best.len()) <= usize::from((sum - target).abs() < 1e-9 * total));
            prop_assert_eq!(kept, largest(&values, count).unwrap());
        }

        #[test]
        fn budgets_are_kept_and_never_hold_less_than_the_largest_values(
            parts in prop::collection::vec((prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0f64..4.0], 0..6), 1u64..9), 1..6),
            share in 0.0f64..1.1)
        {
            let (mut values, mut lengths, mut costs) = (Vec::new(), Vec::new(), Vec::new());
            for (mut part, cost) in parts {
                part.sort_by(|a, b| b.total_cmp(a));
                lengths.push(part.len());
                costs.push(cost);
                values.extend(part);
            }
            let owners: Vec<usize> = lengths.iter().enumerate().flat_map(|(m, &n)| vec![m; n]).collect();
            let price = |mask: &[bool]| -> u64 {
                mask.iter().zip(&owners).filter(|&(&kept, _)| kept).map(|(_, &m)| costs[m]).sum()
            };
            let whole = price(&vec![true; values.len()]);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let parameters = (whole as f64 * share) as u64;
            let kept = budget(&values, &lengths, &costs, parameters).unwrap();
            prop_assert!(price(&kept) <= parameters);
            for (i, &k) in kept.iter().enumerate() {
                prop_assert!(!k || values[i] > 0.0);
                prop_assert!(!k || i == 0 || owners[i] != owners[i - 1] || kept[i - 1], "a prefix of every module");
            }
            for count in 0..=values.len() {
                let gamma = largest(&values, count).unwrap();
                let mine = budget(&values, &lengths, &costs, price(&gamma)).unwrap();
                prop_assert!(price(&mine) <= price(&gamma));
                prop_assert!(energy_of(&values, &mine) >= energy_of(&values, &gamma) * (1.0 - 1e-14));
            }
        }
    }

    #[test]
    fn five_million_values_with_ties() {
        // Every value occurs about five times.
        let mut state = 1u64;
        let values: Vec<f64> = (0..5_000_000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 44) as f64 / 1024.0
            })
            .collect();
        let order = order(&values);
        for count in [1, 1_250_000, 4_999_000] {
            assert_eq!(largest(&values, count).unwrap(), mask(values.len(), &order[..count]));
        }
        let mut sums = Vec::with_capacity(values.len());
        let mut sum = 0u128;
        for &i in &order {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Whole numbers of 20 bits.
            let whole = (values[i] * 1024.0) as u128;
            sum += whole * whole;
            sums.push(sum);
        }
        for fraction in [0.5, 0.9, 0.99, 0.999_999] {
            let target = fraction * (1.0 - SLACK) * sum as f64;
            let expected = sums.partition_point(|&s| (s as f64) < target) + 1;
            let kept = energy(&values, fraction).unwrap().iter().filter(|&&k| k).count();
            assert_eq!(kept, expected, "{fraction}");
        }
    }

    #[test]
    fn misfits_are_errors() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(largest(&[1.0, bad], 1).unwrap_err().to_string().contains("value 1 is"));
        }
        for bad in [-0.1, 1.1, f64::NAN] {
            assert!(energy(&[1.0], bad).unwrap_err().to_string().contains("between 0 and 1"));
        }
        let fail = |values: &[f64], lengths: &[usize], costs: &[u64]| {
            budget(values, lengths, costs, 9).unwrap_err().to_string()
        };
        assert!(fail(&[1.0], &[2], &[1]).contains("do not describe"));
        assert!(fail(&[1.0], &[1], &[0]).contains("costs nothing"));
        assert!(fail(&[1.0, 2.0], &[2], &[1]).contains("not descending"));
    }
}
