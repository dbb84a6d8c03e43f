//! The extension module `lorank._core`: conversion of arguments, results and errors between Python and the
//! `lorank` crate, without arithmetic.

use pyo3::prelude::*;

mod analysis;
mod array_memory;
mod decomposition;
mod detached;
mod errors;
mod list;
mod mapped;
mod matrix;
mod reserve;
mod selection;
mod statistics;
mod updated;
mod writing;

#[global_allocator]
static ALLOCATOR: reserve::ReservingAllocator = reserve::ReservingAllocator;

/// The Rust core of lorank.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::analysis::{analyze, sample};
    #[pymodule_export]
    use crate::decomposition::{Decomposition, decompose, rebuild, subtract};
    #[pymodule_export]
    use crate::errors::{FormatError, LorankError, NumericalError};
    #[pymodule_export]
    use crate::mapped::copy_mapped;
    #[pymodule_export]
    use crate::matrix::{Checkpoint, Matrix, gguf_types, panicking_matrix};
    #[pymodule_export]
    use crate::selection::{select_budget, select_energy, select_largest, select_smallest};
    #[pymodule_export]
    use crate::statistics::{
        alpha_hill, available_threads, check_thread_memory, energy_rank, marchenko_pastur,
        marchenko_pastur_median, spectral_metrics, spectrum,
    };

    #[pymodule_export]
    use crate::updated::{UpdatedMatrix, compare};
    #[pymodule_export]
    use crate::writing::{exchange, write_safetensors};

    use super::{Bound, PyModule, PyModuleMethods, PyResult, errors, reserve};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        reserve::hold().map_err(errors::to_py)?;
        lorank::panics::locate_panics();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
