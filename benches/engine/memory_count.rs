// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counts the bytes that are currently allocated. A global allocator needs `unsafe`.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed unchanged to the system allocator, which fulfils the trait's
// contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the layout is the caller's, for whose validity the trait makes the caller
        // responsible.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from alloc() with this layout, and so from the system allocator.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        LIVE.fetch_add(bytes, Ordering::Relaxed);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as in dealloc(); the caller is responsible for the new size.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

/// Number of bytes that are allocated now, without the allocator's own overhead.
pub fn live_bytes() -> usize {
    LIVE.load(Ordering::Relaxed)
}
