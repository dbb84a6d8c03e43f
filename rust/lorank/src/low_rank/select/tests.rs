use proptest::prelude::*;

use super::*;

/// Returns the indices of the non-zero values by definition: largest first, the earlier among equals.
fn order(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).filter(|&i| values[i] > 0.0).collect();
    order.sort_by(|&i, &j| values[j].partial_cmp(&values[i]).unwrap().then(i.cmp(&j)));
    order
}

fn mask_of(length: usize, kept: &[usize]) -> Vec<bool> {
    let mut mask = vec![false; length];
    for &i in kept {
        mask[i] = true;
    }
    mask
}

fn count(mask: &[bool]) -> usize {
    mask.iter().filter(|&&kept| kept).count()
}

/// Returns the energy of the kept values, whose squares are exact.
fn energy_of(values: &[f64], mask: &[bool]) -> f64 {
    values.iter().zip(mask).filter(|&(_, &kept)| kept).map(|(x, _)| x * x).sum()
}

/// Returns all ways to keep a prefix of every module.
fn prefixes(lengths: &[usize]) -> Vec<Vec<usize>> {
    lengths.iter().fold(vec![vec![]], |all, &length| {
        let longer = |one: &Vec<usize>| {
            let one = one.clone();
            (0..=length).map(move |n| one.iter().copied().chain([n]).collect())
        };
        all.iter().flat_map(longer).collect()
    })
}

/// Generates valid scores: ties, both zeros, neighbouring and subnormal numbers, the ends of the range.
fn scores() -> impl Strategy<Value = Vec<f64>> {
    let one = prop_oneof![
        3 => prop::sample::select(vec![0.0, -0.0, 1.0, 2.0, 1.0 + f64::EPSILON, 5e-324, f64::MAX]),
        3 => 0.0f64..3.0,
        1 => (-300.0f64..300.0).prop_map(|x| 10f64.powf(x)),
    ];
    prop::collection::vec(one, 0..40)
}

/// Generates multiples of 1/16, whose squares and sums of squares are exact.
fn exact(largest: u32) -> impl Strategy<Value = f64> {
    (0..=largest).prop_map(|x| f64::from(x) / 16.0)
}

fn problem() -> impl Strategy<Value = (Vec<f64>, Vec<usize>, Vec<u64>)> {
    let values = prop_oneof![prop::collection::vec(exact(8), 0..5), prop::collection::vec(exact(4000), 0..5)];
    prop::collection::vec((values, 1u64..9), 0..6).prop_map(|parts| {
        let (mut parts, costs): (Vec<Vec<f64>>, Vec<u64>) = parts.into_iter().unzip();
        for part in &mut parts {
            part.sort_by(|a, b| b.total_cmp(a));
        }
        (parts.concat(), parts.iter().map(Vec::len).collect(), costs)
    })
}

