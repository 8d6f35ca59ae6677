//! Appends msgpack values to a buffer, each in its shortest form. O(1) per value besides the bytes themselves.
//! Knows nothing of messages or limits.

/// Writes values one after another.
pub(crate) struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self { bytes }
    }

    pub(crate) fn nil(&mut self) {
        self.bytes.push(0xc0);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.bytes.push(if value { 0xc3 } else { 0xc2 });
    }

    #[inline]
    pub(crate) fn unsigned(&mut self, value: u64) {
        if value < 0x80 {
            self.bytes.push(value as u8);
        } else if let Ok(value) = u8::try_from(value) {
            self.bytes.extend_from_slice(&[0xcc, value]);
        } else if let Ok(value) = u16::try_from(value) {
            self.bytes.push(0xcd);
            self.bytes.extend_from_slice(&value.to_be_bytes());
        } else if let Ok(value) = u32::try_from(value) {
            self.bytes.push(0xce);
            self.bytes.extend_from_slice(&value.to_be_bytes());
        } else {
            self.bytes.push(0xcf);
            self.bytes.extend_from_slice(&value.to_be_bytes());
        }
    }

    pub(crate) fn float(&mut self, value: f32) {
        self.bytes.push(0xca);
        self.bytes.extend_from_slice(&value.to_bits().to_be_bytes());
    }

    pub(crate) fn text(&mut self, value: &str) {
        if value.len() < 32 {
            self.bytes.push(0xa0 | value.len() as u8);
        } else {
            self.prefix(value.len(), [Some(0xd9), Some(0xda), Some(0xdb)]);
        }
        self.bytes.extend_from_slice(value.as_bytes());
    }

    pub(crate) fn binary(&mut self, value: &[u8]) {
        self.prefix(value.len(), [Some(0xc4), Some(0xc5), Some(0xc6)]);
        self.bytes.extend_from_slice(value);
    }

    /// The head of an array; its elements follow.
    pub(crate) fn array(&mut self, count: usize) {
        if count < 16 {
            self.bytes.push(0x90 | count as u8);
        } else {
            self.prefix(count, [None, Some(0xdc), Some(0xdd)]);
        }
    }

    /// A length in 8, 16 or 32 bits with the marker of its width.
    fn prefix(&mut self, length: usize, markers: [Option<u8>; 3]) {
        if let (Some(marker), Ok(length)) = (markers[0], u8::try_from(length)) {
            self.bytes.extend_from_slice(&[marker, length]);
        } else if let (Some(marker), Ok(length)) = (markers[1], u16::try_from(length)) {
            self.bytes.push(marker);
            self.bytes.extend_from_slice(&length.to_be_bytes());
        } else {
            let length = u32::try_from(length).expect("bounds are checked before writing");
            self.bytes.push(markers[2].expect("every kind has a 32-bit form"));
            self.bytes.extend_from_slice(&length.to_be_bytes());
        }
    }
}
