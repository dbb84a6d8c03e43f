use faer::Mat;
use proptest::prelude::*;

use super::*;

fn dense(view: &MatrixView<'_>) -> Mat<f64> {
    let mut out = Mat::zeros(view.rows(), view.cols());
    view.upcast(0..view.rows(), 0..view.cols(), 1.0, out.as_mut());
    out
}

#[test]
fn blocks_of_any_strides_equal_indexed_elements() {
    let values: Vec<f64> = (0..60).map(f64::from).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    // (shape, strides): contiguous, transposed, every second column, overlapping rows.
    for (shape, strides) in [((5, 12), (12, 1)), ((12, 5), (1, 12)), ((5, 6), (12, 2)), ((3, 4), (1, 1))] {
        let view = MatrixView::new(&bytes, DType::F64, shape, strides).unwrap();
        let expected = Mat::from_fn(shape.0, shape.1, |i, j| values[i * strides.0 + j * strides.1]);
        assert_eq!(dense(&view), expected);
        assert_eq!(dense(&view.transposed()), expected.transpose().to_owned());
        assert_eq!(view.as_row_major_bytes().is_some(), shape == (5, 12));
        let at = |i: usize| expected[(i / shape.1, i % shape.1)];
        assert_eq!(view.to_row_major(), (0..shape.0 * shape.1).map(at).collect::<Vec<_>>());
        let mut block = Mat::<f64>::zeros(2, 3);
        view.upcast(1..3, 1..4, 2.0, block.as_mut());
        assert_eq!(block, expected.as_ref().submatrix(1, 1, 2, 3) * faer::Scale(2.0));
        let largest = expected.norm_max();
        assert!((view.max_abs().unwrap() - largest).abs() == 0.0);
        // Small integers: exact.
        assert!((view.sum_of_squares(0.5) - 0.25 * expected.squared_norm_l2()).abs() == 0.0);
    }
}

#[test]
fn out_of_bounds_and_non_finite_are_errors() {
    let bytes = [0u8; 16];
    assert!(MatrixView::row_major(&bytes, DType::F32, 2, 3).is_err());
    assert!(MatrixView::new(&bytes, DType::F32, (2, 2), (usize::MAX, 1)).is_err());
    assert!(MatrixView::row_major(&[], DType::F32, 0, usize::MAX).is_ok());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let values = [1.0, bad, 2.0, 3.0];
        assert!(MatrixView::from_f32(&values, 2, 2).unwrap().max_abs().is_err());
    }
}

#[test]
fn claims_beyond_memory_are_refused() {
    let bytes = [0u8; 64];
    for (shape, strides) in [
        ((1_000_000, 1_000_000), (0, 0)),
        ((usize::MAX, usize::MAX), (0, 0)),
        ((usize::MAX, 2), (0, 1)),
        ((1 << 33, 1 << 31), (0, 0)),
        ((1 << 14, (1 << 14) + 1), (0, 0)),
        ((1 << 60, 4), (0, 1)),
    ] {
        for (shape, strides) in [(shape, strides), ((shape.1, shape.0), (strides.1, strides.0))] {
            let error = MatrixView::new(&bytes, DType::F16, shape, strides).unwrap_err();
            assert!(error.to_string().contains("repeats the 32 elements in memory"), "{error}");
        }
    }
    for (shape, strides) in [((1 << 14, 1 << 14), (0, 0)), ((1 << 20, 32), (0, 1)), ((usize::MAX, 0), (9, 9))]
    {
        assert!(MatrixView::new(&bytes, DType::F16, shape, strides).is_ok(), "{shape:?}");
    }
}

#[test]
fn cancelled_reads_are_errors() {
    let view = MatrixView::from_f64(&[1.0; 6], 2, 3).unwrap();
    let cancel = CancelToken::default();
    assert_eq!((view.to_f64(&cancel).unwrap(), view.to_f32(&cancel).unwrap()), (vec![1.0; 6], vec![1.0; 6]));
    cancel.cancel();
    assert!(matches!(view.to_f64(&cancel), Err(Error::Cancelled)));
    let wide = vec![0u8; POLLED];
    let view = MatrixView::row_major(&wide, DType::F8E5M2, 1, POLLED).unwrap();
    assert!(matches!(view.max_abs_until(&cancel), Err(Error::Cancelled)));
}

proptest! {
    /// Compares every way of reading with single elements, for strides of any kind: 0, overlapping, with gaps.
    #[test]
    fn any_strides_equal_indexed_elements(
        values in prop::collection::vec(-8i8..8, 0..60),
        shape in (0usize..9, 0usize..9),
        strides in (0usize..12, 0usize..12),
        block in (0usize..9, 0usize..9),
    ) {
        let floats: Vec<f32> = values.iter().copied().map(f32::from).collect();
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        let end = |length: usize, stride: usize| length.saturating_sub(1) * stride;
        let fits = shape.0 * shape.1 == 0 || end(shape.0, strides.0) + end(shape.1, strides.1) < values.len();
        let view = MatrixView::new(&bytes, DType::F32, shape, strides);
        prop_assert_eq!(view.is_ok(), fits);
        let Ok(view) = view else { return Ok(()) };
        let at = |i: usize, j: usize| f64::from(floats[i * strides.0 + j * strides.1]);
        let expected = Mat::from_fn(shape.0, shape.1, at);
        prop_assert_eq!(dense(&view), expected.clone());
        let rows: Vec<f64> = (0..shape.0 * shape.1).map(|n| at(n / shape.1, n % shape.1)).collect();
        prop_assert_eq!(view.to_row_major(), rows.clone());
        prop_assert_eq!(view.to_f64(&CancelToken::default()).unwrap(), rows.clone());
        // Small integers: exact.
        prop_assert!((view.max_abs().unwrap() - expected.norm_max()).abs() == 0.0);
        prop_assert!((view.sum_of_squares(1.0) - expected.squared_norm_l2()).abs() == 0.0);
        if let Some(bytes) = view.as_row_major_bytes() {
            let single = |x: &f64| f32::of(*x).to_le_bytes();
            prop_assert_eq!(bytes, rows.iter().flat_map(single).collect::<Vec<u8>>());
        }
        let (row, col) = (block.0.min(shape.0), block.1.min(shape.1));
        let mut part = Mat::<f64>::zeros(shape.0 - row, shape.1 - col);
        view.upcast(row..shape.0, col..shape.1, 1.0, part.as_mut());
        prop_assert_eq!(part, expected.submatrix(row, col, shape.0 - row, shape.1 - col).to_owned());
        if let Some((found, stride)) = view.in_place::<f32>(0, 0).filter(|_| shape.0 * shape.1 > 0) {
            prop_assert!(stride >= shape.1 || shape.0 == 1);
            let last = f64::from(found[(shape.0 - 1) * stride + shape.1 - 1]);
            prop_assert!((last - rows[rows.len() - 1]).abs() == 0.0);
        }
    }
}
