//! Tests of the analysis of many matrices: completeness, independence, cancellation.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lorank::analysis::{Analysis, analyze};
use lorank::cancel::CancelToken;
use lorank::checkpoint::Checkpoint;
use lorank::dtype::DType;
use lorank::parallel::Strategy;
use lorank::source::{Buffer, StoredMatrix};
use lorank::{
    Error, Result,
    eigen::{self, Accuracy},
};

use crate::matrices::{Gaussian, bits, codes, row_major, spectrum_of};

fn in_memory(numbers: &[f64], rows: usize, cols: usize) -> StoredMatrix {
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    StoredMatrix::in_memory(Arc::new(bytes), DType::F64, (rows, cols), (cols, 1)).unwrap()
}

fn gaussian(seed: u64, rows: usize, cols: usize) -> StoredMatrix {
    in_memory(&Gaussian::new(seed).numbers(rows * cols), rows, cols)
}

/// Analyses matrices and returns the results by index. Fails if an index occurs twice or never.
fn run(matrices: &[StoredMatrix], threads: usize) -> Vec<Result<Analysis>> {
    let found: Vec<Mutex<Option<Result<Analysis>>>> = matrices.iter().map(|_| Mutex::new(None)).collect();
    analyze(matrices, Accuracy::Exact, threads, &CancelToken::default(), &|i, result| {
        let before = found[i].lock().unwrap().replace(result);
        assert!(before.is_none(), "index {i} was emitted twice");
    })
    .unwrap();
    found.into_iter().map(|result| result.into_inner().unwrap().expect("every index is emitted")).collect()
}

#[test]
fn results_are_independent_of_threads() {
    let mut matrices: Vec<StoredMatrix> = [(1, 1), (40, 60), (300, 20), (7, 500), (128, 128), (64, 64)]
        .into_iter()
        .enumerate()
        .map(|(seed, (rows, cols))| gaussian(seed as u64, rows, cols))
        .collect();
    // Large enough for all threads together, with a parallel reduction (p > 1024).
    let bytes = codes(&Gaussian::new(50).numbers(1100 * 33_100));
    let large = StoredMatrix::in_memory(Arc::new(bytes), DType::F8E4M3, (1100, 33_100), (33_100, 1)).unwrap();
    assert_eq!(Strategy::for_shape(1100, 33_100), Strategy::Together);
    matrices.insert(3, large);

    let (one, four) = (run(&matrices, 1), run(&matrices, 4));
    for ((matrix, one), four) in matrices.iter().zip(one).zip(four) {
        let (one, four) = (one.unwrap(), four.unwrap());
        assert_eq!(bits(one.spectrum.eigenvalues()), bits(four.spectrum.eigenvalues()), "{matrix:?}");
        assert_eq!(format!("{:?}", one.metrics), format!("{:?}", four.metrics), "{matrix:?}");
        let direct = matrix.with_view(&mut Buffer::default(), &CancelToken::default(), |view| {
            eigen::spectrum(view, Accuracy::Exact, 2, &CancelToken::default())
        });
        assert_eq!(bits(direct.unwrap().eigenvalues()), bits(one.spectrum.eigenvalues()), "{matrix:?}");
    }
}

#[test]
fn failing_matrix_does_not_stop_the_others() {
    let mut nan = vec![1.0; 30];
    nan[17] = f64::NAN;
    let matrices = [
        gaussian(1, 9, 9),
        in_memory(&nan, 5, 6),
        gaussian(2, 4, 30),
        in_memory(&[], 0, 3),
        gaussian(3, 2, 2),
    ];
    for threads in [1, 2, 16] {
        let results = run(&matrices, threads);
        let good: Vec<bool> = results.iter().map(Result::is_ok).collect();
        assert_eq!(good, [true, false, true, false, true]);
        assert!(matches!(results[1], Err(Error::Numerical(_))));
        assert!(matches!(results[3], Err(Error::InvalidInput(_))), "no metrics without eigenvalues");
    }
}

#[test]
fn empty_input_and_zero_threads_are_allowed() {
    assert!(run(&[], 4).is_empty());
    assert!(run(&[gaussian(1, 3, 3)], 0)[0].is_ok());
}

#[test]
fn cancellation_by_a_callback_stops_soon() {
    let matrices: Vec<StoredMatrix> = (0..400).map(|seed| gaussian(seed, 40, 40)).collect();
    for threads in [1, 3] {
        let cancel = CancelToken::default();
        let emitted = AtomicUsize::new(0);
        let result = analyze(&matrices, Accuracy::Exact, threads, &cancel, &|_, _| {
            if emitted.fetch_add(1, Ordering::SeqCst) == 4 {
                cancel.cancel();
            }
        });
        assert!(matches!(result, Err(Error::Cancelled)));
        // Every thread may have finished one more.
        let emitted = emitted.into_inner();
        assert!((5..=5 + threads).contains(&emitted), "{emitted} emitted with {threads} threads");
    }
}

#[test]
fn cancellation_before_the_start_is_an_error() {
    let cancel = CancelToken::default();
    cancel.cancel();
    let result = analyze(&[gaussian(1, 3, 3)], Accuracy::Exact, 2, &cancel, &|_, _| {
        panic!("no result may be emitted")
    });
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn matrices_in_a_file_are_analyzed() {
    // Three experts of shape (4, 6) in one tensor, and a separate matrix.
    let mut gaussian = Gaussian::new(5);
    let (experts, single) = (gaussian.matrix(12, 6), gaussian.matrix(10, 3));
    let header = concat!(
        r#"{"experts":{"dtype":"F64","shape":[3,4,6],"data_offsets":[0,576]},"#,
        r#""single":{"dtype":"F64","shape":[10,3],"data_offsets":[576,816]}}"#
    );
    let values = [row_major(&experts), row_major(&single)].concat();
    let bytes = [
        (header.len() as u64).to_le_bytes().to_vec(),
        header.into(),
        values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    ]
    .concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();

    let tensors = Checkpoint::open(&path).unwrap().tensors;
    let expert = |index| StoredMatrix::in_file(tensors[0].clone(), (4, 6), index);
    let mut matrices: Vec<StoredMatrix> = (0..3).map(|index| expert(index).unwrap()).collect();
    matrices.push(StoredMatrix::in_file(tensors[1].clone(), (10, 3), 0).unwrap());
    for (i, result) in run(&matrices, 2).into_iter().enumerate() {
        let expected =
            if i < 3 { spectrum_of(&experts.rows(4 * i, 4).into_owned()) } else { spectrum_of(&single) };
        assert_eq!(bits(result.unwrap().spectrum.eigenvalues()), bits(expected.eigenvalues()), "matrix {i}");
    }

    // A fourth expert does not exist, and the file may shrink during the analysis.
    let error = expert(3).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("`experts`"), "{error}");
    fs::File::options().write(true).open(&path).unwrap().set_len(700).unwrap();
    let results = run(&matrices, 2);
    for (index, tensor, reason) in [(0, "`experts`", "changed"), (3, "`single`", "truncated")] {
        let error = results[index].as_ref().unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains(reason), "{error}");
    }
}
