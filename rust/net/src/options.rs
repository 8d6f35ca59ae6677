//! The limits of an endpoint, in one frozen struct that is checked once.
//! Times are microseconds and reach libzmq rounded up to its milliseconds. Memory that an admitted peer can make
//! this process hold is at most `max_receive_queue_frames` frames of `2 * max_frame_bytes`; `control` and `bulk` are
//! the two shapes a fleet uses. libzmq counts whole messages only: a peer that never ends one of many parts is not
//! bounded, so admit no key that is not trusted that far. It does not know addresses or keys.

use llmscale_types::LimitError;

/// Largest frame that any configuration may allow.
pub const MAX_FRAME_BYTES: u64 = 1 << 30;
/// Longest time that libzmq's heartbeat field can carry (tenths of a second in 16 bits).
const MAX_TIME_US: u64 = 6_553_599_000;

/// Limits of an endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointOptions {
    /// Largest part of a message. A received part above it is dropped and counted; a connection that announces a
    /// part above twice this size is cut by libzmq before any memory is taken.
    pub max_frame_bytes: u64,
    /// Most parts of a message: a payload and its attachments.
    pub max_parts: u32,
    /// Messages that wait for a peer before `send` says full; per peer.
    pub max_send_queue_frames: u32,
    /// Messages of a peer that wait for the owner before the peer is held back; per peer.
    pub max_receive_queue_frames: u32,
    /// How long a connection may take to prove its key.
    pub max_handshake_us: u64,
    /// How often a silent connection is asked for a sign of life.
    pub heartbeat_us: u64,
    /// How long a connection may stay silent before it is cut. One frame must pass within this time.
    pub max_silence_us: u64,
    /// How long one attempt to connect may take.
    pub max_connect_us: u64,
    /// First pause between attempts to connect; it doubles.
    pub min_reconnect_us: u64,
    /// Longest pause between attempts to connect.
    pub max_reconnect_us: u64,
    /// Silence after which the kernel probes a TCP connection.
    pub keepalive_idle_us: u64,
    /// Pause between the kernel's probes.
    pub keepalive_interval_us: u64,
    /// Probes without an answer before the kernel gives the connection up.
    pub max_keepalive_probes: u32,
    /// Connections that may wait to be accepted.
    pub max_waiting_connections: u32,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        Self {
            max_frame_bytes: llmscale_types::frame::MAX_FRAME_BYTES,
            max_parts: 16,
            max_send_queue_frames: 256,
            max_receive_queue_frames: 256,
            max_handshake_us: 5_000_000,
            heartbeat_us: 1_000_000,
            max_silence_us: 10_000_000,
            max_connect_us: 5_000_000,
            min_reconnect_us: 50_000,
            max_reconnect_us: 2_000_000,
            keepalive_idle_us: 30_000_000,
            keepalive_interval_us: 10_000_000,
            max_keepalive_probes: 3,
            max_waiting_connections: 1024,
        }
    }
}

impl EndpointOptions {
    /// Most frames that any queue may hold.
    pub const MAX_QUEUE_FRAMES: u32 = 1 << 20;

    /// Many small messages: requests, credits, outputs.
    pub fn control() -> Self {
        Self {
            max_frame_bytes: 1 << 20,
            max_send_queue_frames: 4096,
            max_receive_queue_frames: 4096,
            ..Self::default()
        }
    }

    /// Few large ones: blocks and snapshots.
    pub fn bulk() -> Self {
        Self { max_send_queue_frames: 16, max_receive_queue_frames: 16, ..Self::default() }
    }

    /// Every limit within its bounds.
    pub fn validate(&self) -> Result<(), LimitError> {
        let range = |field, given: u64, low, high| {
            LimitError::at_least(field, given, low).and_then(|()| LimitError::at_most(field, given, high))
        };
        range("max_frame_bytes", self.max_frame_bytes, 64, MAX_FRAME_BYTES)?;
        range("max_parts", u64::from(self.max_parts), 1, 1024)?;
        let most = u64::from(Self::MAX_QUEUE_FRAMES);
        range("max_send_queue_frames", u64::from(self.max_send_queue_frames), 1, most)?;
        range("max_receive_queue_frames", u64::from(self.max_receive_queue_frames), 1, most)?;
        range("max_handshake_us", self.max_handshake_us, 1000, MAX_TIME_US)?;
        range("heartbeat_us", self.heartbeat_us, 1000, MAX_TIME_US)?;
        // A limit below the question's own period would cut every idle connection.
        range("max_silence_us", self.max_silence_us, self.heartbeat_us, MAX_TIME_US)?;
        range("max_connect_us", self.max_connect_us, 1000, MAX_TIME_US)?;
        range("min_reconnect_us", self.min_reconnect_us, 1000, MAX_TIME_US)?;
        range("max_reconnect_us", self.max_reconnect_us, self.min_reconnect_us, MAX_TIME_US)?;
        range("keepalive_idle_us", self.keepalive_idle_us, 1_000_000, MAX_TIME_US)?;
        range("keepalive_interval_us", self.keepalive_interval_us, 1_000_000, MAX_TIME_US)?;
        range("max_keepalive_probes", u64::from(self.max_keepalive_probes), 1, 100)?;
        range("max_waiting_connections", u64::from(self.max_waiting_connections), 1, 65_535)
    }

    /// Size above which libzmq itself cuts the connection. A part between the two limits is read whole, so that the
    /// peer can be named and told; CURVE adds 33 bytes to each.
    pub(crate) const fn hard_limit_bytes(&self) -> i64 {
        self.max_frame_bytes as i64 * 2 + 64
    }
}

/// Milliseconds, rounded up: a deadline is never met early, and a short time never becomes none.
pub(crate) const fn to_ms(time_us: u64) -> i32 {
    let time_ms = time_us.div_ceil(1000);
    if time_ms > i32::MAX as u64 { i32::MAX } else { time_ms as i32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_given_shapes_are_valid() {
        for options in [EndpointOptions::default(), EndpointOptions::control(), EndpointOptions::bulk()] {
            assert_eq!(options.validate(), Ok(()));
        }
    }

    #[test]
    fn a_limit_out_of_bounds_is_named_with_its_value() {
        let check = |change: fn(&mut EndpointOptions)| {
            let mut options = EndpointOptions::default();
            change(&mut options);
            options.validate().expect_err("out of bounds").to_string()
        };
        assert!(check(|options| options.max_frame_bytes = 63).contains("max_frame_bytes is 63"));
        assert!(check(|options| options.max_frame_bytes = u64::MAX).contains("the limit is 1073741824"));
        assert!(check(|options| options.max_silence_us = 999_999).contains("max_silence_us is 999999"));
        assert!(check(|options| options.max_reconnect_us = 49_999).contains("max_reconnect_us is 49999"));
        assert!(check(|options| options.max_send_queue_frames = 0).contains("max_send_queue_frames is 0"));
    }

    #[test]
    fn a_time_is_rounded_up_to_milliseconds() {
        assert_eq!([0, 1, 999, 1000, 1001].map(to_ms), [0, 1, 1, 1, 2]);
        assert_eq!(to_ms(u64::MAX), i32::MAX);
    }
}
