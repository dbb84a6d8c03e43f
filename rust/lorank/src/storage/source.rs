//! Matrices in memory, in files, or computed on demand.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::exec::aligned_bytes::AlignedBytes;
use crate::exec::cancel::CancelToken;
use crate::exec::scratch::Scratch;
use crate::matrix::MatrixView;
use crate::matrix::dtype::DType;
use crate::storage::checkpoint::StoredTensor;
use crate::storage::mapped::MappedFile;
use crate::{Error, Result};

/// Shared bytes, which live as long as any reference to them.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

#[derive(Clone)]
enum Storage {
    /// A range of the bytes of a tensor in a file.
    File {
        tensor: StoredTensor,
        start: usize,
        len: usize,
    },
    Memory(SharedBytes),
    /// Memory that is mapped from a file, and copied on loading.
    Mapped(SharedBytes, MappedFile),
    Computed(Arc<dyn Computed>),
}

/// Reusable memory that matrices are loaded into. It grows and never shrinks.
#[derive(Default)]
pub struct Buffer {
    pub(crate) bytes: AlignedBytes,
    /// Memory for the computation of a matrix.
    pub(crate) parts: Parts,
}

/// Reusable memory for the computation of a matrix.
#[derive(Default)]
pub struct Parts {
    /// One buffer per matrix that the computation reads.
    pub(crate) buffers: Vec<Buffer>,
    /// Temporaries of the computation.
    pub(crate) scratch: Scratch,
}

/// A matrix whose values are computed whenever it is loaded.
pub trait Computed: Send + Sync {
    /// Writes the row-major, little-endian values of the matrix to all of `out`. Matrices that the
    /// computation reads are loaded into `parts`.
    ///
    /// # Errors
    /// The errors of the computation, and of reading its inputs.
    fn compute(&self, out: &mut [u8], parts: &mut Parts, cancel: &CancelToken) -> Result<()>;
}

/// A matrix that is computed in blocks of rows, for a reader that needs each block only once.
pub trait Streamed: fmt::Debug + Send + Sync {
    /// Returns the numbers of rows and columns.
    fn shape(&self) -> (usize, usize);

    /// Computes all rows in order and passes them to `emit`, row-major and several rows at a time.
    ///
    /// # Errors
    /// The errors of the computation, of reading its inputs, and of `emit`.
    fn stream(
        &self,
        buffer: &mut Buffer,
        cancel: &CancelToken,
        emit: &mut dyn FnMut(&[f64]) -> Result<()>,
    ) -> Result<()>;
}

