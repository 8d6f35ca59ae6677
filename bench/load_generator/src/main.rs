//! Loads a server of OpenAI's completions and prints when everything came. Native and on threads, because it shares the
//! machine with what it measures: a client in Python would be the bottleneck of a small model.
//!
//! `llmscale-bench-load-generator address=HOST:PORT model=NAME vocabulary=N seed=N streams=N prompt=TOKENS output=TOKENS
//! requests=N|seconds=N [stream=0] [long=TOKENS long_output=TOKENS]`
//!
//! Every stream is a closed loop of requests of random token ids. With `requests` the run ends after so many of them;
//! with `seconds` it lasts so long after two seconds in which streams start one by one, and a prompt of `long` ids is
//! sent every second of it, whatever became of the ones before; then the streams are cut. The first line of output is
//! `window FROM TO`; then a line per request: `short|long START END TOKENS EVENT...`, where TOKENS is what the server
//! says it made and every EVENT is the arrival of an event with text, or `short|long START END error TEXT`. Times are
//! microseconds on one clock.
#![allow(clippy::print_stdout, reason = "the lines are the result")]

mod client;
mod plan;

use client::{Connection, Cut};
use plan::{Ids, Plan};
use std::error::Error;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const RAMP: Duration = Duration::from_secs(2);
const LONG_EVERY: Duration = Duration::from_secs(1);

/// What the threads of one run share.
struct Run<'a> {
    plan: &'a Plan,
    begin: Instant,
    requests_left: AtomicU64,
    cut: Cut,
    ids: Mutex<Ids>,
    lines: Mutex<Vec<String>>,
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            begin: Instant::now(),
            requests_left: AtomicU64::new(plan.requests.unwrap_or(u64::MAX)),
            cut: Cut::default(),
            ids: Mutex::new(Ids::new(plan.seed, plan.vocabulary)),
            lines: Mutex::new(Vec::new()),
        }
    }

    /// Whether a stream sends another request.
    fn takes_another(&self) -> bool {
        let take = |left: u64| left.checked_sub(1);
        !self.cut.is_made() && self.requests_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// One request and its line.
    fn send(&self, kind: &str, connection: &mut Connection<'_>, prompt_tokens: usize, output_tokens: usize) {
        let ids = self.ids.lock().expect("no thread panics with it").draw(prompt_tokens);
        let body = self.plan.body(&ids, output_tokens);
        let start = self.begin.elapsed().as_micros();
        let mut events_us = Vec::new();
        let made = match connection.complete(&body, self.begin, &mut events_us) {
            // Long prompts are awaited, because their first token may come after the window.
            Err(_) if self.cut.is_made() && kind == "short" => Ok(events_us.len() as u64),
            made => made,
        };
        let result = match made {
            Ok(tokens) => {
                let events: Vec<String> = events_us.iter().map(u128::to_string).collect();
                format!("{tokens} {}", events.join(" "))
            }
            Err(error) => format!("error {}", error.to_string().replace('\n', " ")),
        };
        let end = self.begin.elapsed().as_micros();
        self.lines.lock().expect("no thread panics with it").push(format!("{kind} {start} {end} {result}"));
    }

    /// One stream, after its part of the ramp.
    fn stream(&self, delay: Duration) {
        thread::sleep(delay);
        let mut connection = Connection::new(&self.plan.address, Some(&self.cut));
        while self.takes_another() {
            self.send("short", &mut connection, self.plan.prompt_tokens, self.plan.output_tokens);
        }
    }

    /// Sends long prompts until the time is over, then cuts the streams.
    fn keep_time<'scope>(&'scope self, scope: &'scope thread::Scope<'scope, '_>, from: Instant, to: Instant) {
        let mut due = from;
        while due < to {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if let Some((prompt_tokens, output_tokens)) = self.plan.long {
                scope.spawn(move || {
                    self.send("long", &mut Connection::new(&self.plan.address, None), prompt_tokens, output_tokens);
                });
            }
            due += LONG_EVERY;
        }
        thread::sleep(to.saturating_duration_since(Instant::now()));
        self.cut.make();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let plan = Plan::parse(std::env::args().skip(1))?;
    let run = Run::new(&plan);
    let ramp = if plan.seconds.is_some() { RAMP } else { Duration::ZERO };
    thread::scope(|scope| {
        for stream in 0..plan.streams {
            let delay = ramp * stream / plan.streams;
            scope.spawn({
                let run = &run;
                move || run.stream(delay)
            });
        }
        if let Some(seconds) = plan.seconds {
            let from = run.begin + ramp;
            run.keep_time(scope, from, from + Duration::from_secs(seconds));
        }
    });
    let to = plan.seconds.map_or_else(|| run.begin.elapsed(), |seconds| ramp + Duration::from_secs(seconds));
    println!("window {} {}", ramp.as_micros(), to.as_micros());
    for line in run.lines.lock().expect("no thread panics with it").iter() {
        println!("{line}");
    }
    Ok(())
}
