//! Low-rank updates: the terms that they are given by, and the balanced factors that they become.

mod basis;
pub(crate) mod cholesky_qr;
mod core_svd;
pub mod decompose;
pub mod difference;
pub mod select;
pub mod truncation;

use faer::MatRef;

use crate::exec::cancel::CancelToken;
use crate::exec::scratch::Scratch;
use crate::kernels::exponent::power_of_two;
use crate::low_rank::cholesky_qr::Triangular;
use crate::matrix::stacked::{Gram, Stacked};
use crate::storage::source::{Buffer, StoredMatrix};
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

/// Memory that one update after the other uses.
#[derive(Default)]
pub struct Buffers {
    /// The factors at hand, a buffer for each term.
    pub(crate) factors: Vec<Buffer>,
    /// What products with them need.
    pub(crate) scratch: Scratch,
    /// The products of a side's rows with each other.
    pub(crate) gram: Gram,
    /// What the sides of `B` and of `A` become.
    pub(crate) sides: [Triangular; 2],
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

    /// Writes some of the columns, which lie one after the other, as rows.
    pub(crate) fn put_rows(&self, kept: &[usize], length: usize, out: &mut [u8]) {
        self.put(kept.iter().flat_map(|j| j * length..(j + 1) * length), out);
    }

    /// Writes some of the columns side by side, row by row.
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

/// One of an update's two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    B,
    A,
}

impl Side {
    /// Its factors one below the other, those of `B` transposed: read into the buffers where they are not in
    /// memory.
    pub(crate) fn stacked<'a>(
        self,
        terms: &'a [Term],
        buffers: &'a mut Vec<Buffer>,
        cancel: &CancelToken,
    ) -> Result<Stacked<'a>> {
        buffers.resize_with(buffers.len().max(terms.len()), Buffer::default);
        let views = terms.iter().zip(buffers).map(|(term, buffer)| match self {
            Self::B => Ok(term.b.load(buffer, cancel)?.transposed()),
            Self::A => term.a.load(buffer, cancel),
        });
        Ok(Stacked::new(views.collect::<Result<_>>()?))
    }
}

/// A weight per row of either side's stack: its term's.
pub(crate) fn weights_of_rows(terms: &[Term]) -> Vec<f64> {
    terms.iter().flat_map(|term| std::iter::repeat_n(term.weight, term.a.shape().0)).collect()
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
