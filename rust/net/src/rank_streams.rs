//! Messages among the ranks that share layers, when they are on several hosts: a TCP stream to each of the others.
//! Every rank makes the same exchanges in the same order and knows how long each message is, so one header of eight bytes
//! is all that is sent besides. The calling thread writes and reads itself, and polls for a while before it sleeps: a sum
//! of one row waits for one way through the network, where gloo hands it through four threads. One exchange costs a
//! write and a few reads per other rank. A rank that is gone or does not come within the time limit is named. Knows
//! nothing of what is exchanged, how streams were opened, or who may open them.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const HEADER_BYTES: usize = 8;
/// A hop between processes of one host takes 15 us, between hosts of one rack 30 to 100; asleep, a core takes 50 longer.
const POLLING: Duration = Duration::from_micros(200);
/// How long to sleep before the time limit is looked at again.
const NAP_MS: i64 = 100;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A stream cannot be used.
    #[error("the stream to rank {rank} failed: {error}")]
    Io {
        /// To whom.
        rank: usize,
        /// What the system says.
        error: std::io::Error,
    },
    /// The other side has closed.
    #[error("rank {rank} has closed its stream")]
    Gone {
        /// Who.
        rank: usize,
    },
    /// A message that was not expected now.
    #[error("rank {rank} is at another exchange: it sent number {number} of {bytes} bytes")]
    Unexpected {
        /// Who.
        rank: usize,
        /// Its count of exchanges.
        number: u32,
        /// Length of its message.
        bytes: u32,
    },
    /// A rank did not come.
    #[error("rank {rank} did not come to the exchange within {:.1} s", .waited.as_secs_f64())]
    Absent {
        /// Who.
        rank: usize,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A message that no header can announce.
    #[error("a message to rank {rank} has {bytes} bytes, the limit is {}", u32::MAX)]
    TooLong {
        /// To whom.
        rank: usize,
        /// Its length.
        bytes: usize,
    },
}

/// One rank's streams to the others.
#[derive(Debug)]
pub struct RankStreams {
    rank: usize,
    /// By rank; none to itself.
    streams: Vec<Option<TcpStream>>,
    /// Number of the next exchange; wraps.
    exchange: u32,
    max_wait: Duration,
}

impl RankStreams {
    /// Takes connected streams, by rank and without one for `rank` itself.
    ///
    /// # Errors
    /// A stream that cannot be prepared.
    ///
    /// # Panics
    /// If streams are not for all ranks but `rank`.
    pub fn new(rank: usize, streams: Vec<Option<TcpStream>>, max_wait: Duration) -> Result<Self, StreamError> {
        for (other, stream) in streams.iter().enumerate() {
            assert_eq!(stream.is_none(), other == rank, "a stream to every other rank, none to this one");
            let Some(stream) = stream else { continue };
            let prepared = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
            prepared.map_err(|error| StreamError::Io { rank: other, error })?;
        }
        assert!(rank < streams.len(), "rank {rank} of {}", streams.len());
        Ok(Self { rank, streams, exchange: 0, max_wait })
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.streams.len()
    }

