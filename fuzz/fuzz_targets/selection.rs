//! Compares selections with sorting and counting.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lorank::select::{energy, largest, smallest};

fuzz_target!(|input: (Vec<f64>, u16, f64)| {
    let (scores, count, fraction) = input;
    let count = usize::from(count);
    let mut sorted = scores.clone();
    sorted.retain(|x| *x > 0.0);
    sorted.sort_by(|a, b| b.total_cmp(a));
    for (select, descending) in [(largest as fn(&[f64], usize) -> _, true), (smallest, false)] {
        let Ok(marks): lorank::Result<Vec<bool>> = select(&scores, count) else {
            assert!(scores.iter().any(|x| !x.is_finite() || *x < 0.0));
            continue;
        };
        let nonzero = scores.iter().filter(|x| **x > 0.0).count();
        assert_eq!(marks.iter().filter(|mark| **mark).count(), count.min(nonzero));
        let mut kept: Vec<f64> =
            scores.iter().zip(&marks).filter(|(_, mark)| **mark).map(|(x, _)| *x).collect();
        kept.sort_by(|a, b| b.total_cmp(a));
        let expected = if descending { &sorted[..kept.len()] } else { &sorted[sorted.len() - kept.len()..] };
        assert!(kept.iter().zip(expected).all(|(a, b)| a == b), "{kept:?} {expected:?}");
    }
    let Ok(marks) = energy(&scores, fraction) else {
        let is_valid = scores.iter().all(|x| x.is_finite() && *x >= 0.0) && (0.0..=1.0).contains(&fraction);
        let total: f64 = scores.iter().map(|s| s * s).sum();
        return assert!(!is_valid || fraction == 0.0 || total.is_infinite(), "{scores:?} {fraction}");
    };
    let total: f64 = scores.iter().map(|s| s * s).sum();
    if (1e-200..1e200).contains(&total) {
        let kept: f64 = scores.iter().zip(&marks).filter(|(_, mark)| **mark).map(|(s, _)| s * s).sum();
        assert!(kept >= (fraction - 1e-12) * total, "{kept:e} of {total:e}, fraction {fraction}");
    }
});
