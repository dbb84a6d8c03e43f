//! Which vectors kernels are compiled for, chosen at run time: the widest that the machine has.

// Measured: left to the compiler's judgement, every vector instruction becomes a call, 20 times slower.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
use pulp::Simd;
use pulp::{Arch, WithSimd};

/// Bytes of a cache line, and of the widest vector of any machine.
pub(crate) const LINE: usize = 64;

/// Runs a kernel on the widest vectors that there are.
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

/// Runs a kernel on vectors of half that length: for numbers that fill no more, and for those that lie anywhere. Of
/// float64, seven in eight places let the widest vectors cross the end of a cache line, and three in eight these.
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

/// A kernel on 256-bit vectors, compiled for whatever machine there is: one with longer ones has twice the registers.
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

    /// What kernels run on in a test.
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

    /// Calls a test with kernels on scalars, on 256-bit vectors where there are any, and on the widest. What
    /// other threads do is not touched.
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
