//! Sorting of many values, until it is cancelled.

use crate::exec::cancel::CancelToken;
use crate::{Error, Result};

/// Number of values that are sorted between two polls of the cancel token: half a second.
const RUN: usize = 1 << 24;

/// Sorts values ascending, and polls `cancel` between pieces of the work.
pub(crate) fn sort(values: &mut [f64], cancel: &CancelToken) -> Result<()> {
    sort_in_runs(values, RUN, cancel)
}

fn sort_in_runs(values: &mut [f64], length: usize, cancel: &CancelToken) -> Result<()> {
    for run in values.chunks_mut(length) {
        cancel.check()?;
        run.sort_unstable_by(f64::total_cmp);
    }
    if values.len() > length {
        // Merging allocates this much memory, and would end the process without it.
        let probe = Vec::<f64>::new().try_reserve_exact(values.len());
        probe.map_err(|_| Error::no_memory(size_of_val(values), "sorted eigenvalues"))?;
    }
    let mut width = length;
    while width < values.len() {
        for pair in values.chunks_mut(2 * width) {
            cancel.check()?;
            // The stable sort finds the two sorted runs and merges them.
            pair.sort_by(f64::total_cmp);
        }
        width *= 2;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_slices_are_sorted_in_runs() {
        let value = |i: usize| f64::from(u32::try_from(i * 7919 % 1_000_003).unwrap()) - 5e5;
        let cancel = CancelToken::default();
        for count in [0, 1, 99, 100, 101, 200, 1000, 12_345] {
            let values: Vec<f64> = (0..count).map(value).collect();
            let (mut expected, mut found) = (values.clone(), values);
            expected.sort_unstable_by(f64::total_cmp);
            sort_in_runs(&mut found, 100, &cancel).unwrap();
            assert!(found == expected, "{count}");
        }
        cancel.cancel();
        assert!(matches!(sort(&mut [1.0, 0.0], &cancel), Err(Error::Cancelled)));
    }
}
