//! Loads a server of OpenAI's completions and prints when everything came. Native and on threads, because it shares the
//! machine with what it measures: a client in Python would be the bottleneck of a small model.
//!
//! `stream-load HOST:PORT MODEL VOCABULARY SEED streams=N prompt=P output=O requests=R|seconds=S [stream=0] [ramp_ms=M]
//! [long=P long_output=O long_every_ms=M]`
//!
//! N streams, each a closed loop of requests of P random token ids for O tokens; with `seconds`, streams start one after
//! the other within `ramp_ms`, and what follows lasts so long; a prompt of `long` ids is sent every `long_every_ms` then.
//! The first line is `window FROM TO`; then a line per request: `short|long START END TOKENS EVENT...`, where TOKENS is
//! what the server says it made, or `error TEXT`. Times are microseconds on one clock. It trusts the server's framing.
//! O(bytes received).
#![allow(clippy::print_stdout, reason = "the lines are the result")]

mod client;
mod plan;

use client::{Connection, Outcome};
use plan::{Ids, Plan};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What the threads of one run share.
struct Run {
    plan: Plan,
    begin: Instant,
    requests_left: AtomicU64,
    stop: AtomicBool,
    ids: Mutex<Ids>,
    lines: Mutex<String>,
}

impl Run {
    fn now_us(&self) -> u128 {
        self.begin.elapsed().as_micros()
    }

    /// Whether a stream sends another request.
    fn takes_another(&self) -> bool {
        let left = self.requests_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        !self.stop.load(Ordering::Relaxed) && left.is_ok()
    }

    fn send(&self, kind: &str, connection: &mut Connection, prompt_tokens: usize, output_tokens: usize) {
        let ids = self.ids.lock().expect("no thread panics with it").draw(prompt_tokens);
        let start = self.now_us();
        let outcome = connection.complete(&self.plan, &ids, output_tokens, self.begin);
        let mut line = format!("{kind} {start} {}", self.now_us());
        match outcome {
            Ok(Outcome { tokens, events_us }) => {
                write!(line, " {tokens}").expect("a string takes everything");
                for event in events_us {
                    write!(line, " {event}").expect("a string takes everything");
                }
            }
            Err(error) => {
                write!(line, " error {}", error.to_string().replace('\n', " ")).expect("a string takes everything");
            }
        }
        line.push('\n');
        self.lines.lock().expect("no thread panics with it").push_str(&line);
    }

    fn stream(&self, delay: Duration) {
        thread::sleep(delay);
        let mut connection = Connection::new(&self.plan.address);
        while self.takes_another() {
            self.send("short", &mut connection, self.plan.prompt_tokens, self.plan.output_tokens);
        }
    }

    /// Sends long prompts until the time is over; each on a connection of its own, however many are under way.
    fn sends_long(&self, scope: &thread::Scope<'_, '_>, this: &'static Self, from: Instant, to: Instant) {
        let _ = scope;
        let mut waiting = Vec::new();
        let mut due = from;
        while due < to {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if let Some(every) = self.plan.long_every {
                waiting.push(thread::spawn(move || {
                    let mut connection = Connection::new(&this.plan.address);
                    this.send("long", &mut connection, this.plan.long_tokens, this.plan.long_output_tokens);
                }));
                due += every;
            } else {
                due = to;
            }
        }
        thread::sleep(to.saturating_duration_since(Instant::now()));
        self.stop.store(true, Ordering::Relaxed);
        for thread in waiting {
            thread.join().expect("a request ends in an outcome");
        }
    }
}
