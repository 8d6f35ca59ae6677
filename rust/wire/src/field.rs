//! What a field of a message is: how it is written, read, and how few bytes it takes. The last is what keeps decoding
//! from allocating: a column is reserved only after the bytes for that many elements were found to be there.
//! Knows nothing of messages; `record!`, `open_record!` and `codes!` make the fields that are built from fields.

use crate::error::WireError;
use crate::reader::Reader;
use crate::writer::Writer;
use llmscale_types::{
    Attempt, BlockId, DiskBlockId, Duration, Epoch, GroupId, HostBlockId, NodeId, PrefixKey, RequestId, Slot, StepId,
};

/// A value with one place in a message.
pub(crate) trait Field: Sized {
    /// The fewest bytes that a value takes.
    const LEAST_BYTES: usize;
    /// Appends the value.
    fn write(&self, output: &mut Writer<'_>);
    /// Takes the value.
    fn read(input: &mut Reader<'_>) -> Result<Self, WireError>;
}

macro_rules! unsigned {
    ($($type:ty),+) => {
        $(impl Field for $type {
            const LEAST_BYTES: usize = 1;

            fn write(&self, output: &mut Writer<'_>) {
                output.unsigned(u64::from(*self));
            }

            fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
                Ok(input.unsigned_to(u64::from(<$type>::MAX))? as $type)
            }
        })+
    };
}

unsigned!(u8, u32, u64);

macro_rules! newtype {
    ($($type:ident),+) => {
        $(impl Field for $type {
            const LEAST_BYTES: usize = 1;

            fn write(&self, output: &mut Writer<'_>) {
                self.0.write(output);
            }

            fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
                Field::read(input).map(Self)
            }
        })+
    };
}

newtype!(
    Attempt,
    BlockId,
    DiskBlockId,
    Duration,
    Epoch,
    GroupId,
    HostBlockId,
    NodeId,
    PrefixKey,
    RequestId,
    Slot,
    StepId
);

impl Field for bool {
    const LEAST_BYTES: usize = 1;

    fn write(&self, output: &mut Writer<'_>) {
        output.bool(*self);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        input.bool()
    }
}

impl Field for f32 {
    const LEAST_BYTES: usize = 5;

    fn write(&self, output: &mut Writer<'_>) {
        output.float(*self);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        input.float()
    }
}

impl Field for String {
    const LEAST_BYTES: usize = 1;

    fn write(&self, output: &mut Writer<'_>) {
        output.text(self);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        input.text().map(Self::from)
    }
}

impl Field for [u8; 32] {
    const LEAST_BYTES: usize = 34;

    fn write(&self, output: &mut Writer<'_>) {
        output.binary(self);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let at = input.at();
        input.binary()?.try_into().map_err(|_| WireError::Unexpected { at, expected: "32 raw bytes" })
    }
}

impl<T: Field> Field for Option<T> {
    const LEAST_BYTES: usize = 1;

    fn write(&self, output: &mut Writer<'_>) {
        match self {
            Some(value) => value.write(output),
            None => output.nil(),
        }
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        if input.take_nil()? { Ok(None) } else { T::read(input).map(Some) }
    }
}

impl<T: Field> Field for Vec<T> {
    const LEAST_BYTES: usize = 1;

    fn write(&self, output: &mut Writer<'_>) {
        output.array(self.len());
        for value in self {
            value.write(output);
        }
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let at = input.at();
        let count = input.array()?;
        let least = count as u64 * T::LEAST_BYTES as u64;
        if least > input.remaining() as u64 {
            return Err(WireError::LengthBeyondFrame { at, given: least, remaining: input.remaining() });
        }
        let mut values = Self::with_capacity(count);
        for _ in 0..count {
            values.push(T::read(input)?);
        }
        Ok(values)
    }
}

impl<A: Field, B: Field> Field for (A, B) {
    const LEAST_BYTES: usize = 1 + A::LEAST_BYTES + B::LEAST_BYTES;

    fn write(&self, output: &mut Writer<'_>) {
        output.array(2);
        self.0.write(output);
        self.1.write(output);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        input.record("a pair", 2)?;
        Ok((A::read(input)?, B::read(input)?))
    }
}

/// A struct as an array of its fields, in the order named here.
macro_rules! record {
    ($name:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        impl crate::field::Field for $name {
            const LEAST_BYTES: usize = 1 $(+ <$type as crate::field::Field>::LEAST_BYTES)+;

            fn write(&self, output: &mut crate::writer::Writer<'_>) {
                output.array([$(stringify!($field)),+].len());
                $(crate::field::Field::write(&self.$field, output);)+
            }

            fn read(input: &mut crate::reader::Reader<'_>) -> Result<Self, crate::error::WireError> {
                input.record(stringify!($name), [$(stringify!($field)),+].len())?;
                Ok(Self { $($field: <$type as crate::field::Field>::read(input)?),+ })
            }
        }
    };
}

/// Like `record!`, for the handshake: fields that a later version added at the end are passed over.
macro_rules! open_record {
    ($name:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        impl crate::field::Field for $name {
            const LEAST_BYTES: usize = 1 $(+ <$type as crate::field::Field>::LEAST_BYTES)+;

            fn write(&self, output: &mut crate::writer::Writer<'_>) {
                output.array([$(stringify!($field)),+].len());
                $(crate::field::Field::write(&self.$field, output);)+
            }

            fn read(input: &mut crate::reader::Reader<'_>) -> Result<Self, crate::error::WireError> {
                let surplus = input.open_record(stringify!($name), [$(stringify!($field)),+].len())?;
                let record = Self { $($field: <$type as crate::field::Field>::read(input)?),+ };
                input.skip(surplus)?;
                Ok(record)
            }
        }
    };
}

/// A plain enum as a small number. The numbers are part of the protocol: never change one, only add.
macro_rules! codes {
    ($name:ident { $($variant:ident = $code:literal),+ $(,)? }) => {
        impl crate::field::Field for $name {
            const LEAST_BYTES: usize = 1;

            fn write(&self, output: &mut crate::writer::Writer<'_>) {
                output.unsigned(match self { $(Self::$variant => $code),+ });
            }

            fn read(input: &mut crate::reader::Reader<'_>) -> Result<Self, crate::error::WireError> {
                match input.unsigned()? {
                    $($code => Ok(Self::$variant),)+
                    given => Err(crate::error::WireError::UnknownCode { what: stringify!($name), given }),
                }
            }
        }
    };
}

pub(crate) use {codes, open_record, record};
