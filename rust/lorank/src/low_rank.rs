//! Low-rank updates: the terms that they are given by, and the balanced factors that they become.

use faer::MatRef;

use crate::eigen::power_of_two;
use crate::source::StoredMatrix;
use crate::{Error, Result};

/// One term of an update: `weight * B A`.
#[derive(Clone, Debug)]
pub struct Term {
    /// `(out, r)`.
    pub b: StoredMatrix,
    /// `(r, in)`.
    pub a: StoredMatrix,
    /// The term's scaling, times its weight in a merge.
    pub weight: f64,
}

/// Numbers: float32 unless a factor was float64.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Rounded once, at the end.
    F32(Vec<f32>),
    /// As computed.
    F64(Vec<f64>),
}

impl Values {
    pub(crate) fn collect(values: impl Iterator<Item = f64>, wide: bool) -> Self {
        if wide {
            Self::F64(values.collect())
        } else {
            #[allow(clippy::cast_possible_truncation)] // Rounding is the point.
            Self::F32(values.map(|x| x as f32).collect())
        }
    }
}

/// Factors as files hold them, balanced.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `(out, r)`, row-major.
    pub b: Values,
    /// `(r, in)`, row-major.
    pub a: Values,
}

/// Singular triplets in balanced form, `B = U sqrt(S)` and `A = sqrt(S) V^T`: the best approximation
/// of any rank `r` is the first `r` columns and rows.
#[derive(Clone, Debug)]
pub struct Triplets {
    /// `(k, out)`: the columns of `B` one after the other.
    pub b_columns: Values,
    /// The `k` singular values, descending.
    pub singular_values: Vec<f64>,
    /// `(k, in)`: the rows of `A`.
    pub a_rows: Values,
}

/// `(out, in, K)` of a sum of terms.
pub(crate) fn checked_shape(update: &[Term]) -> Result<(usize, usize, usize)> {
    let Some(first) = update.first() else {
        return Err(Error::InvalidInput("an update needs at least one term".into()));
    };
    let (out, fan_in) = (first.b.shape().0, first.a.shape().1);
    for term in update {
        let ((rows, inner), (r, cols)) = (term.b.shape(), term.a.shape());
        if (rows, cols) != (out, fan_in) || inner != r {
            return Err(Error::InvalidInput(format!(
                "factors of shapes {rows}x{inner} and {r}x{cols} do not make a {out}x{fan_in} update"
            )));
        }
        if !term.weight.is_finite() {
            return Err(Error::Numerical(format!("the weight {} is not finite", term.weight)));
        }
    }
    Ok((out, fan_in, update.iter().map(|term| term.a.shape().0).sum()))
}

/// Balanced triplets of `2^exponent * U diag(s) V^T`, in float32.
pub(crate) fn balanced(
    u: MatRef<'_, f64>,
    singular_values: &[f64],
    v: MatRef<'_, f64>,
    exponent: i32,
) -> Triplets {
    let singular_values: Vec<f64> = singular_values.iter().map(|s| s * power_of_two(exponent)).collect();
    let columns = |x: MatRef<'_, f64>| {
        let scaled = x.col_iter().zip(&singular_values);
        Values::collect(scaled.flat_map(|(column, s)| column.iter().map(|x| x * s.sqrt())), false)
    };
    Triplets { b_columns: columns(u), a_rows: columns(v), singular_values }
}
