//! One connection that is kept from request to request, and as little work per event as possible. It trusts the server's
//! framing: chunks, or a content length.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longer than any answer should take; a server that hangs must not hang the benchmark.
const MAX_SILENCE: Duration = Duration::from_secs(120);

/// Connections that end all at once, also those that wait for a silent server.
#[derive(Default)]
pub struct Cut {
    sockets: Mutex<Vec<TcpStream>>,
    is_made: AtomicBool,
}

impl Cut {
    /// Ends them all, now and for ever.
    pub fn make(&self) {
        self.is_made.store(true, Ordering::SeqCst);
        for socket in self.sockets.lock().expect("no thread panics with it").iter() {
            // One that the server has closed is cut already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    pub fn is_made(&self) -> bool {
        self.is_made.load(Ordering::SeqCst)
    }

    /// Will end this one too; refuses it when it is too late for that.
    fn add(&self, socket: &TcpStream) -> io::Result<()> {
        self.sockets.lock().expect("no thread panics with it").push(socket.try_clone()?);
        if self.is_made() { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

/// To one server, opened when it is needed.
pub struct Connection<'a> {
    address: &'a str,
    cut: Option<&'a Cut>,
    open: Option<BufReader<TcpStream>>,
}

impl<'a> Connection<'a> {
    pub fn new(address: &'a str, cut: Option<&'a Cut>) -> Self {
        Self { address, cut, open: None }
    }

    /// Sends a completion and reads its answer; returns how many tokens the server says it made. `events_us` becomes the
    /// times of events with text, counted from `begin`, also when it fails. Any failure closes the connection.
    pub fn complete(&mut self, body: &str, begin: Instant, events_us: &mut Vec<u128>) -> io::Result<u64> {
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
        if head.is_chunked {
            read_chunks(&mut stream, begin, events_us, &mut text)?;
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
        Ok(tokens)
    }

    /// Writes the request and reads the first line of the answer.
    fn start(&self, kept: Option<BufReader<TcpStream>>, request: &str) -> io::Result<(BufReader<TcpStream>, String)> {
        let mut stream = match kept {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address)?;
                if let Some(cut) = self.cut {
                    cut.add(&stream)?;
                }
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

/// Notes when events with text came; `last` becomes the event with the usage, or with an error.
fn read_chunks(
    stream: &mut impl BufRead,
    begin: Instant,
    events_us: &mut Vec<u128>,
    last: &mut Vec<u8>,
) -> io::Result<()> {
    let (mut line, mut chunk) = (String::new(), Vec::new());
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        chunk.resize(size + 2, 0);
        stream.read_exact(&mut chunk)?;
        if size == 0 {
            return Ok(());
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
    use std::net::TcpListener;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn events_with_text_are_counted_and_the_usage_is_kept() {
        let events = "data: {\"text\":\"a\"}\n\ndata: {\"text\":\"b\"}\n\n";
        let usage = "data: {\"text\":\"\"}\n\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n";
        let body = format!("{:x}\r\n{events}\r\n{:x}\r\n{usage}\r\n0\r\n\r\n", events.len(), usage.len());
        let (mut times, mut last) = (Vec::new(), Vec::new());
        read_chunks(&mut body.as_bytes(), Instant::now(), &mut times, &mut last).expect("whole chunks");
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
    fn a_cut_ends_streams_that_wait_and_keeps_what_came() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let cut = Cut::default();
        let (sent, came) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut socket, _) = listener.accept().expect("a client");
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                socket.write_all(format!("{head}d\r\n{{\"text\":\"a\"}}\r\n").as_bytes()).expect("a client");
                sent.send(()).expect("a waiting test");
                // Silent until the client is gone.
                socket.read_to_end(&mut Vec::new()).expect("the client's end");
            });
            let cut = &cut;
            scope.spawn(move || {
                came.recv().expect("a server");
                cut.make();
            });
            let mut events = Vec::new();
            Connection::new(&address, Some(cut)).complete("{}", Instant::now(), &mut events).expect_err("it was cut");
            assert!(events.len() <= 1);
        });
        assert!(Connection::new(&address, Some(&cut)).complete("{}", Instant::now(), &mut Vec::new()).is_err());
    }

    #[test]
    fn an_error_is_no_usage() {
        assert_eq!(tokens_of("{\"error\":{\"message\":\"no\"}}"), None);
    }
}
