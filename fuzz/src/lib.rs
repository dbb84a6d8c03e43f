//! What the fuzz targets share: scratch files, and matrices of arbitrary bits with a decoder of their own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use lorank::dtype::DType;
use lorank::source::StoredMatrix;

/// All element types with a spectrum.
pub const DTYPES: [DType; 6] =
    [DType::F64, DType::F32, DType::F16, DType::Bf16, DType::F8E4M3, DType::F8E5M2];

/// Returns a folder of this process.
pub fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("lorank-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    })
}

/// Writes bytes to a file of this process, and returns its path.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Decodes one element, written from the definitions of the types.
pub fn decode(bytes: &[u8], dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
        DType::F16 => half::f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        DType::Bf16 => half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        DType::F8E5M2 => half::f16::from_le_bytes([0, bytes[0]]).to_f64(),
        DType::F8E4M3 => {
            let (exponent, mantissa) = (i32::from(bytes[0] >> 3 & 15), f64::from(bytes[0] & 7));
            let size = match (exponent, mantissa) {
                (15, 7.0) => f64::NAN,
                (0, _) => mantissa / 8.0 * 2f64.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
            };
            if bytes[0] < 128 { size } else { -size }
        }
    }
}

/// A small matrix of arbitrary bits.
#[derive(Clone, Debug)]
pub struct Bits {
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    pub bytes: Vec<u8>,
}

impl Bits {
    /// Takes a matrix of a given shape; missing bytes are zero.
    pub fn take(u: &mut arbitrary::Unstructured<'_>, rows: usize, cols: usize) -> arbitrary::Result<Self> {
        let dtype = *u.choose(&DTYPES)?;
        let mut bytes = vec![0; rows * cols * dtype.size()];
        u.fill_buffer(&mut bytes)?;
        Ok(Self { dtype, rows, cols, bytes })
    }

    /// Returns the values in rows.
    pub fn values(&self) -> Vec<f64> {
        self.bytes.chunks(self.dtype.size()).map(|element| decode(element, self.dtype)).collect()
    }

    pub fn dense(&self) -> nalgebra::DMatrix<f64> {
        nalgebra::DMatrix::from_row_slice(self.rows, self.cols, &self.values())
    }

    pub fn stored(&self) -> StoredMatrix {
        let bytes = Arc::new(self.bytes.clone());
        StoredMatrix::in_memory(bytes, self.dtype, (self.rows, self.cols), (self.cols, 1)).unwrap()
    }
}

impl<'a> Arbitrary<'a> for Bits {
    fn arbitrary(u: &mut arbitrary::Unstructured<'a>) -> arbitrary::Result<Self> {
        let (rows, cols) = (u.int_in_range(0..=12)?, u.int_in_range(0..=12)?);
        Self::take(u, rows, cols)
    }
}