    /// Which one this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Sends `outgoing[r]` to rank r and fills `incoming[r]` from it; empty messages are not sent, and this rank's own are
    /// left alone. Both sides agree on every length.
    ///
    /// # Errors
    /// A rank that is gone, does not come, or is at another exchange. The streams cannot be used afterwards.
    pub fn exchange(&mut self, outgoing: &[&[u8]], incoming: &mut [&mut [u8]]) -> Result<(), StreamError> {
        assert_eq!((outgoing.len(), incoming.len()), (self.ranks(), self.ranks()), "a message for and of every rank");
        let number = self.exchange;
        self.exchange = number.wrapping_add(1);
        let mut messages = Vec::with_capacity(self.ranks());
        for ((rank, outgoing), incoming) in outgoing.iter().enumerate().zip(incoming) {
            let Some(stream) = &self.streams[rank] else { continue };
            messages.push(Messages::new(rank, stream, number, outgoing, incoming)?);
        }
        let mut polling_since = Instant::now();
        let began = polling_since;
        loop {
            let mut moved = false;
            for message in &mut messages {
                moved |= message.send()?;
                moved |= message.receive()?;
            }
            let Some(late) = messages.iter().find(|message| !message.is_done()) else { return Ok(()) };
            if moved {
                polling_since = Instant::now();
            } else if polling_since.elapsed() > POLLING {
                if began.elapsed() >= self.max_wait {
                    return Err(StreamError::Absent { rank: late.rank, waited: began.elapsed() });
                }
                sleep(&messages);
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

/// One stream's part of one exchange.
struct Messages<'a> {
    rank: usize,
    stream: &'a TcpStream,
    header: [u8; HEADER_BYTES],
    outgoing: &'a [u8],
    sent: usize,
    seen_header: [u8; HEADER_BYTES],
    expected_header: [u8; HEADER_BYTES],
    incoming: &'a mut [u8],
    received: usize,
}

impl<'a> Messages<'a> {
    fn new(
        rank: usize,
        stream: &'a TcpStream,
        number: u32,
        outgoing: &'a [u8],
        incoming: &'a mut [u8],
    ) -> Result<Self, StreamError> {
        Ok(Self {
            rank,
            stream,
            header: header(rank, number, outgoing.len())?,
            outgoing,
            sent: 0,
            seen_header: [0; HEADER_BYTES],
            expected_header: header(rank, number, incoming.len())?,
            incoming,
            received: 0,
        })
    }

    fn has_sent(&self) -> bool {
        self.outgoing.is_empty() || self.sent == HEADER_BYTES + self.outgoing.len()
    }

    fn has_received(&self) -> bool {
        self.incoming.is_empty() || self.received == HEADER_BYTES + self.incoming.len()
    }

    fn is_done(&self) -> bool {
        self.has_sent() && self.has_received()
    }

    /// Whether anything went out.
    fn send(&mut self) -> Result<bool, StreamError> {
        if self.has_sent() {
            return Ok(false);
        }
        let header = &self.header[self.sent.min(HEADER_BYTES)..];
        let body = &self.outgoing[self.sent.saturating_sub(HEADER_BYTES)..];
        let mut stream = self.stream;
        let written = stream.write_vectored(&[IoSlice::new(header), IoSlice::new(body)]);
        let bytes = moved(self.rank, written)?;
        self.sent += bytes;
        Ok(bytes > 0)
    }

    /// Whether anything came.
    fn receive(&mut self) -> Result<bool, StreamError> {
        if self.has_received() {
            return Ok(false);
        }
        let at = self.received;
        let header = &mut self.seen_header[at.min(HEADER_BYTES)..];
        let body = &mut self.incoming[at.saturating_sub(HEADER_BYTES)..];
        let mut stream = self.stream;
        let read = stream.read_vectored(&mut [IoSliceMut::new(header), IoSliceMut::new(body)]);
        let bytes = moved(self.rank, read)?;
        self.received += bytes;
        if at < HEADER_BYTES && self.received >= HEADER_BYTES && self.seen_header != self.expected_header {
            let [n0, n1, n2, n3, b0, b1, b2, b3] = self.seen_header;
            let (number, bytes) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([b0, b1, b2, b3]));
            return Err(StreamError::Unexpected { rank: self.rank, number, bytes });
        }
        Ok(bytes > 0)
    }
}

fn header(rank: usize, number: u32, bytes: usize) -> Result<[u8; HEADER_BYTES], StreamError> {
    let length = u32::try_from(bytes).map_err(|_| StreamError::TooLong { rank, bytes })?;
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&number.to_le_bytes());
    header[4..].copy_from_slice(&length.to_le_bytes());
    Ok(header)
}

/// Bytes that a call moved: none where it would have had to wait.
fn moved(rank: usize, outcome: std::io::Result<usize>) -> Result<usize, StreamError> {
    match outcome {
        Ok(0) => Err(StreamError::Gone { rank }),
        Ok(bytes) => Ok(bytes),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
            Err(StreamError::Gone { rank })
        }
        Err(error) => Err(StreamError::Io { rank, error }),
    }
}

