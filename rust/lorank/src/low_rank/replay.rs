//! Comparison of a stored weight with a base weight and its update.

use std::ops::Range;

use crate::exec::cancel::CancelToken;
use crate::exec::memory::{resize, zeros};
use crate::exec::panics::guarded;
use crate::exec::parallel::{costliest_first, pool_for, side_by_side};
use crate::low_rank::updated::UpdatedMatrix;
use crate::matrix::MatrixView;
use crate::matrix::dtype::DType;
use crate::storage::rounding::encode_all;
use crate::storage::source::{Buffer, StoredMatrix, Streamed};
use crate::{Error, Result};

/// Purpose of the memory of this module.
const MEMORY: &str = "a comparison of weights";

/// A weight with its update, and the weight that should hold both.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// The base weight and the update.
    pub expected: UpdatedMatrix,
    /// The weight to compare.
    pub found: StoredMatrix,
}

/// The differences between a base weight, its update, and the weight that should hold both. Energies are sums of
/// squares over all elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Number of elements.
    pub elements: usize,
    /// Energy of the update.
    pub update: f64,
    /// Energy of the update after rounding the sum to the type of the found weight.
    pub rounded_update: f64,
    /// Energy of the found weight minus the rounded base weight.
    pub change: f64,
    /// Inner product of the rounded update and of the found weight minus the rounded base weight.
    pub overlap: f64,
    /// Energy of the found weight minus the rounded sum.
    pub rounded_error: f64,
    /// Energy of the found weight minus the exact sum.
    pub error: f64,
    /// Energy of the rounding of the exact sum to the type of the found weight.
    pub rounding: f64,
    /// Number of elements that are exactly the rounded sum.
    pub exact: usize,
    /// Number of elements that are exactly the rounded base weight.
    pub unchanged: usize,
    /// Largest error of an element in units of the last place of the found weight's type.
    pub largest_error: f64,
}

/// Compares every weight with up to `threads` threads; results do not depend on their number.
///
/// # Errors
/// [`Cancelled`](Error::Cancelled), and [`NoThreads`](Error::NoThreads). `emit` receives the errors of single
/// weights.
pub fn compare_all(
    pairs: &[Replayed],
    threads: usize,
    cancel: &CancelToken,
    emit: &(dyn Fn(usize, Result<Comparison>) + Sync),
) -> Result<()> {
    let cost = |pair: &Replayed| pair.found.shape().0 as u128 * pair.found.shape().1 as u128;
    let order = costliest_first(pairs.iter().map(cost));
    pool_for(threads, order.len())?.install(|| {
        side_by_side(&order, threads, cancel, &|i, buffers: &mut [Buffer; 2]| {
            emit(i, guarded(|| compare(&pairs[i], buffers, cancel)));
        });
        cancel.check()
    })
}

/// Compares one weight.
///
/// # Errors
/// [`Error::InvalidInput`] if the shapes differ or the found weight has an 8-bit type, [`Error::OutOfMemory`], and
/// the errors of loading the weights.
pub fn compare(pair: &Replayed, buffers: &mut [Buffer; 2], cancel: &CancelToken) -> Result<Comparison> {
    let (shape, dtype) = (pair.found.shape(), pair.found.dtype());
    if shape != pair.expected.shape() {
        let (expected, found) = (pair.expected.shape(), shape);
        return Err(Error::InvalidInput(format!(
            "the shapes differ: {expected:?} expected, {found:?} found"
        )));
    }
    if dtype.size() == 1 {
        return Err(Error::InvalidInput(format!("values of {} are not compared", dtype.name())));
    }
    let [first, second] = buffers;
    let mut sums = Sums { dtype, ..Sums::default() };
    let whole = match pair.found.rows_alone(0..0) {
        Some(_) => None,
        None => Some(pair.found.load(second, cancel)?),
    };
    if let Some(view) = whole {
        pair.expected.for_each_block(first, cancel, &mut |rows| {
            let count = rows.base.len() / shape.1;
            sums.add(&view, rows.first..rows.first + count, rows.base, rows.updated)
        })?;
        return Ok(sums.total);
    }
    pair.expected.for_each_block(first, cancel, &mut |rows| {
        let count = rows.base.len() / shape.1;
        let Some(part) = pair.found.rows_alone(rows.first..rows.first + count) else { return Ok(()) };
        part.with_view(second, cancel, |view| sums.add(view, 0..count, rows.base, rows.updated))
    })?;
    Ok(sums.total)
}

struct Sums {
    dtype: DType,
    total: Comparison,
    found: Vec<f64>,
    bytes: Vec<u8>,
    rounded: [Vec<f64>; 2],
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            dtype: DType::F64,
            total: Comparison::default(),
            found: Vec::new(),
            bytes: Vec::new(),
            rounded: [Vec::new(), Vec::new()],
        }
    }
}

impl Sums {
    #[allow(clippy::float_cmp)] // Values of one type, rounded once, are equal or not.
    fn add(
        &mut self,
        view: &MatrixView<'_>,
        rows: Range<usize>,
        base: &[f64],
        updated: &[f64],
    ) -> Result<()> {
        resize(&mut self.found, base.len(), MEMORY)?;
        view.upcast_rows(rows, 1.0, &mut self.found);
        if self.bytes.len() < base.len() * self.dtype.size() {
            self.bytes = zeros(base.len() * self.dtype.size(), MEMORY)?;
        }
        for (values, out) in [updated, base].into_iter().zip(&mut self.rounded) {
            let bytes = &mut self.bytes[..values.len() * self.dtype.size()];
            encode_all(values, self.dtype, bytes);
            resize(out, values.len(), MEMORY)?;
            self.dtype.decode(bytes, 1.0, out);
        }
        let [sum, before] = &self.rounded;
        let mut part = Comparison { elements: base.len(), ..Comparison::default() };
        for i in 0..base.len() {
            let (found, update, rounded) = (self.found[i], updated[i] - base[i], sum[i] - before[i]);
            let (error, change) = (found - updated[i], found - before[i]);
            part.update += update * update;
            part.rounded_update += rounded * rounded;
            part.change += change * change;
            part.overlap += change * rounded;
            part.rounded_error += (found - sum[i]).powi(2);
            part.error += error * error;
            part.rounding += (sum[i] - updated[i]).powi(2);
            part.exact += usize::from(found == sum[i]);
            part.unchanged += usize::from(found == before[i]);
            if found != sum[i] {
                part.largest_error = part.largest_error.max(error.abs() / unit(sum[i], self.dtype));
            }
        }
        self.total.join(part);
        Ok(())
    }
}

impl Comparison {
    fn join(&mut self, part: Self) {
        self.elements += part.elements;
        self.update += part.update;
        self.rounded_update += part.rounded_update;
        self.change += part.change;
        self.overlap += part.overlap;
        self.rounded_error += part.rounded_error;
        self.error += part.error;
        self.rounding += part.rounding;
        self.exact += part.exact;
        self.unchanged += part.unchanged;
        self.largest_error = self.largest_error.max(part.largest_error);
    }
}

/// Returns the distance between two numbers of a type that are next to `x`.
fn unit(x: f64, dtype: DType) -> f64 {
    let (digits, least) = match dtype {
        DType::F64 => (52, -1022),
        DType::F32 => (23, -126),
        DType::F16 => (10, -14),
        DType::Bf16 | DType::F8E4M3 | DType::F8E5M2 => (7, -126),
    };
    let exponent = i32::try_from((x.to_bits() >> 52) & 0x7ff).unwrap_or(0) - 1023;
    2f64.powi(exponent.max(least) - digits)
}
