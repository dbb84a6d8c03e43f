//! A symmetric matrix from its lower triangle.

use faer::prelude::{Reborrow, ReborrowMut};
use faer::{MatMut, MatRef};

use crate::parallel::Strategy;
use crate::strips::both;

/// Order of the blocks that are transposed at once: two of them fit into the level-1 cache.
const BLOCK: usize = 32;

/// Order from which halves are worth a thread each.
const PARALLEL_FROM: usize = 256;

/// Writes the lower triangle's entries to where they belong above the diagonal.
pub(crate) fn mirror<T: Copy + Send + Sync>(matrix: MatMut<'_, T>, strategy: Strategy) {
    let n = matrix.nrows();
    if n <= BLOCK {
        mirror_block(matrix);
        return;
    }
    let half = (n / 2).next_multiple_of(BLOCK);
    let (first, above, below, last) = matrix.split_at_mut(half, half);
    let strategy = if n < PARALLEL_FROM { Strategy::Alone } else { strategy };
    transpose(below.rb(), above, strategy);
    both(strategy, || mirror(first, strategy), || mirror(last, strategy));
}

fn mirror_block<T: Copy>(mut matrix: MatMut<'_, T>) {
    for j in 1..matrix.ncols() {
        for i in 0..j {
            matrix[(i, j)] = matrix[(j, i)];
        }
    }
}

/// Writes `from^T` to `to`.
fn transpose<T: Copy + Send + Sync>(from: MatRef<'_, T>, mut to: MatMut<'_, T>, strategy: Strategy) {
    let (rows, cols) = (to.nrows(), to.ncols());
    if rows.max(cols) <= BLOCK {
        for j in 0..cols {
            for i in 0..rows {
                to[(i, j)] = from[(j, i)];
            }
        }
    } else if rows > cols {
        let half = (rows / 2).next_multiple_of(BLOCK);
        let (left, right) = from.split_at_col(half);
        let (above, below) = to.rb_mut().split_at_row_mut(half);
        halves(left, above, right, below, strategy);
    } else {
        let half = (cols / 2).next_multiple_of(BLOCK);
        let (above, below) = from.split_at_row(half);
        let (left, right) = to.rb_mut().split_at_col_mut(half);
        halves(above, left, below, right, strategy);
    }
}

fn halves<T: Copy + Send + Sync>(
    one: MatRef<'_, T>,
    to_one: MatMut<'_, T>,
    other: MatRef<'_, T>,
    to_other: MatMut<'_, T>,
    strategy: Strategy,
) {
    let size = one.nrows().max(one.ncols());
    let strategy = if size < PARALLEL_FROM { Strategy::Alone } else { strategy };
    both(strategy, || transpose(one, to_one, strategy), || transpose(other, to_other, strategy));
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;
    use crate::parallel;

    #[test]
    fn symmetric_whatever_the_order() {
        let pool = parallel::pool(3).unwrap();
        for n in [0, 1, 2, 31, 32, 33, 64, 65, 100, 257, 600] {
            for strategy in [Strategy::Alone, Strategy::Together] {
                let mut matrix = Mat::from_fn(n, n, |i, j| if i < j { f64::NAN } else { (i * n + j) as f64 });
                pool.install(|| mirror(matrix.as_mut(), strategy));
                for j in 0..n {
                    for i in 0..n {
                        let expected = (i.max(j) * n + i.min(j)) as f64;
                        assert_eq!(matrix[(i, j)].to_bits(), expected.to_bits(), "order {n}: ({i}, {j})");
                    }
                }
            }
        }
    }
}
