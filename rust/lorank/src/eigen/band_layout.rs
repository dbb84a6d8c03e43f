//! Storage of a symmetric band matrix: column by column, with extra rows for the bulges of its reduction.

/// Half-bandwidth. A larger one makes the dense reduction a little faster, and the reduction of the band
/// slower in proportion. 32 was the fastest from order 500 to 4096.
pub const WIDTH: usize = 32;

/// Number of elements stored per column: `WIDTH` above the diagonal, and `2 * WIDTH` from the diagonal on, of
/// which the lower half is for bulges.
pub const COLUMN: usize = 3 * WIDTH;

/// Returns the index of entry `(i, j)` of a band, for `-WIDTH <= i - j < 2 * WIDTH`.
#[must_use]
pub const fn position(i: usize, j: usize) -> usize {
    j * COLUMN + WIDTH + i - j
}

/// Returns the number of elements of a band of order `n`. Extra columns of zeros complete the last blocks.
#[must_use]
pub const fn storage(n: usize) -> usize {
    (n + WIDTH) * COLUMN
}
