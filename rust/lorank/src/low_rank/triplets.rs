//! Singular triplets in balanced form.

use faer::MatRef;

use crate::Result;
use crate::exec::memory::collected;
use crate::kernels::exponent::power_of_two;

/// Purpose of the memory of this module.
const MEMORY: &str = "truncated factors";

/// Numbers in float32, or in float64 if a factor was float64.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// float32, rounded once at the end.
    F32(Vec<f32>),
    /// float64, as computed.
    F64(Vec<f64>),
}

impl Values {
    /// Collects at most `count` numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn collect(values: impl Iterator<Item = f64>, count: usize, in_float64: bool) -> Result<Self> {
        if in_float64 {
            collected(values, count, MEMORY).map(Self::F64)
        } else {
            #[allow(clippy::cast_possible_truncation)] // Rounding is intended.
            collected(values.map(|x| x as f32), count, MEMORY).map(Self::F32)
        }
    }

    /// Writes the kept columns of `length` elements as rows.
    pub(crate) fn put_rows(&self, kept: &[usize], length: usize, out: &mut [u8]) {
        self.put(kept.iter().flat_map(|j| j * length..(j + 1) * length), out);
    }

    /// Writes the kept columns of `length` elements as columns of a row-major matrix.
    pub(crate) fn put_columns(&self, kept: &[usize], length: usize, out: &mut [u8]) {
        self.put((0..length).flat_map(|i| kept.iter().map(move |j| j * length + i)), out);
    }

    fn put(&self, places: impl Iterator<Item = usize>, out: &mut [u8]) {
        match self {
            Self::F32(values) => {
                for (to, i) in out.as_chunks_mut().0.iter_mut().zip(places) {
                    *to = values[i].to_le_bytes();
                }
            }
            Self::F64(values) => {
                for (to, i) in out.as_chunks_mut().0.iter_mut().zip(places) {
                    *to = values[i].to_le_bytes();
                }
            }
        }
    }
}

/// Singular triplets in balanced form, `B = U sqrt(S)` and `A = sqrt(S) V^T`. The first `r` columns and rows
/// are the best approximation of rank `r`.
#[derive(Clone, Debug)]
pub struct Triplets {
    /// Columns of `B`, one after the other: `(k, out)`.
    pub b_columns: Values,
    /// The `k` singular values, descending.
    pub singular_values: Vec<f64>,
    /// Rows of `A`: `(k, in)`.
    pub a_rows: Values,
}

/// Returns the balanced triplets of `2^exponent * U diag(s) V^T` in float32.
pub(crate) fn balanced(
    u: MatRef<'_, f64>,
    singular_values: &[f64],
    v: MatRef<'_, f64>,
    exponent: i32,
) -> Result<Triplets> {
    let scaled = singular_values.iter().map(|s| s * power_of_two(exponent));
    let singular_values = collected(scaled, singular_values.len(), MEMORY)?;
    let columns = |x: MatRef<'_, f64>| {
        let scaled = x.col_iter().zip(&singular_values);
        let values = scaled.flat_map(|(column, s)| column.iter().map(|x| x * s.sqrt()));
        Values::collect(values, x.nrows() * x.ncols(), false)
    };
    Ok(Triplets { b_columns: columns(u)?, a_rows: columns(v)?, singular_values })
}
