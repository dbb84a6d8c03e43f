//! The terms `weight * B A` of a low-rank update.

use crate::exec::cancel::CancelToken;
use crate::matrix::stacked::Stacked;
use crate::storage::source::{Buffer, StoredMatrix};
use crate::{Error, Result};

/// One term of an update: `weight * B A`.
#[derive(Clone, Debug)]
pub struct Term {
    /// `(out, r)`.
    pub b: StoredMatrix,
    /// `(r, in)`.
    pub a: StoredMatrix,
    /// Scaling of the term, times its weight in a merge.
    pub weight: f64,
}

/// One of the two sides of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    B,
    A,
}

impl Side {
    /// Stacks the factors of this side, those of `B` transposed. Loads factors that are not in memory into
    /// the buffers.
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

/// Returns the weight of every row of the stacked factors.
pub(crate) fn weights_of_rows(terms: &[Term]) -> Vec<f64> {
    terms.iter().flat_map(|term| std::iter::repeat_n(term.weight, term.a.shape().0)).collect()
}

/// Returns `(out, in, K)` of a sum of terms, after checking shapes and weights.
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
