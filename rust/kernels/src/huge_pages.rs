//! Memory in huge pages for arrays that are read at random places: the KV region, packed weights.
//! With 4 KiB pages every head of every block is a page of its own, and attention over 1.5 GB spends most of its time
//! in page walks. Linux grants huge pages on request (`madvise`) and silently keeps small ones where it cannot, so this
//! is a hint; elsewhere it is ordinary memory. Owns its mapping; allocation is O(1), pages are zeroed at first touch.
#![expect(unsafe_code, reason = "maps memory and views it as a slice")]

use crate::element::Bf16;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use std::io;

/// Size of a huge page on x86-64 and on 64-bit ARM with 4 KiB base pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Plain numbers, of which zero bits are one.
pub trait Number: Copy + Send + Sync + 'static {}

impl Number for f32 {}
impl Number for Bf16 {}
impl Number for u32 {}

/// A zeroed array that starts at a huge page.
#[derive(Debug)]
pub struct HugeArray<T> {
    start: NonNull<T>,
    length: usize,
    mapping: NonNull<libc::c_void>,
    mapping_bytes: usize,
    owned: PhantomData<T>,
}

// SAFETY: the array owns its memory alone, like a boxed slice; elements are plain numbers.
unsafe impl<T: Number> Send for HugeArray<T> {}
// SAFETY: as above.
unsafe impl<T: Number> Sync for HugeArray<T> {}

impl<T: Number> HugeArray<T> {
    /// Maps room for `length` elements, all zero.
    ///
    /// # Errors
    /// The operating system's, where it refuses the mapping.
    pub fn zeroed(length: usize) -> io::Result<Self> {
        let bytes = length.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize - HUGE_PAGE_BYTES);
        let bytes = bytes.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // One page more than needed, so that a huge page boundary lies inside.
        let mapping_bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
        let mapping = unsafe { libc::mmap(core::ptr::null_mut(), mapping_bytes, protection, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = NonNull::new(mapping).expect("a successful mapping is not null");
        let address = mapping.as_ptr() as usize;
        let aligned = mapping.as_ptr().wrapping_byte_add(address.next_multiple_of(HUGE_PAGE_BYTES) - address);
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies inside the fresh mapping. A refusal leaves small pages, which is no error.
        unsafe {
            libc::madvise(aligned, bytes.next_multiple_of(HUGE_PAGE_BYTES), libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(aligned.cast()).expect("an address inside the mapping is not null");
        Ok(Self { start, length, mapping, mapping_bytes, owned: PhantomData })
    }

    /// As [`Self::zeroed`], with all pages there: memory that is not to be had is an error now, and not the end of the
    /// process when it is written. 384 MiB take 54 ms.
    ///
    /// # Errors
    /// The operating system's.
    pub fn populated(length: usize) -> io::Result<Self> {
        let mut array = Self::zeroed(length)?;
        let bytes = length * size_of::<T>();
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the range lies inside the mapping, which nobody else has yet; its contents stay zero.
            let refused = bytes > 0
                && unsafe { libc::madvise(array.start.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) } != 0;
            if !refused {
                return Ok(array);
            }
            let error = io::Error::last_os_error();
            // Linux before 5.14 does not know the advice.
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
        let (start, step) = (array.as_mut_ptr().cast::<u8>(), 4_096);
        for at in (0..bytes).step_by(step) {
            // SAFETY: within the array, whose bytes are zero already; a volatile write makes the page.
            unsafe { start.add(at).write_volatile(0) };
        }
        Ok(array)
    }
}

impl<T> Drop for HugeArray<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `zeroed` with these numbers and nobody else unmaps it.
        let outcome = unsafe { libc::munmap(self.mapping.as_ptr(), self.mapping_bytes) };
        assert_eq!(outcome, 0, "unmapping memory that was mapped");
    }
}

impl<T> Deref for HugeArray<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `length` elements, zeroed or written since; zero bits are a number of every format.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T> DerefMut for HugeArray<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::{HUGE_PAGE_BYTES, HugeArray};
    use crate::element::Bf16;

    #[test]
    fn an_array_is_zeroed_aligned_and_writable_to_its_end() {
        for length in [0, 1, 1000, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 3] {
            let mut array = HugeArray::<Bf16>::zeroed(length).unwrap();
            assert_eq!(array.as_ptr() as usize % HUGE_PAGE_BYTES, 0);
            assert_eq!(array.len(), length);
            assert!(array.iter().all(|value| value.0 == 0));
            if let Some(last) = array.last_mut() {
                *last = Bf16(7);
                assert_eq!(array[length - 1], Bf16(7));
            }
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(HugeArray::<f32>::zeroed(usize::MAX / 2).is_err());
        assert!(HugeArray::<f32>::zeroed(1 << 58).is_err());
    }
}