/// A matrix that is loaded as a [`MatrixView`] when it is needed.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use lorank::cancel::CancelToken;
/// use lorank::dtype::DType;
/// use lorank::source::{Buffer, StoredMatrix};
///
/// let bytes: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
/// let matrix = StoredMatrix::in_memory(Arc::new(bytes), DType::F32, (2, 2), (2, 1)).unwrap();
/// let mut buffer = Buffer::default();
/// let view = matrix.load(&mut buffer, &CancelToken::default()).unwrap();
/// assert_eq!(view.to_row_major(), [1.0, 2.0, 3.0, 4.0]);
/// ```
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
    /// Creates a matrix in a file: the `index`-th of the consecutive row-major matrices of shape `shape` in a
    /// tensor.
    ///
    /// # Errors
    /// [`Error::Format`] if the tensor has too few elements, or a type without a spectrum.
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

    /// Creates a matrix in memory, with strides in elements.
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

    /// Creates a matrix in memory, as [`in_memory`](Self::in_memory) does. Memory that is mapped from a file is
    /// copied whenever the matrix is loaded, so that a file that is cut off causes an error.
    ///
    /// # Errors
    /// Those of [`in_memory`](Self::in_memory).
    pub fn in_foreign_memory(
        bytes: SharedBytes,
        dtype: DType,
        shape: (usize, usize),
        strides: (usize, usize),
    ) -> Result<Self> {
        let found = MappedFile::of((*bytes).as_ref());
        let mut matrix = Self::in_memory(bytes, dtype, shape, strides)?;
        if let (Some(file), Storage::Memory(bytes)) = (found, &matrix.storage) {
            matrix.storage = Storage::Mapped(Arc::clone(bytes), file);
        }
        Ok(matrix)
    }

    /// Creates a matrix that is computed whenever it is loaded.
    #[must_use]
    pub fn computed(by: Arc<dyn Computed>, dtype: DType, shape: (usize, usize)) -> Self {
        Self { storage: Storage::Computed(by), dtype, shape, strides: (shape.1, 1) }
    }

    /// Returns true if the values are in memory, where other code may modify them.
    #[must_use]
    pub const fn is_in_memory(&self) -> bool {
        matches!(self.storage, Storage::Memory(_) | Storage::Mapped(..))
    }

    /// Returns the transposed matrix.
    #[must_use]
    pub fn transposed(self) -> Self {
        let ((rows, cols), (row_stride, col_stride)) = (self.shape, self.strides);
        Self { shape: (cols, rows), strides: (col_stride, row_stride), ..self }
    }

    /// Returns the computation of a computed matrix whose values are in row-major order.
    pub(crate) fn computation(&self) -> Option<&dyn Computed> {
        match &self.storage {
            Storage::Computed(by) if self.strides == (self.shape.1, 1) => Some(&**by),
            _ => None,
        }
    }

    /// Returns the size of all values in bytes.
    pub(crate) const fn size(&self) -> usize {
        // Only a computed matrix may be larger than memory: its reservation then fails.
        self.shape.0.saturating_mul(self.shape.1).saturating_mul(self.dtype.size())
    }

    /// Returns the numbers of rows and columns.
    #[must_use]
    pub const fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Returns the element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns consecutive rows as a matrix of their own, if they can be read without the other rows.
    pub(crate) fn rows_alone(&self, rows: Range<usize>) -> Option<Self> {
        let Storage::File { tensor, start, .. } = &self.storage else { return None };
        let line = self.shape.1 * self.dtype.size();
        let storage = Storage::File {
            tensor: tensor.clone(),
            start: start + rows.start * line,
            len: rows.len() * line,
        };
        Some(Self { storage, shape: (rows.len(), self.shape.1), ..self.clone() })
    }

    /// Calls `work` with a view. A matrix that is not in memory is first read or computed into `buffer`.
    ///
    /// # Errors
    /// The errors of [`load`](Self::load) and of `work`.
    pub fn with_view<R>(
        &self,
        buffer: &mut Buffer,
        cancel: &CancelToken,
        work: impl FnOnce(&MatrixView<'_>) -> Result<R>,
    ) -> Result<R> {
        work(&self.load(buffer, cancel)?)
    }

    /// Returns a view. A matrix that is not in memory is read or computed into `buffer`.
    ///
    /// # Errors
    /// The errors of reading or computing the matrix.
    pub fn load<'a>(&'a self, buffer: &'a mut Buffer, cancel: &CancelToken) -> Result<MatrixView<'a>> {
        let bytes = match &self.storage {
            Storage::File { tensor, start, len } => {
                tensor.file.read_into(&mut buffer.bytes, &tensor.info, *start, *len, cancel)?
            }
            Storage::Memory(bytes) => (**bytes).as_ref(),
            Storage::Mapped(bytes, file) => {
                return self.copied((**bytes).as_ref(), file, &mut buffer.bytes, cancel);
            }
            Storage::Computed(by) => {
                let Buffer { bytes, parts } = buffer;
                let size = self.size();
                let memory =
                    bytes.reserve(size, 0).ok_or_else(|| Error::no_memory(size, "a computed matrix"))?;
                let out = &mut memory[..size];
                by.compute(out, parts, cancel)?;
                out
            }
        };
        MatrixView::new(bytes, self.dtype, self.shape, self.strides)
    }

    /// Returns a view of a copy of mapped memory, without the bytes between rows, or between columns if these
    /// are contiguous.
    fn copied<'a>(
        &self,
        from: &[u8],
        file: &MappedFile,
        buffer: &'a mut AlignedBytes,
        cancel: &CancelToken,
    ) -> Result<MatrixView<'a>> {
        let ((rows, cols), (row_stride, col_stride)) = (self.shape, self.strides);
        let by_rows = col_stride <= row_stride;
        let (lines, line, length) = if by_rows { (rows, row_stride, cols) } else { (cols, col_stride, rows) };
        let step = row_stride.min(col_stride);
        // Lines that overlap are copied together.
        let span = if length == 0 { 0 } else { (length - 1) * step + 1 };
        let is_whole = lines <= 1 || line <= span;
        let item = self.dtype.size();
        let size = if is_whole { from.len() } else { lines * span * item };
        let memory =
            buffer.reserve(size, 0).ok_or_else(|| Error::no_memory(size, "a copy of a mapped array"))?;
        let out = &mut memory[..size];
        if is_whole {
            file.copy(from, out, cancel)?;
            return MatrixView::new(out, self.dtype, self.shape, self.strides);
        }
        let starts = (0..lines).map(|i| i * line * item);
        let parts = starts.map(|start| &from[start..start + span * item]);
        file.copy_parts(parts.zip(out.chunks_mut(span * item)), cancel)?;
        let strides = if by_rows { (span, col_stride) } else { (row_stride, span) };
        MatrixView::new(out, self.dtype, self.shape, strides)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(values: &[f32]) -> SharedBytes {
        Arc::new(values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    #[test]
    fn matrix_in_memory_has_the_values_of_its_bytes() {
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
    fn memory_too_small_for_the_shape_is_an_error() {
        for (shape, strides) in [((2, 4), (4, 1)), ((3, 2), (3, 1)), ((usize::MAX, 2), (2, 1))] {
            let error = StoredMatrix::in_memory(shared(&[0.0; 6]), DType::F32, shape, strides).unwrap_err();
            assert!(matches!(error, Error::InvalidInput(_)), "{shape:?}: {error}");
        }
    }

    #[test]
    fn errors_of_the_work_are_returned() {
        let matrix = StoredMatrix::in_memory(shared(&[1.0]), DType::F32, (1, 1), (1, 1)).unwrap();
        let result: Result<()> =
            matrix.with_view(&mut Buffer::default(), &CancelToken::default(), |_| Err(Error::Cancelled));
        assert!(matches!(result, Err(Error::Cancelled)));
    }
}
