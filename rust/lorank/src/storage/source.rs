//! Matrices that are not in memory yet, or that somebody else keeps there.

use std::fmt;
use std::sync::Arc;

use crate::exec::aligned_bytes::AlignedBytes;
use crate::exec::cancel::CancelToken;
use crate::exec::scratch::Scratch;
use crate::matrix::MatrixView;
use crate::matrix::dtype::DType;
use crate::storage::checkpoint::StoredTensor;
use crate::{Error, Result};

/// Bytes that outlive every view of them.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

#[derive(Clone)]
enum Storage {
    /// A range of a tensor's bytes in a file.
    File {
        tensor: StoredTensor,
        start: usize,
        len: usize,
    },
    Memory(SharedBytes),
    Computed(Arc<dyn Computed>),
}

/// Memory that one matrix after the other is loaded into: it grows and never shrinks.
#[derive(Default)]
pub struct Buffer {
    pub(crate) bytes: AlignedBytes,
    /// What a matrix is computed of.
    pub(crate) parts: Parts,
}

/// Memory that a computed matrix is computed in.
#[derive(Default)]
pub struct Parts {
    /// One buffer per matrix that the computation reads.
    pub(crate) buffers: Vec<Buffer>,
    /// Temporaries of the computation.
    pub(crate) scratch: Scratch,
}

/// Values that are computed whenever they are needed.
pub trait Computed: Send + Sync {
    /// Writes the row-major, little-endian values of a matrix to all of `out`; what they are made of is loaded into
    /// `parts`.
    ///
    /// # Errors
    /// Those of the computation, and of reading what it needs.
    fn compute(&self, out: &mut [u8], parts: &mut Parts, cancel: &CancelToken) -> Result<()>;
}

/// A matrix that becomes a [`MatrixView`] when it is needed.
#[derive(Clone)]
pub struct StoredMatrix {
    storage: Storage,
    dtype: DType,
    shape: (usize, usize),
    strides: (usize, usize),
}

impl fmt::Debug for StoredMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rows, cols) = self.shape;
        write!(f, "StoredMatrix({rows}x{cols} {})", self.dtype.name())
    }
}

impl StoredMatrix {
    /// The `index`-th of the row-major `shape` matrices that lie one after the other in a tensor.
    ///
    /// # Errors
    /// [`Error::Format`] if the tensor's type has no spectrum or it holds too few elements.
    pub fn in_file(tensor: StoredTensor, shape: (usize, usize), index: usize) -> Result<Self> {
        let fail = |reason: String| Error::tensor(tensor.file.path(), &tensor.info.name, reason);
        let dtype = DType::from_safetensors(&tensor.info.dtype)
            .ok_or_else(|| fail(format!("{} values have no spectrum", tensor.info.dtype)))?;
        let len = shape.0.checked_mul(shape.1).and_then(|n| n.checked_mul(dtype.size()));
        let end = len.and_then(|len| index.checked_add(1)?.checked_mul(len));
        match len.zip(end) {
            Some((len, end)) if end <= tensor.info.len => {
                let storage = Storage::File { start: end - len, len, tensor };
                Ok(Self { storage, dtype, shape, strides: (shape.1, 1) })
            }
            _ => Err(fail(format!(
                "matrix {index} of shape {shape:?} lies outside shape {:?}",
                tensor.info.shape
            ))),
        }
    }

    /// A matrix in memory, strides counted in elements.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if an element would lie outside `bytes`.
    pub fn in_memory(
        bytes: SharedBytes,
        dtype: DType,
        shape: (usize, usize),
        strides: (usize, usize),
    ) -> Result<Self> {
        MatrixView::new((*bytes).as_ref(), dtype, shape, strides)?;
        Ok(Self { storage: Storage::Memory(bytes), dtype, shape, strides })
    }

    /// A matrix that is computed when it is asked for, every time.
    #[must_use]
    pub fn computed(by: Arc<dyn Computed>, dtype: DType, shape: (usize, usize)) -> Self {
        Self { storage: Storage::Computed(by), dtype, shape, strides: (shape.1, 1) }
    }