proptest! {
    #[test]
    fn largest_and_smallest_are_those_of_a_sort(values in scores(), count in 0usize..45) {
        let mut order = order(&values);
        let kept = count.min(order.len());
        prop_assert_eq!(largest(&values, count).unwrap(), mask_of(values.len(), &order[..kept]));
        order.sort_by(|&i, &j| values[i].partial_cmp(&values[j]).unwrap().then(i.cmp(&j)));
        prop_assert_eq!(smallest(&values, count).unwrap(), mask_of(values.len(), &order[..kept]));
    }

    #[test]
    fn energy_is_that_of_exact_sums(
        values in prop_oneof![prop::collection::vec(exact(8), 0..60), prop::collection::vec(exact(1 << 20), 0..60)],
        fraction in prop_oneof![Just(0.0), Just(1.0), 0.0f64..1.0],
        scale in prop::sample::select(vec![0, -1022, -1070, 990]),
    ) {
        let target = fraction * (1.0 - SLACK) * values.iter().map(|x| x * x).sum::<f64>();
        let (mut sum, mut kept) = (0.0, Vec::new());
        for i in order(&values) {
            if sum >= target {
                break;
            }
            sum += values[i] * values[i];
            kept.push(i);
        }
        // The smallest scaled values are multiples of 2^-1074, and thus exact.
        let scaled: Vec<f64> = values.iter().map(|x| x * 2f64.powi(scale / 2) * 2f64.powi(scale - scale / 2)).collect();
        prop_assert_eq!(energy(&scaled, fraction).unwrap(), mask_of(values.len(), &kept));
    }

    #[test]
    fn energy_keeps_the_fewest_of_any_values(values in scores(), fraction in 0.0f64..=1.0) {
        let mask = energy(&values, fraction).unwrap();
        let count = count(&mask);
        prop_assert_eq!(&mask, &largest(&values, count).unwrap());
        let order = order(&values);
        let top = order.first().map_or(1.0, |&i| values[i]);
        // Summed from the smallest, which loses the least.
        let sum = |of: &[usize]| of.iter().rev().map(|&i| (values[i] / top).powi(2)).sum::<f64>();
        let target = fraction * (1.0 - SLACK) * sum(&order);
        prop_assert!(sum(&order[..count]) >= target * (1.0 - 1e-14));
        prop_assert!(count == 0 || sum(&order[..count - 1]) < target * (1.0 + 1e-14));
    }

    #[test]
    fn a_budget_is_kept_in_prefixes(
        (values, lengths, costs) in problem(), share in 0.0f64..1.1
    ) {
        let whole: u64 = lengths.iter().zip(&costs).map(|(&n, cost)| n as u64 * cost).sum();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let parameters = (whole as f64 * share) as u64;
        let mask = budget(&values, &lengths, &costs, parameters).unwrap();
        // The selection among all ways to cut the modules, and the best one.
        let (mut taken, mut best) = (None, 0.0f64);
        for kept in prefixes(&lengths) {
            let cost: u64 = kept.iter().zip(&costs).map(|(&n, cost)| n as u64 * cost).sum();
            let parts = kept.iter().zip(&lengths);
            let these: Vec<bool> = parts.flat_map(|(&n, &length)| (0..length).map(move |i| i < n)).collect();
            if cost <= parameters {
                best = best.max(energy_of(&values, &these));
                taken = taken.or((these == mask).then_some(kept));
            }
        }
        prop_assert!(taken.is_some(), "the selection is within the budget and consists of prefixes");
        prop_assert!(values.iter().zip(&mask).all(|(&x, &kept)| x > 0.0 || !kept));
        // The greedy selection plus the first value that exceeds the budget has more energy than any that
        // fits.
        let energy = energy_of(&values, &mask);
        prop_assert!(energy <= best && best <= energy + values.iter().fold(0.0, |m, &x| x.max(m)).powi(2));
    }

    /// The `count` largest values are a prefix of the order that `budget` follows, and their cost is the
    /// budget. The longest prefix within the budget is not shorter. It is not longer either, as another value
    /// would exceed the budget.
    #[test]
    fn a_budget_holds_no_less_than_any_count((values, lengths, costs) in problem()) {
        let owners: Vec<u64> = lengths.iter().zip(&costs).flat_map(|(&n, &cost)| vec![cost; n]).collect();
        for count in 0..=values.len() {
            let gamma = largest(&values, count).unwrap();
            let price = |mask: &[bool]| owners.iter().zip(mask).map(|(c, &kept)| c * u64::from(kept)).sum::<u64>();
            let ours = budget(&values, &lengths, &costs, price(&gamma)).unwrap();
            prop_assert!(price(&ours) <= price(&gamma));
            prop_assert!(energy_of(&values, &ours) >= energy_of(&values, &gamma));
            let modules = modules(&values, &lengths, &costs).unwrap();
            let run = fill(&modules, price(&gamma), Misfit::EndsAll, |x, _| x, &CancelToken::default()).unwrap();
            let run = run.iter().zip(&lengths).flat_map(|(&n, &length)| (0..length).map(move |i| i < n));
            prop_assert_eq!(run.collect::<Vec<_>>(), gamma);
        }
    }

    #[test]
    fn at_one_cost_a_budget_is_a_count((values, lengths, _) in problem(), cost in 1u64..9, count in 0usize..30) {
        let costs = vec![cost; lengths.len()];
        let parameters = cost * count as u64 + cost - 1;
        let mask = budget(&values, &lengths, &costs, parameters).unwrap();
        prop_assert_eq!(mask, largest(&values, count).unwrap());
    }
}

#[test]
fn budgets_equal_results_by_hand() {
    // Energies per parameter are 9/9 and 4/9 in the first module, 4/2 and 1/2 in the second.
    let of = |parameters| budget(&[3.0, 2.0, 2.0, 1.0], &[2, 2], &[9, 2], parameters).unwrap();
    assert_eq!(of(1), [false; 4]);
    assert_eq!(of(2), [false, false, true, false]);
    // 9 parameters pay for the largest value, with energy 9, or for the second module, with energy 4 + 1.
    assert_eq!(of(9), [true, false, false, false]);
    assert_eq!(of(12), [true, false, true, false]);
    assert_eq!(of(13), [true, false, true, true]);
    // The greedy selection has 4 + 9 + 1, with 8 parameters left; the largest values that fit have 9 + 4 + 4.
    assert_eq!(of(21), [true, true, true, false]);
    assert_eq!(of(u64::MAX), [true; 4]);
    // 2.25 per parameter comes first. The larger value no longer fits; the last one does.
    let mask = budget(&[3.0, 4.0, 0.5], &[1, 1, 1], &[4, 8, 1], 7).unwrap();
    assert_eq!(mask, [true, false, true]);
    // Among equal values the earlier module is kept; zeros are not kept at any budget.
    assert_eq!(budget(&[1.0, 1.0, 2.0, 0.0], &[2, 0, 2], &[1, 7, 4], 2).unwrap(), [true, true, false, false]);
    assert_eq!(budget(&[1e300, 1e-300, 0.0], &[1, 2], &[2, 1], 99).unwrap(), [true, true, false]);
    assert!(budget(&[], &[], &[], 5).unwrap().is_empty());
}

