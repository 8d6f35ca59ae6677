//! Memory in huge pages for arrays that are read at random places or again and again: the KV region, packed weights.
//! With 4 KiB pages every head of every block is a page of its own, and attention over 1.5 GB spends most of its time
//! in page walks. Linux grants huge pages on request (`madvise`) and silently keeps small ones where it cannot, so this
//! is a hint; elsewhere it is ordinary memory. A page is made, zeroed, when it is first touched. Small arrays share
//! mappings, so that hundreds of them waste no more than one huge page; a mapping ends with the last of its arrays.
//! Allocation is O(1).
#![expect(unsafe_code, reason = "maps memory and views it as a slice")]

use crate::element::Bf16;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Size of a huge page on x86-64 and on 64-bit ARM with 4 KiB base pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Plain numbers, of which zero bits are one.
pub trait Number: Copy + Send + Sync + 'static {}

impl Number for f32 {}
impl Number for Bf16 {}
impl Number for u32 {}
impl Number for i8 {}

/// Arrays below this share a mapping.
const SHARED_BYTES: usize = 32 << 20;
/// Address space that they share; what nobody has touched takes no memory.
const CHUNK_BYTES: usize = 64 << 20;
/// Where an array begins in it: at a small page, so that no two share a line.
const ALIGNMENT: usize = 4_096;

/// Address space, unmapped with its last user.
#[derive(Debug)]
struct Mapping {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: the mapping is only computed with here; its parts belong to one array each.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Room for so many bytes from the first huge page on, and the address of that.
    fn new(bytes: usize) -> io::Result<(Self, NonNull<u8>)> {
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
        Ok((Self { start: mapping, bytes: mapping_bytes }, start))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with these numbers, and no array of it is left.
        let outcome = unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
        assert_eq!(outcome, 0, "unmapping memory that was mapped");
    }
}

/// The mapping that small arrays are cut from at the moment. Room is handed out once, so it is always zero.
struct Chunk {
    mapping: Weak<Mapping>,
    start: usize,
    used: usize,
}

static OPEN_CHUNK: Mutex<Chunk> = Mutex::new(Chunk { mapping: Weak::new(), start: 0, used: 0 });

/// A part of a shared mapping.
fn cut(bytes: usize) -> io::Result<(Arc<Mapping>, NonNull<u8>)> {
    let mut chunk = OPEN_CHUNK.lock().unwrap_or_else(PoisonError::into_inner);
    let needed = bytes.next_multiple_of(ALIGNMENT);
    let open = chunk.mapping.upgrade().filter(|_| chunk.used + needed <= CHUNK_BYTES);
    let mapping = if let Some(mapping) = open {
        mapping
    } else {
        let (mapping, start) = Mapping::new(CHUNK_BYTES)?;
        let mapping = Arc::new(mapping);
        *chunk = Chunk { mapping: Arc::downgrade(&mapping), start: start.as_ptr() as usize, used: 0 };
        mapping
    };
    let place = (chunk.start + chunk.used) as *mut u8;
    chunk.used += needed;
    Ok((mapping, NonNull::new(place).expect("an address inside the mapping is not null")))
}

/// A zeroed array, large ones from a huge page on.
#[derive(Debug)]
pub struct HugeArray<T> {
    start: NonNull<T>,
    length: usize,
    mapping: Arc<Mapping>,
    owned: PhantomData<T>,
}

// SAFETY: the array owns its memory alone, like a boxed slice; elements are plain numbers.
unsafe impl<T: Number> Send for HugeArray<T> {}
// SAFETY: as above.
unsafe impl<T: Number> Sync for HugeArray<T> {}

