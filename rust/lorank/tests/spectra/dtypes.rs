//! Tests that every stored type has the spectrum of its exactly widened float64 matrix, in every layout.

use half::{bf16, f16};
use lorank::cancel::CancelToken;
use lorank::dtype::DType;
use lorank::eigen::{self, Accuracy};
use lorank::matrix::MatrixView;

use crate::matrices::{Gaussian, assert_eigenvalues, bits};

const SHAPES: [(usize, usize); 6] = [(1, 300), (300, 1), (20, 20), (50, 270), (270, 50), (33, 700)];

fn eigenvalues(view: &MatrixView<'_>) -> Vec<f64> {
    eigen::spectrum(view, Accuracy::Exact, 1, &CancelToken::default()).unwrap().into_eigenvalues()
}

/// Rounds numbers to a type. Returns the bytes, and the values that independent code decodes from them.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is the point")]
fn rounded(dtype: DType, numbers: &[f64]) -> (Vec<u8>, Vec<f64>) {
    match dtype {
        DType::F64 => (numbers.iter().flat_map(|x| x.to_le_bytes()).collect(), numbers.to_vec()),
        DType::F32 => {
            let narrow: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
            let wide = narrow.iter().map(|&x| f64::from(x)).collect();
            (narrow.iter().flat_map(|x| x.to_le_bytes()).collect(), wide)
        }
        DType::F16 => {
            // Divided so that subnormals occur.
            let narrow: Vec<f16> = numbers.iter().map(|&x| f16::from_f64(x / 16384.0)).collect();
            (
                narrow.iter().flat_map(|x| x.to_le_bytes()).collect(),
                narrow.iter().map(|x| x.to_f64()).collect(),
            )
        }
        DType::Bf16 => {
            let narrow: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f64(x)).collect();
            (
                narrow.iter().flat_map(|x| x.to_le_bytes()).collect(),
                narrow.iter().map(|x| x.to_f64()).collect(),
            )
        }
        DType::F8E4M3 | DType::F8E5M2 => {
            // Sign, exponent and mantissa according to the format.
            let (mantissa_bits, bias) = if dtype == DType::F8E4M3 { (3, 7) } else { (2, 15) };
            let finite = |&code: &u8| code & 0x7f < if dtype == DType::F8E4M3 { 0x7f } else { 0x7c };
            let codes: Vec<u8> =
                numbers.iter().map(|x| Some(x.to_le_bytes()[2]).filter(finite).unwrap_or(0)).collect();
            let value = |&code: &u8| {
                let code = i32::from(code);
                let (exponent, mantissa) =
                    ((code & 0x7f) >> mantissa_bits, code & ((1 << mantissa_bits) - 1));
                let (hidden, power) = if exponent == 0 { (0, 1) } else { (1, exponent) };
                let fraction =
                    f64::from((hidden << mantissa_bits) + mantissa) / f64::from(1 << mantissa_bits);
                fraction * 2f64.powi(power - bias) * if code >= 128 { -1.0 } else { 1.0 }
            };
            let wide = codes.iter().map(value).collect();
            (codes, wide)
        }
    }
}

#[test]
fn spectrum_equals_that_of_the_widened_matrix() {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16, DType::F8E4M3, DType::F8E5M2] {
        for (rows, cols) in SHAPES {
            let (bytes, wide) = rounded(dtype, &Gaussian::new(7).numbers(rows * cols));
            let narrow_view = MatrixView::row_major(&bytes, dtype, rows, cols).unwrap();
            let wide_view = MatrixView::from_f64(&wide, rows, cols).unwrap();
            let (narrow, wide) = (eigenvalues(&narrow_view), eigenvalues(&wide_view));
            assert!(narrow.iter().sum::<f64>() > 0.0);
            assert_eq!(bits(&narrow), bits(&wide), "{dtype:?} {rows}x{cols}");
        }
    }
}

#[test]
fn spectrum_is_independent_of_alignment() {
    let (bytes, _) = rounded(DType::F32, &Gaussian::new(8).numbers(30 * 40));
    let aligned = eigenvalues(&MatrixView::row_major(&bytes, DType::F32, 30, 40).unwrap());
    for shift in 1..8 {
        let shifted = [vec![0xff; shift], bytes.clone()].concat();
        let view = MatrixView::row_major(&shifted[shift..], DType::F32, 30, 40).unwrap();
        assert_eq!(bits(&eigenvalues(&view)), bits(&aligned));
    }
}

#[test]
fn spectrum_is_independent_of_transposition_and_layout() {
    for (rows, cols) in SHAPES {
        let numbers = Gaussian::new(9).numbers(rows * cols);
        let view = MatrixView::from_f64(&numbers, rows, cols).unwrap();
        let plain = eigen::spectrum(&view, Accuracy::Exact, 1, &CancelToken::default()).unwrap();
        let transposed = eigenvalues(&view.transposed());
        if rows != cols {
            assert_eq!(bits(&transposed), bits(plain.eigenvalues()), "the same rows are multiplied");
        }
        assert_eigenvalues(&plain, &transposed, "transposed");

        // The same matrix in column-major layout, and with gaps between the elements.
        let element = |i: usize, j: usize| numbers[i * cols + j].to_le_bytes();
        let columns: Vec<u8> = (0..cols).flat_map(|j| (0..rows).flat_map(move |i| element(i, j))).collect();
        let view = MatrixView::new(&columns, DType::F64, (rows, cols), (1, rows)).unwrap();
        assert_eigenvalues(&plain, &eigenvalues(&view), "column-major");
        let gaps: Vec<u8> = numbers.iter().flat_map(|x| [x.to_le_bytes(), [0xff; 8]].concat()).collect();
        let view = MatrixView::new(&gaps, DType::F64, (rows, cols), (2 * cols, 2)).unwrap();
        assert_eigenvalues(&plain, &eigenvalues(&view), "every second element");
    }
}
