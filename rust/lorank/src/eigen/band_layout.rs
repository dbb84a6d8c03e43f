//! How a symmetric band matrix is stored: column by column, with place for the bulges of its reduction.

/// Half-bandwidth. More makes the dense reduction's products a little faster, and the reduction of the
/// band slower in proportion: measured best from 500 to 4096.
pub const WIDTH: usize = 32;

/// Numbers stored of a column: `WIDTH` above the diagonal, `2 * WIDTH` from it on, where bulges need room.
pub const COLUMN: usize = 3 * WIDTH;

/// Where entry `(i, j)` of a band is stored, for `-WIDTH <= i - j < 2 * WIDTH`.
#[must_use]
pub const fn position(i: usize, j: usize) -> usize {
    j * COLUMN + WIDTH + i - j
}

/// Numbers that a band of order `n` is stored in: blocks that reach beyond the matrix find zeros there.
#[must_use]
pub const fn storage(n: usize) -> usize {
    (n + WIDTH) * COLUMN
}
