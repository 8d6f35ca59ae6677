//! One connection that is kept from request to request, and as little work per event as possible. It trusts the server's
//! framing: chunks, or a content length.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longer than any answer should take; a server that hangs must not hang the benchmark.
const MAX_SILENCE: Duration = Duration::from_secs(120);

/// What a request brought.
pub struct Answer {
    /// As the server's usage says.
    pub tokens: u64,
    /// When each event with text came.
    pub events_us: Vec<u128>,
}

/// To one server, opened when it is needed.
pub struct Connection<'a> {
    address: &'a str,
    open: Option<BufReader<TcpStream>>,
}

impl<'a> Connection<'a> {
    pub fn new(address: &'a str) -> Self {
        Self { address, open: None }
    }

    /// Sends a completion and reads its answer; times count from `begin`. Any failure closes the connection, and so does
    /// `stop`, which ends a streamed answer at its next event with what has come until then.
    pub fn complete(&mut self, body: &str, begin: Instant, stop: Option<&AtomicBool>) -> io::Result<Answer> {
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        let kept = self.open.take();
        let was_kept = kept.is_some();
        let (mut stream, status) = match self.start(kept, &request) {
            // Servers close a kept connection when they like; the request was not taken then.
            Err(_) if was_kept => self.start(None, &request)?,
            other => other?,
        };
        let head = Head::read(&mut stream)?;
        let mut text = Vec::new();
        let mut events_us = Vec::new();
        if head.is_chunked {
            if !read_chunks(&mut stream, begin, stop, &mut events_us, &mut text)? {
                return Ok(Answer { tokens: events_us.len() as u64, events_us });
            }
        } else {
            text.resize(head.length, 0);
            stream.read_exact(&mut text)?;
            events_us.push(begin.elapsed().as_micros());
        }
        let text = String::from_utf8_lossy(&text);
        let tokens = tokens_of(&text).filter(|_| status.contains(" 200"));
        let tokens = tokens.ok_or_else(|| io::Error::other(format!("{}: {text:.300}", status.trim())))?;
        if !head.closes {
            self.open = Some(stream);
        }
        Ok(Answer { tokens, events_us })
    }

    /// Writes the request and reads the first line of the answer.
    fn start(&self, kept: Option<BufReader<TcpStream>>, request: &str) -> io::Result<(BufReader<TcpStream>, String)> {
        let mut stream = match kept {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(MAX_SILENCE))?;
                BufReader::new(stream)
            }
        };
        stream.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        if stream.read_line(&mut status)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((stream, status))
    }
}

/// What of the header fields matters.
#[derive(Default)]
struct Head {
    length: usize,
    is_chunked: bool,
    closes: bool,
}

impl Head {
    fn read(stream: &mut impl BufRead) -> io::Result<Self> {
        let mut head = Self::default();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line)? == 0 || line == "\r\n" {
                return Ok(head);
            }
            let line = line.to_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                head.length = value.trim().parse().map_err(io::Error::other)?;
            }
            head.is_chunked |= line.starts_with("transfer-encoding:") && line.contains("chunked");
            head.closes |= line.starts_with("connection:") && line.contains("close");
        }
    }
}

/// Notes when events with text came; `last` becomes the event with the usage, or with an error. False if it was stopped.
fn read_chunks(
    stream: &mut impl BufRead,
    begin: Instant,
    stop: Option<&AtomicBool>,
    events_us: &mut Vec<u128>,
    last: &mut Vec<u8>,
) -> io::Result<bool> {
    let (mut line, mut chunk) = (String::new(), Vec::new());
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        chunk.resize(size + 2, 0);
        stream.read_exact(&mut chunk)?;
        if size == 0 {
            return Ok(true);
        }
        if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Ok(false);
        }
        let now = begin.elapsed().as_micros();
        for event in chunk[..size].split(|&byte| byte == b'\n') {
            if has(event, b"\"text\":\"") && !has(event, b"\"text\":\"\"") {
                events_us.push(now);
            }
            if has(event, b"\"completion_tokens\":") || has(event, b"\"error\"") {
                event.clone_into(last);
            }
        }
    }
}

fn has(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// The last usage in a text: completions may hold anything before it.
fn tokens_of(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once("\"completion_tokens\":")?;
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_with_text_are_counted_and_the_usage_is_kept() {
        let events = "data: {\"text\":\"a\"}\n\ndata: {\"text\":\"b\"}\n\n";
        let usage = "data: {\"text\":\"\"}\n\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n";
        let body = format!("{:x}\r\n{events}\r\n{:x}\r\n{usage}\r\n0\r\n\r\n", events.len(), usage.len());
        let (mut times, mut last) = (Vec::new(), Vec::new());
        let mut read = |stop: bool, times: &mut Vec<u128>| {
            read_chunks(&mut body.as_bytes(), Instant::now(), Some(&AtomicBool::new(stop)), times, &mut last)
                .expect("whole chunks")
        };
        assert!(!read(true, &mut times) && times.is_empty());
        assert!(read(false, &mut times));
        assert_eq!(times.len(), 2);
        assert_eq!(tokens_of(&String::from_utf8_lossy(&last)), Some(2));
    }

    #[test]
    fn a_head_says_how_the_body_is_framed() {
        let head = Head::read(&mut &b"Content-Length: 12\r\nConnection: close\r\n\r\nrest"[..]).expect("a whole head");
        assert_eq!((head.length, head.is_chunked, head.closes), (12, false, true));
        assert!(Head::read(&mut &b"Transfer-Encoding: chunked\r\n\r\n"[..]).expect("a whole head").is_chunked);
    }

    #[test]
    fn an_error_is_no_usage() {
        assert_eq!(tokens_of("{\"error\":{\"message\":\"no\"}}"), None);
    }
}
