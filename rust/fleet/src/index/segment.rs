//! A small table from tags to values, in order of the tags: linear probing in which a tag's home grows with the tag, so
//! that a search ends at the first larger tag (Amble and Knuth, "Ordered hash tables", 1974). One word per entry, 7/8 of
//! the words in use before it grows by an eighth; a look-up reads one or two cache lines, a change moves a few words.
//! Knows nothing of keys outside its share, and of values only that they have 20 bits.

use super::holders::Value;

/// Bits of a value.
pub(super) const VALUE_BITS: u32 = 20;
/// Bits below the tag: the value, and whether the entry was used since the hand passed.
const BELOW_TAG: u32 = VALUE_BITS + 1;
/// Bits of a tag.
pub(super) const TAG_BITS: u32 = 64 - BELOW_TAG;
const USED: u64 = 1 << VALUE_BITS;
/// No entry: larger than every tag. Its value is never given out.
const EMPTY: u64 = u64::MAX;
/// Words behind the last home, for what is pushed out of its place. At 7/8 full, one push in some thousand goes further,
/// and makes the segment grow a little early.
const TAIL: usize = 16;
const LEAST_SPAN: usize = 8;

/// Entries whose keys begin alike.
#[derive(Clone, Debug, Default)]
pub(super) struct Segment {
    words: Box<[u64]>,
    entries: u32,
    hand: u32,
}

impl Segment {
    /// How many entries it has.
    pub(super) fn entries(&self) -> usize {
        self.entries as usize
    }