/// Until a stream can go on, or a nap is over.
fn sleep(messages: &[Messages<'_>]) {
    let mut items: Vec<zmq::PollItem<'_>> = messages
        .iter()
        .filter(|message| !message.is_done())
        .map(|message| {
            let mut events = zmq::PollEvents::empty();
            events.set(zmq::POLLOUT, !message.has_sent());
            events.set(zmq::POLLIN, !message.has_received());
            zmq::PollItem::from_fd(message.stream.as_raw_fd(), events)
        })
        .collect();
    // Whatever it says, the streams are tried again, and the time limit is looked at.
    let _ = zmq::poll(&mut items, NAP_MS);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const PATIENCE: Duration = Duration::from_mins(1);

    /// Streams between all ranks, on loopback.
    fn mesh(ranks: usize, max_wait: Duration) -> Vec<RankStreams> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut ends: Vec<Vec<Option<TcpStream>>> = (0..ranks).map(|_| (0..ranks).map(|_| None).collect()).collect();
        for (low, high) in (0..ranks).flat_map(|high| (0..high).map(move |low| (low, high))) {
            ends[high][low] = Some(TcpStream::connect(address).expect("it listens"));
            ends[low][high] = Some(listener.accept().expect("it was called").0);
        }
        let streams = ends.into_iter().enumerate();
        streams.map(|(rank, streams)| RankStreams::new(rank, streams, max_wait).expect("they are open")).collect()
    }

    /// What one rank sends another in an exchange: lengths differ by pair, and some are nothing.
    fn message(from: usize, to: usize, exchange: usize, scale: usize) -> Vec<u8> {
        let length = ((from * 5 + to * 3 + exchange) % 7) * scale;
        (0..length).map(|index| (index * 31 + from * 7 + to + exchange) as u8).collect()
    }

    fn exchanges(mut streams: RankStreams, count: usize, scale: usize) {
        let (rank, ranks) = (streams.rank(), streams.ranks());
        for exchange in 0..count {
            let outgoing: Vec<Vec<u8>> = (0..ranks).map(|to| message(rank, to, exchange, scale)).collect();
            let expected: Vec<Vec<u8>> = (0..ranks).map(|from| message(from, rank, exchange, scale)).collect();
            let mut incoming: Vec<Vec<u8>> = expected.iter().map(|message| vec![0; message.len()]).collect();
            let outgoing: Vec<&[u8]> = outgoing.iter().map(Vec::as_slice).collect();
            let mut places: Vec<&mut [u8]> = incoming.iter_mut().map(Vec::as_mut_slice).collect();
            streams.exchange(&outgoing, &mut places).expect("all ranks come");
            for from in (0..ranks).filter(|&from| from != rank) {
                assert_eq!(incoming[from], expected[from], "exchange {exchange}, {from} to {rank}");
            }
        }
    }

    fn together(streams: Vec<RankStreams>, work: impl Fn(RankStreams) + Sync) {
        std::thread::scope(|scope| {
            for streams in streams {
                let work = &work;
                scope.spawn(move || work(streams));
            }
        });
    }

    #[test]
    fn messages_of_every_length_reach_the_rank_that_they_are_for() {
        for ranks in 2..=4 {
            together(mesh(ranks, PATIENCE), |streams| exchanges(streams, 40, 3));
        }
    }

    #[test]
    fn messages_larger_than_what_the_system_buffers_pass_each_other() {
        together(mesh(3, PATIENCE), |streams| exchanges(streams, 8, 3 << 20));
    }

    #[test]
    fn a_rank_that_comes_late_is_waited_for_by_sleepers() {
        together(mesh(2, PATIENCE), |streams| {
            if streams.rank() == 1 {
                let began = Instant::now();
                while began.elapsed() < 10 * POLLING {
                    std::thread::yield_now();
                }
            }
            exchanges(streams, 3, 100);
        });
    }

    fn one_byte(streams: &mut RankStreams) -> Result<u8, StreamError> {
        let mut seen = [0];
        streams.exchange(&[&[7], &[7]], &mut [&mut [], &mut seen])?;
        Ok(seen[0])
    }

    #[test]
    fn a_rank_that_does_not_come_and_one_that_is_gone_are_named() {
        let mut streams = mesh(2, Duration::from_millis(5));
        let error = one_byte(&mut streams[0]).expect_err("nobody else is there");
        assert!(error.to_string().starts_with("rank 1 did not come to the exchange within"), "{error}");
        let mut streams = mesh(2, PATIENCE);
        drop(streams.pop());
        let error = one_byte(&mut streams[0]).expect_err("the other has left");
        assert!(matches!(error, StreamError::Gone { rank: 1 }), "{error}");
    }

    #[test]
    fn ranks_at_different_exchanges_find_out() {
        let [mut first, mut second] = <[RankStreams; 2]>::try_from(mesh(2, PATIENCE)).expect("two");
        second.exchange = 5;
        second.exchange(&[&[1, 2], &[]], &mut [&mut [], &mut []]).expect("it waits for nothing");
        let error = one_byte(&mut first).expect_err("another exchange");
        assert!(matches!(error, StreamError::Unexpected { rank: 1, number: 5, bytes: 2 }), "{error}");
    }
}
