//! A reserve of memory for small allocations that cannot report a lack of memory.
//!
//! The core allocates everything large so that a lack of memory is an error. Texts, jobs of thread pools and
//! the like are allocated by code that aborts the process instead. This module keeps a block of memory that
//! nothing uses. If the system refuses a small request, the block is returned to the system and the request
//! is repeated. [`detached`](crate::detached) then cancels the work and raises `MemoryError`. The pages of
//! the block are never touched: it takes address space, but no physical memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use lorank::process_lock::ProcessLock;
use lorank::{Error, Result};

/// Size of the reserve in bytes. The allocator of glibc returns blocks of more than 32 MiB to the system at
/// once.
const SIZE: usize = 40 << 20;

/// Size in bytes of the largest request that may use the reserve.
const LARGEST: usize = 8 << 20;

/// Memory in bytes for the Python objects of a result.
const OBJECTS: usize = 2 << 20;

/// The memory of the reserve, or null. It is exchanged under [`LOCK`].
static RESERVE: AtomicPtr<u8> = AtomicPtr::new(null_mut());

/// Held while the reserve is acquired or returned to the system.
static LOCK: ProcessLock = ProcessLock::new();

/// Size and alignment of the reserve.
const LAYOUT: Layout = Layout::new::<[u8; SIZE]>();

/// Size of the request for which the reserve was released; 0 while it is held.
static RELEASED_FOR: AtomicUsize = AtomicUsize::new(0);

/// The allocator of the system, with the reserve behind it.
pub struct ReservingAllocator;

// SAFETY: all requests are passed to `System`. Between a refused request and its repetition, only memory that
// nothing refers to is freed. No function unwinds, and the lock does not allocate.
unsafe impl GlobalAlloc for ReservingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller guarantees the conditions of the same function of `System`.
        or_from_reserve(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_from_reserve(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above. A refused request leaves the memory as it was.
        or_from_reserve(size, || unsafe { System.realloc(memory, layout, size) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[inline]
fn or_from_reserve(size: usize, request: impl Fn() -> *mut u8) -> *mut u8 {
    if size > LARGEST {
        // A large request must not take the released reserve.
        return if lacking().is_some() { null_mut() } else { request() };
    }
    let memory = request();
    if memory.is_null() {
        release(size);
        return request();
    }
    memory
}

/// Acquires the reserve, unless it is held.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn hold() -> Result<()> {
    let is_held = {
        let _held = LOCK.lock();
        if RESERVE.load(Ordering::Relaxed).is_null() {
            // SAFETY: the size is not 0.
            RESERVE.store(unsafe { System.alloc(LAYOUT) }, Ordering::Relaxed);
        }
        let is_held = !RESERVE.load(Ordering::Relaxed).is_null();
        if is_held {
            RELEASED_FOR.store(0, Ordering::Relaxed);
        }
        is_held
    };
    // The lock is free: an error allocates.
    if is_held { Ok(()) } else { Err(no_memory(SIZE)) }
}

/// Returns the error for a lack of memory since the latest [`hold`].
pub fn lacking() -> Option<Error> {
    let size = RELEASED_FOR.load(Ordering::Relaxed);
    (size > 0).then(|| no_memory(size))
}

/// Releases the reserve if there is no memory for Python objects, which cannot report it.
pub fn make_room() {
    let mut memory = Vec::<u8>::new();
    // The allocator releases the reserve if need be.
    let _ = memory.try_reserve_exact(OBJECTS);
    drop(std::hint::black_box(memory));
}

#[cold]
fn release(size: usize) {
    // Held until the memory is free: other threads repeat their requests after it.
    let _held = LOCK.lock();
    let memory = RESERVE.swap(null_mut(), Ordering::Relaxed);
    if !memory.is_null() {
        RELEASED_FOR.store(size.max(1), Ordering::Relaxed);
        // SAFETY: `hold` allocated the memory with this layout, and nothing else refers to it.
        unsafe { System.dealloc(memory, LAYOUT) }
    }
}

fn no_memory(bytes: usize) -> Error {
    Error::OutOfMemory { what: "small objects".into(), bytes }
}