    /// Bytes of its words.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    fn span(&self) -> usize {
        self.words.len().saturating_sub(TAIL)
    }

    /// Where the search for a tag begins. Grows with the tag.
    fn home(span: usize, tag: u64) -> usize {
        (((tag >> (TAG_BITS - 32)) * span as u64) >> 32) as usize
    }

    /// The word at which a search for the tag begins: reading it brings its cache line near.
    pub(super) fn first_word(&self, tag: u64) -> u64 {
        self.words.get(Self::home(self.span(), tag)).copied().unwrap_or(EMPTY)
    }

    /// Room for this many homes, all at once.
    pub(super) fn with_span(span: usize) -> Self {
        Self { words: vec![EMPTY; span + TAIL].into_boxed_slice(), ..Self::default() }
    }

    /// Where the tag is, or where it would have to be.
    pub(super) fn find(&self, tag: u64) -> Result<usize, usize> {
        let mut at = Self::home(self.span(), tag);
        while let Some(&word) = self.words.get(at)
            && word >> BELOW_TAG < tag
        {
            at += 1;
        }
        match self.words.get(at) {
            Some(&word) if word >> BELOW_TAG == tag && word != EMPTY => Ok(at),
            _ => Err(at),
        }
    }

    /// The value of a tag.
    pub(super) fn get(&self, tag: u64) -> Option<Value> {
        self.find(tag).ok().map(|at| value_of(self.words[at]))
    }

    /// The value at a place where `find` has found a tag.
    pub(super) fn value_at(&self, at: usize) -> Value {
        value_of(self.words[at])
    }

    /// Replaces the value at a place where `find` has found a tag, and marks it as used.
    pub(super) fn replace(&mut self, at: usize, value: Value) {
        self.words[at] = word(self.words[at] >> BELOW_TAG, value);
    }

    /// Adds a tag at the place where `find` has missed it. `false` if it does not fit into the words that the segment has.
    pub(super) fn insert_at(&mut self, at: usize, tag: u64, value: Value) -> bool {
        if (self.entries() + 1) * 8 > self.span() * 7 {
            return false;
        }
        let Some(free) = self.words[at..].iter().position(|&word| word == EMPTY) else {
            return false;
        };
        self.words.copy_within(at..at + free, at + 1);
        self.words[at] = word(tag, value);
        self.entries += 1;
        true
    }

    /// Adds a tag that is not there, in as many words as that takes.
    pub(super) fn grow_and_insert(&mut self, tag: u64, value: Value) {
        loop {
            self.grow();
            let at = self.find(tag).expect_err("only what is not there is added");
            if self.insert_at(at, tag, value) {
                return;
            }
        }
    }

    /// Removes what is at a place where `find` has found it. Words behind it that are not at home come one closer.
    pub(super) fn remove_at(&mut self, at: usize) {
        let span = self.span();
        let displaced = |place: usize, word: u64| word != EMPTY && Self::home(span, word >> BELOW_TAG) < place;
        let mut end = at + 1;
        while self.words.get(end).is_some_and(|&word| displaced(end, word)) {
            end += 1;
        }
        self.words.copy_within(at + 1..end, at);
        self.words[end - 1] = EMPTY;
        self.entries -= 1;
    }

    /// Bytes by which `grow` would make it larger.
    pub(super) fn growth_bytes(&self) -> usize {
        (self.grown_span() + TAIL) * size_of::<u64>() - self.bytes()
    }

    fn grown_span(&self) -> usize {
        (self.span() + (self.span() / 8).max(2)).max(LEAST_SPAN)
    }

    /// Makes room for an eighth more.
    pub(super) fn grow(&mut self) {
        self.respace(self.grown_span());
    }

    /// Gives memory back when less than half is in use. Whether it did.
    pub(super) fn shrink(&mut self) -> bool {
        let wanted = (self.entries() * 5 / 4).max(LEAST_SPAN);
        if self.entries == 0 && !self.words.is_empty() {
            *self = Self::default();
            return true;
        }
        self.entries() * 2 < self.span() && wanted < self.span() && {
            self.respace(wanted);
            true
        }
    }

    /// Spreads the entries over another number of homes, or over a few more if the last ones would not fit into the tail.
    fn respace(&mut self, span: usize) {
        let old = std::mem::take(&mut self.words);
        let mut span = span;
        self.words = loop {
            let mut words = vec![EMPTY; span + TAIL].into_boxed_slice();
            let mut next = 0;
            let fits = old.iter().filter(|&&word| word != EMPTY).all(|&word| {
                let at = next.max(Self::home(span, word >> BELOW_TAG));
                next = at + 1;
                words.get_mut(at).map(|place| *place = word).is_some()
            });
            if fits {
                break words;
            }
            span += 2;
        };
        self.hand = 0;
    }

    /// Removes one entry: in order of the tags from where the last search ended, the first that was not used since the hand
    /// passed it. Used ones lose the mark. O(entries) at worst, O(1) on average while few are used between evictions.
    pub(super) fn evict(&mut self) -> Option<Value> {
        if self.entries == 0 {
            return None;
        }
        loop {
            let at = self.hand as usize % self.words.len();
            self.hand = at as u32 + 1;
            let found = self.words[at];
            if found == EMPTY {
                continue;
            }
            if found & USED == 0 {
                self.remove_at(at);
                self.hand = at as u32;
                return Some(value_of(found));
            }
            self.words[at] &= !USED;
        }
    }

    /// Its tags and values, in order of the tags.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, Value)> {
        self.words.iter().filter(|&&word| word != EMPTY).map(|&word| (word >> BELOW_TAG, value_of(word)))
    }

    /// Asserts that every search ends where it should.
    pub(super) fn check(&self) {
        let mut last = None;
        for (at, &word) in self.words.iter().enumerate().filter(|&(_, &word)| word != EMPTY) {
            let tag = word >> BELOW_TAG;
            assert!(last.is_none_or(|last| last < tag), "tags are in order and occur once");
            let home = Self::home(self.span(), tag);
            assert!(home <= at, "an entry lies at or behind its home");
            assert!(self.words[home..at].iter().all(|&word| word != EMPTY), "no hole ends a search too early");
            last = Some(tag);
        }
        assert_eq!(self.iter().count(), self.entries(), "entries are counted");
    }
}

fn word(tag: u64, value: Value) -> u64 {
    tag << BELOW_TAG | USED | u64::from(value.bits())
}

fn value_of(word: u64) -> Value {
    Value::from_bits((word & (USED - 1)) as u32)
}