impl<T: Number> HugeArray<T> {
    /// Maps room for `length` elements, all zero. Memory is taken when it is touched.
    ///
    /// # Errors
    /// The operating system's, where it refuses the mapping.
    pub fn zeroed(length: usize) -> io::Result<Self> {
        let bytes = length.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize - HUGE_PAGE_BYTES);
        let bytes = bytes.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let (mapping, start) = if bytes < SHARED_BYTES {
            cut(bytes)?
        } else {
            let (mapping, start) = Mapping::new(bytes)?;
            (Arc::new(mapping), start)
        };
        Ok(Self { start: start.cast(), length, mapping, owned: PhantomData })
    }

    /// The pages of the array, which stay mapped as long as that value lives.
    pub fn pages(&self) -> HugePages {
        let bytes = self.length * size_of::<T>();
        HugePages { mapping: Arc::clone(&self.mapping), start: self.start.as_ptr() as usize, bytes }
    }
}

/// The pages of an array, for whoever makes them before they are written.
#[derive(Debug)]
pub struct HugePages {
    mapping: Arc<Mapping>,
    start: usize,
    bytes: usize,
}

impl HugePages {
    /// Has the pages of `bytes` bytes at an offset made, which changes nothing that they hold. False if the system cannot.
    pub fn touch(&self, offset: usize, bytes: usize) -> bool {
        assert!(offset + bytes <= self.bytes, "pages lie inside the array");
        let first = (self.start + offset) / ALIGNMENT * ALIGNMENT;
        let length = self.start + offset + bytes - first;
        debug_assert!(first >= self.mapping.start.as_ptr() as usize);
        // SAFETY: arrays begin with a page, so these are pages of the mapping, which this value keeps; those that are
        // there stay as they are, and others are zeroed by the system as they would be when they are written.
        unsafe { libc::madvise(first as *mut libc::c_void, length, libc::MADV_POPULATE_WRITE) == 0 }
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
    use super::{ALIGNMENT, HUGE_PAGE_BYTES, HugeArray, SHARED_BYTES};
    use crate::element::Bf16;

    #[test]
    fn an_array_is_zeroed_aligned_and_writable_to_its_end() {
        for length in [0, 1, 1000, HUGE_PAGE_BYTES, SHARED_BYTES / 2, SHARED_BYTES / 2 + 3] {
            let mut array = HugeArray::<Bf16>::zeroed(length).unwrap();
            let alignment = if 2 * length < SHARED_BYTES { ALIGNMENT } else { HUGE_PAGE_BYTES };
            assert_eq!(array.as_ptr() as usize % alignment, 0);
            assert_eq!(array.len(), length);
            assert!(array.iter().all(|value| value.0 == 0));
            if let Some(last) = array.last_mut() {
                *last = Bf16(7);
                assert_eq!(array[length - 1], Bf16(7));
            }
        }
    }

    #[test]
    fn small_arrays_lie_apart_and_are_zero_whatever_others_held() {
        let filled = |length: usize, value: u32| {
            let mut array = HugeArray::<u32>::zeroed(length).unwrap();
            assert!(array.iter().all(|value| *value == 0));
            array.fill(value);
            array
        };
        // More than a chunk, in sizes that divide nothing; some end while others live.
        let mut arrays: Vec<_> = (1..60).map(|value| filled(value as usize * 10_007, value)).collect();
        arrays.retain(|array| array[0] % 3 != 0);
        arrays.extend((60..90).map(|value| filled(500_009, value)));
        for array in &arrays {
            assert!(array.iter().all(|value| *value == array[0]));
        }
    }

    #[test]
    fn pages_are_made_ahead_without_a_change_to_what_is_there() {
        let mut array = HugeArray::<u32>::zeroed(3 * HUGE_PAGE_BYTES / 4 + 5).unwrap();
        array.fill(9);
        let pages = array.pages();
        assert!(pages.touch(0, 1) && pages.touch(4_097, HUGE_PAGE_BYTES) && pages.touch(array.len() * 4 - 1, 1));
        assert!(array.iter().all(|value| *value == 9));
        drop(array);
        assert!(pages.touch(0, 8), "the mapping lives as long as its pages are known");
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(HugeArray::<f32>::zeroed(usize::MAX / 2).is_err());
        assert!(HugeArray::<f32>::zeroed(1 << 58).is_err());
    }
}
