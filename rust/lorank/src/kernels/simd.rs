//! Run-time choice of the SIMD instructions of a kernel: the widest vectors of the machine.

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
use pulp::Simd;
use pulp::{Arch, WithSimd};

/// Size of a cache line, and of the widest vector of any machine, in bytes.
pub(crate) const LINE: usize = 64;

/// Runs a kernel on the widest vectors of the machine.
pub(crate) fn dispatch<K: WithSimd>(kernel: K) -> K::Output {
    #[cfg(test)]
    match tests::PATH.get() {
        tests::Path::Scalar => return kernel.with_simd(pulp::Scalar::new()),
        #[cfg(target_arch = "x86_64")]
        tests::Path::Avx2 => {
            if let Some(vectors) = pulp::x86::V3::try_new() {
                return Simd::vectorize(vectors, kernel);
            }
        }
        tests::Path::Widest => {}
    }
    Arch::new().dispatch(kernel)
}

/// Runs a kernel on vectors of half that width: for data that fill no wider vector, and for unaligned data.
/// At 7 of 8 places of a float64, an unaligned load of 64 bytes crosses a cache line; a load of 32 bytes does
/// so at 3 of 8.
pub(crate) fn dispatch_halved<K: WithSimd>(kernel: K) -> K::Output {
    #[cfg(test)]
    if !matches!(tests::PATH.get(), tests::Path::Widest) {
        return dispatch(kernel);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(halved) = pulp::x86::V3::try_new() {
        return Arch::new().dispatch(Halved { kernel, halved });
    }
    dispatch(kernel)
}

/// A kernel on 256-bit vectors, compiled for the widest instruction set of the machine: AVX-512 doubles the
/// number of registers.
#[cfg(target_arch = "x86_64")]
struct Halved<K> {
    kernel: K,
    halved: pulp::x86::V3,
}

#[cfg(target_arch = "x86_64")]
impl<K: WithSimd> WithSimd for Halved<K> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> K::Output {
        self.kernel.with_simd(self.halved)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    /// The vectors of kernels in a test.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Path {
        Scalar,
        #[cfg(target_arch = "x86_64")]
        Avx2,
        Widest,
    }

    thread_local! {
        pub(super) static PATH: Cell<Path> = const { Cell::new(Path::Widest) };
    }

    /// Runs a test with kernels on scalars, on 256-bit vectors where the machine has them, and on the widest
    /// vectors. The choice applies to the current thread only.
    pub(crate) fn on_every_path(test: impl Fn(Path)) {
        let paths = [
            Path::Scalar,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2,
            Path::Widest,
        ];
        for path in paths {
            PATH.set(path);
            test(path);
        }
    }
}