    /// Whether the values are in memory that somebody else may write to.
    #[must_use]
    pub const fn is_in_memory(&self) -> bool {
        matches!(self.storage, Storage::Memory(_))
    }

    /// The computation, if there is one.
    pub(crate) fn computation(&self) -> Option<&dyn Computed> {
        if let Storage::Computed(by) = &self.storage { Some(&**by) } else { None }
    }

    /// Bytes of all values.
    pub(crate) const fn size(&self) -> usize {
        self.shape.0 * self.shape.1 * self.dtype.size()
    }

    /// Rows and columns.
    #[must_use]
    pub const fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Calls `work` with a view; a matrix that is not in memory is read, or computed, into `buffer` first.
    ///
    /// # Errors
    /// Those of reading, and those of `work`.
    pub fn with_view<R>(
        &self,
        buffer: &mut Buffer,
        cancel: &CancelToken,
        work: impl FnOnce(&MatrixView<'_>) -> Result<R>,
    ) -> Result<R> {
        work(&self.load(buffer, cancel)?)
    }

    /// A view; a matrix that is not in memory is read, or computed, into `buffer`.
    ///
    /// # Errors
    /// Those of reading.
    pub fn load<'a>(&'a self, buffer: &'a mut Buffer, cancel: &CancelToken) -> Result<MatrixView<'a>> {
        let bytes = match &self.storage {
            Storage::File { tensor, start, len } => {
                tensor.file.read_into(&mut buffer.bytes, &tensor.info, *start, *len, cancel)?
            }
            Storage::Memory(bytes) => (**bytes).as_ref(),
            Storage::Computed(by) => {
                let Buffer { bytes, parts } = buffer;
                let size = self.size();
                let room = bytes.room(size, 0).ok_or_else(|| Error::no_memory(size, "a computed matrix"))?;
                let out = &mut room[..size];
                by.compute(out, parts, cancel)?;
                out
            }
        };
        MatrixView::new(bytes, self.dtype, self.shape, self.strides)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(values: &[f32]) -> SharedBytes {
        Arc::new(values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    #[test]
    fn memory_becomes_a_view_of_the_same_values() {
        let values = [1.0, -2.0, 3.0, 4.0, -5.0, 6.0];
        let matrix = StoredMatrix::in_memory(shared(&values), DType::F32, (3, 2), (1, 3)).unwrap();
        assert_eq!((matrix.shape(), matrix.dtype()), ((3, 2), DType::F32));
        assert_eq!(format!("{matrix:?}"), "StoredMatrix(3x2 float32)");
        let mut transposed = faer::Mat::<f64>::zeros(3, 2);
        matrix
            .with_view(&mut Buffer::default(), &CancelToken::default(), |view| {
                view.upcast(0..3, 0..2, 1.0, transposed.as_mut());
                Ok(())
            })
            .unwrap();
        assert_eq!(transposed, faer::Mat::from_fn(3, 2, |i, j| f64::from(values[j * 3 + i])));
    }

    #[test]
    fn memory_must_hold_every_element() {
        for (shape, strides) in [((2, 4), (4, 1)), ((3, 2), (3, 1)), ((usize::MAX, 2), (2, 1))] {
            let error = StoredMatrix::in_memory(shared(&[0.0; 6]), DType::F32, shape, strides).unwrap_err();
            assert!(matches!(error, Error::InvalidInput(_)), "{shape:?}: {error}");
        }
    }

    #[test]
    fn errors_of_the_work_come_through() {
        let matrix = StoredMatrix::in_memory(shared(&[1.0]), DType::F32, (1, 1), (1, 1)).unwrap();
        let result: Result<()> =
            matrix.with_view(&mut Buffer::default(), &CancelToken::default(), |_| Err(Error::Cancelled));
        assert!(matches!(result, Err(Error::Cancelled)));
    }
}
