//! The memory that products of matrices keep on every thread.
//!
//! On its first product, a thread allocates twice the size of the machine's level-3 caches, hundreds of
//! megabytes on large machines, and keeps them until it ends. Few of their pages are ever touched, so that
//! the memory matters only where address space or commitments are limited (`ulimit -v`). There, the library
//! that allocates it (`private-gemm-x86`, a part of faer) would abort the process. Therefore the system is
//! asked for the same amount before.

use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::Result;
use crate::exec::memory::probe;
use crate::exec::parallel::Strategy;
use crate::exec::process_lock::ProcessLock;

/// Largest number of multiplications of a product that needs no such memory.
const SMALL: usize = 16 * 16 * 16;

/// Order of the product that makes a thread allocate.
const ORDER: usize = 24;

/// Memory for rounding of sizes and for the allocator.
const MARGIN: usize = 1 << 20;

thread_local! {
    static IS_PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Allocates the memory for products within a decomposition or product of the given `sides`, on this thread
/// or, under [`Strategy::Together`], on all threads of the pool. Does nothing for small products.
///
/// # Errors
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub(crate) fn prepare_products(sides: [usize; 3], strategy: Strategy) -> Result<()> {
    if sides.iter().fold(1usize, |product, side| product.saturating_mul(*side)) <= SMALL {
        return Ok(());
    }
    match strategy {
        Strategy::Alone => prepare_thread(),
        Strategy::Together => rayon::broadcast(|_| prepare_thread()).into_iter().collect(),
    }
}

fn prepare_thread() -> Result<()> {
    // One thread at a time: otherwise two could be promised the same memory.
    static TURN: ProcessLock = ProcessLock::new();
    if IS_PREPARED.get() {
        return Ok(());
    }
    let _turn = TURN.lock();
    probe(size() + MARGIN, "products of matrices on a thread")?;
    multiply::<f64>();
    multiply::<f32>();
    IS_PREPARED.set(true);
    Ok(())
}

/// Makes this thread allocate the memory for products.
fn multiply<T: faer::traits::ComplexField + Copy>() {
    let (factor, mut out) = ([T::zero_impl(); ORDER * ORDER], [T::zero_impl(); ORDER * ORDER]);
    let factor = MatRef::from_column_major_slice(&factor, ORDER, ORDER);
    let out = MatMut::from_column_major_slice_mut(&mut out, ORDER, ORDER);
    matmul(out, Accum::Replace, factor, factor, T::one_impl(), Par::Seq);
}

/// Returns the size of the memory in bytes. It is computed once; a lock around the computation could be
/// inherited by a forked process.
fn size() -> usize {
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    let known = SIZE.load(Ordering::Relaxed);
    if known > 0 {
        return known;
    }
    let size = computed_size();
    SIZE.store(size, Ordering::Relaxed);
    size
}

/// Computes the size by the formula of the library, from the files of Linux that describe caches.
fn computed_size() -> usize {
    /// Estimate for machines that do not describe their caches.
    const UNKNOWN: usize = 128 << 20;
    let caches = [1, 2, 3].map(|level| cache(level, Path::new("/sys/devices/system/cpu")));
    let [Some(l1), Some(l2), l3] = caches else { return 2 * UNKNOWN };
    let of_core = |cache: &Cache| cache.bytes / cache.threads * l1.threads;
    let l3 = l3.map_or(0, |l3| of_core(&l3) * num_cpus::get_physical());
    let l2 = of_core(&l2).max(256 << 10).max(4 * of_core(&l1).max(32 << 10));
    2 * l3.max(2 << 20).max(4 * l2)
}

/// A cache, and the number of hardware threads that share it.
struct Cache {
    bytes: usize,
    threads: usize,
}

/// Returns the largest data cache of a level, per hardware thread.
fn cache(level: usize, cpus: &Path) -> Option<Cache> {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let caches = entries(cpus).flat_map(|cpu| entries(&cpu.join("cache")));
    let found = caches.filter_map(|folder| {
        let text = |name| std::fs::read_to_string(folder.join(name)).map(|text| text.trim().to_owned()).ok();
        let matches = text("level")? == level.to_string() && text("type")? != "Instruction";
        let size = text("size").filter(|_| matches)?;
        let unit = size.trim_start_matches(|c: char| c.is_ascii_digit());
        let number: usize = size.strip_suffix(unit)?.parse().ok()?;
        let bytes = number << (10 * ["", "K", "M", "G"].iter().position(|name| *name == unit)?);
        let number = |text: &str| text.parse::<usize>().ok();
        let ranges = text("shared_cpu_list")?;
        let threads = ranges.split(',').map(|range| match range.split_once('-') {
            Some((first, last)) => Some(number(last)? + 1 - number(first)?),
            None => Some(1),
        });
        Some(Cache { bytes, threads: threads.sum::<Option<usize>>().filter(|n| *n > 0)? })
    });
    found.max_by_key(|cache| cache.bytes / cache.threads)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn address_space() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').next().unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Returns the memory that products allocate on a new thread.
    fn allocated() -> usize {
        let measured = || {
            let before = address_space();
            multiply::<f64>();
            multiply::<f32>();
            address_space().abs_diff(before)
        };
        std::thread::spawn(measured).join().unwrap()
    }

    /// Fails if the library changes its formula.
    #[test]
    fn a_thread_allocates_the_expected_memory() {
        // Other tests allocate at the same time: one of several measurements must match.
        let found: Vec<usize> = (0..20).map(|_| allocated()).collect();
        assert!(found.iter().any(|bytes| bytes.abs_diff(size()) <= MARGIN), "{found:?}, expected {}", size());
    }
}
