//! The envelope `[version, tag, body]` and the two doors of the crate, encode and decode. Both apply the same bounds, so
//! a frame that one side can make is a frame that the other side takes. Linear in the frame.

use crate::bounds::Bounds;
use crate::error::WireError;
use crate::limits::CodecLimits;
use crate::reader::Reader;
use crate::scan::scan;
use crate::version::{HANDSHAKE_VERSION, VERSIONS, VersionRange};
use crate::writer::Writer;

/// All messages of one direction.
pub trait Message: Body {
    /// Whether it is part of a handshake, in which nothing is agreed yet.
    fn is_handshake(&self) -> bool;
}

/// How the messages of a direction are told apart; made by `messages!` only.
pub trait Body: Bounds + Sized {
    /// The message's number and body.
    #[doc(hidden)]
    fn write_body(&self, output: &mut Output<'_>);
    /// The message with this number.
    #[doc(hidden)]
    fn read_body(tag: u64, input: &mut Input<'_>) -> Result<Self, WireError>;
}

/// A writer that only this crate can use, so that only this crate can make messages.
pub struct Output<'a>(pub(crate) Writer<'a>);

/// A reader that only this crate can use.
pub struct Input<'a>(pub(crate) Reader<'a>);

/// The frame of a message between processes of one build, in its newest version.
pub fn encode<M: Message>(message: &M, limits: &CodecLimits) -> Result<Vec<u8>, WireError> {
    encode_at(VERSIONS.high, message, limits)
}

/// The frame of a message in the version that both sides have agreed on. Those of the handshake are always of the first.
pub fn encode_at<M: Message>(version: u8, message: &M, limits: &CodecLimits) -> Result<Vec<u8>, WireError> {
    let mut frame = Vec::new();
    write(version, message, limits, &mut frame)?;
    Ok(frame)
}

/// Like `encode`, into a buffer whose memory is used again. The buffer holds no frame after an error.
pub fn encode_into<M: Message>(message: &M, limits: &CodecLimits, frame: &mut Vec<u8>) -> Result<(), WireError> {
    write(VERSIONS.high, message, limits, frame)
}

fn write<M: Message>(version: u8, message: &M, limits: &CodecLimits, frame: &mut Vec<u8>) -> Result<(), WireError> {
    frame.clear();
    message.check(limits)?;
    let mut output = Output(Writer::new(frame));
    output.0.array(3);
    output.0.unsigned(u64::from(if message.is_handshake() { HANDSHAKE_VERSION } else { version }));
    message.write_body(&mut output);
    if frame.len() > limits.max_frame_bytes {
        let given = frame.len();
        frame.clear();
        return Err(WireError::TooLarge { given, limit: limits.max_frame_bytes });
    }
    Ok(())
}

/// The message of a frame.
pub fn decode<M: Message>(frame: &[u8], limits: &CodecLimits) -> Result<M, WireError> {
    decode_as(VERSIONS, frame, limits)
}

/// The message of a frame, read by somebody who speaks these versions. A handshake is understood whatever they are.
pub fn decode_as<M: Message>(spoken: VersionRange, frame: &[u8], limits: &CodecLimits) -> Result<M, WireError> {
    scan(frame, limits)?;
    let mut input = Input(Reader::new(frame, limits.max_depth));
    input.0.record("a frame", 3)?;
    let version = input.0.unsigned()?;
    // Asked before the body is read: only a handshake may be of a version that is not spoken here.
    if version != u64::from(HANDSHAKE_VERSION) {
        spoken.accept(version)?;
    }
    let tag = input.0.unsigned()?;
    let message = M::read_body(tag, &mut input)?;
    let handshake = VersionRange { low: HANDSHAKE_VERSION, high: HANDSHAKE_VERSION };
    let expected = if message.is_handshake() { handshake } else { spoken };
    expected.accept(version)?;
    message.check(limits)?;
    Ok(message)
}

/// The numbers of a direction's messages, and which of them are the handshake. They are part of the protocol: never
/// change one, only add.
macro_rules! messages {
    ($direction:ident { $($variant:ident = $tag:literal $(($body:ty))?),+ $(,)? } $(handshake $($opening:ident),+)?) => {
        impl crate::frame::Message for $direction {
            fn is_handshake(&self) -> bool {
                false $($(|| matches!(self, Self::$opening(..)))+)?
            }
        }

        impl crate::frame::Body for $direction {
            fn write_body(&self, output: &mut crate::frame::Output<'_>) {
                match self {
                    $(crate::frame::messages!(@pattern $variant, body $(, $body)?) => {
                        output.0.unsigned($tag);
                        crate::frame::messages!(@write output, body $(, $body)?);
                    })+
                }
            }

            fn read_body(tag: u64, input: &mut crate::frame::Input<'_>) -> Result<Self, crate::error::WireError> {
                match tag {
                    $($tag => crate::frame::messages!(@read input, $variant $(, $body)?),)+
                    given => Err(crate::error::WireError::UnknownTag { direction: stringify!($direction), given }),
                }
            }
        }
    };
    (@pattern $variant:ident, $name:ident, $body:ty) => { Self::$variant($name) };
    (@pattern $variant:ident, $name:ident) => { Self::$variant };
    (@write $output:ident, $name:ident, $body:ty) => { crate::field::Field::write($name, &mut $output.0) };
    (@write $output:ident, $name:ident) => { $output.0.array(0) };
    (@read $input:ident, $variant:ident, $body:ty) => {
        <$body as crate::field::Field>::read(&mut $input.0).map(Self::$variant)
    };
    (@read $input:ident, $variant:ident) => {
        $input.0.record(stringify!($variant), 0).map(|()| Self::$variant)
    };
}

pub(crate) use messages;