#[test]
fn no_values_and_equal_values() {
    for zeros in [&[][..], &[0.0, -0.0]] {
        let none = vec![false; zeros.len()];
        assert_eq!(largest(zeros, 3).unwrap(), none);
        assert_eq!(smallest(zeros, 3).unwrap(), none);
        assert_eq!(energy(zeros, 1.0).unwrap(), none);
    }
    for x in [1.0, 1e-300, 1e300, 5e-324, f64::MAX, 0.1] {
        let same = [x; 8];
        assert_eq!(largest(&same, 3).unwrap(), mask_of(8, &[0, 1, 2]));
        assert_eq!(smallest(&same, 3).unwrap(), mask_of(8, &[0, 1, 2]));
        for (fraction, kept) in [(0.0, 0), (1e-300, 1), (0.125, 1), (0.126, 2), (0.5, 4), (1.0, 8)] {
            assert_eq!(count(&energy(&same, fraction).unwrap()), kept, "{x} {fraction}");
        }
    }
    assert_eq!(energy(&[3e-300, 4e300, 3e300], 1.0).unwrap(), [false, true, true]);
    assert_eq!(energy(&[4e300, 3e300], 0.64).unwrap(), [true, false]);
    assert_eq!(energy(&[4e-300, 3e-300], 0.641).unwrap(), [true, true]);
}

#[test]
fn sums_of_squares_do_not_overflow() {
    for count in [1, 1 << 22, 1 << 40, usize::MAX] {
        let squares = Squares::new(count, Some((1, f64::MAX.to_bits())));
        let largest = squares.of(f64::MAX.to_bits());
        assert!(largest.checked_mul(count as u128).is_some());
        assert!(largest > 1 << 63);
        assert_eq!(squares.of(1), 0);
    }
}

#[test]
fn selection_of_five_million_values_with_ties() {
    // Every value occurs about five times.
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 44
    };
    let values: Vec<f64> = (0..5_000_000).map(|_| random() as f64 / 1024.0).collect();
    let order = order(&values);
    for count in [1, 1_250_000, 4_999_000] {
        assert_eq!(largest(&values, count).unwrap(), mask_of(values.len(), &order[..count]));
    }
    let mut sums = Vec::with_capacity(values.len());
    let mut sum = 0u128;
    for &i in &order {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Whole numbers of 20 bits.
        let whole = (values[i] * 1024.0) as u128;
        sum += whole * whole;
        sums.push(sum);
    }
    for fraction in [0.5, 0.9, 0.99, 0.999_999, 1.0] {
        let target = fraction * (1.0 - SLACK) * sum as f64;
        let kept = sums.partition_point(|&sum| (sum as f64) < target) + 1;
        assert_eq!(energy(&values, fraction).unwrap(), mask_of(values.len(), &order[..kept]), "{fraction}");
    }
}

#[test]
fn invalid_arguments_are_errors() {
    for bad in [f64::NAN, -f64::NAN, f64::INFINITY, -f64::INFINITY, -1.0, -5e-324] {
        for place in [0, 1, 7, 8, 18] {
            let mut scores = [1.0; 19];
            scores[place] = bad;
            let answers = [largest(&scores, 1), smallest(&scores, 1), energy(&scores, 0.5)];
            let budget = budget(&scores, &[19], &[1], 1);
            for answer in answers.into_iter().chain([budget]) {
                assert!(answer.unwrap_err().to_string().contains(&format!("value {place} is")));
            }
        }
    }
    for bad in [-0.1, 1.1, f64::NAN] {
        assert!(energy(&[1.0], bad).unwrap_err().to_string().contains("between 0 and 1"));
    }
    let fail = |values: &[f64], lengths: &[usize], costs: &[u64]| {
        budget(values, lengths, costs, 9).unwrap_err().to_string()
    };
    assert!(fail(&[1.0], &[2], &[1]).contains("do not describe"));
    assert!(fail(&[1.0], &[1], &[1, 1]).contains("do not describe"));
    assert!(fail(&[1.0], &[usize::MAX, 2], &[1, 1]).contains("do not describe"));
    assert!(fail(&[1.0], &[1], &[0]).contains("cost of module 0 is 0"));
    assert!(fail(&[3.0, 1.0, 2.0], &[1, 2], &[1, 1]).contains("module 1 are not descending"));
}
