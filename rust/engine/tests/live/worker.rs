//! A worker process, played by a thread with the hash worker as its model.

use llmscale_net::link::socket::SocketWorker;
use llmscale_net::link::{LinkError, WorkerSide};
use llmscale_net::{Address, AllowList, Context, EndpointOptions};
use llmscale_sim::{HashWorker, StepFailure};
use llmscale_types::{Delta, Epoch, RowError, StepId, StepResult};
use llmscale_wire::{
    CodecLimits, Configure, Failed, FailureCode, FromWorker, NeedSnapshot, Ready, ToWorker, decode, encode,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// When a worker that lives on gives up a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lapses {
    Never,
    /// In every fiftieth step it finds its mirror void, or the step raises.
    Now,
    /// Never, but every row of it is not a number.
    Broken,
    /// It says twice that it is ready.
    ReadyTwice,
    /// After its steps it says that it has failed, and lives on like a process that cannot be killed.
    Lingers,
}

/// A worker process played by a thread: it dies when told to, or after a number of steps.
pub(crate) struct Worker {
    die: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Worker {
    pub(crate) fn start(address: &Address, epoch: Epoch, steps: u64, lapses: Lapses) -> Self {
        let die = Arc::new(AtomicBool::new(false));
        let (address, told) = (address.clone(), Arc::clone(&die));
        let thread = std::thread::spawn(move || work(&address, epoch, steps, lapses, &told));
        Self { die, thread }
    }

    /// Whether it has died of itself.
    pub(crate) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    pub(crate) fn kill(self) {
        self.die.store(true, Ordering::Release);
        self.thread.join().expect("the worker's thread ends quietly");
    }
}

fn work(address: &Address, epoch: Epoch, max_steps: u64, lapses: Lapses, told: &AtomicBool) {
    let context = Context::new(AllowList::default(), 1).unwrap();
    let mut link = SocketWorker::connect(&context, address, None, &EndpointOptions::default()).unwrap();
    let codec = CodecLimits::default();
    let (mut worker, mut steps) = (None, 0);
    while !told.load(Ordering::Acquire) && steps < max_steps {
        let frame = match link.receive(5_000) {
            Ok(Some(frame)) => frame,
            Ok(None) => continue,
            Err(LinkError::Down) => return,
            Err(error) => panic!("{error}"),
        };
        let order = decode::<ToWorker>(&frame, &codec).unwrap_or_else(|error| panic!("{error} in {frame:?}"));
        let answer = match order {
            ToWorker::Configure(Configure { limits, .. }) => {
                worker = Some(HashWorker::new(&limits, epoch));
                let numerics = "hash".to_owned();
                FromWorker::Ready(Ready {
                    epoch,
                    pid: 7,
                    total_blocks: limits.total_blocks,
                    layers: 1,
                    numerics,
                    loading_ns: 1,
                    host_memory: 0,
                    disk_files: 0,
                })
            }
            ToWorker::Step(delta) => {
                steps += 1;
                let lapse = lapses == Lapses::Now && steps % 50 == 0;
                match compute(worker.as_mut().unwrap(), &delta, lapse, steps % 100 == 0) {
                    Some(FromWorker::Result(result)) if lapses == Lapses::Broken => FromWorker::Result(spoiled(result)),
                    Some(answer) => answer,
                    None => continue,
                }
            }
            ToWorker::Stop => return,
        };
        let answer = match answer {
            FromWorker::Result(_) if lapses == Lapses::Lingers && steps == max_steps => {
                failed(epoch, None, "it lingers")
            }
            answer => answer,
        };
        if lapses == Lapses::ReadyTwice && matches!(answer, FromWorker::Ready(_)) {
            let _ = link.send(encode(&answer, &codec).unwrap());
        }
        // The engine may be gone by now: then the next receive says so.
        let _ = link.send(encode(&answer, &codec).unwrap());
    }
    while lapses == Lapses::Lingers && !told.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
}

fn failed(epoch: Epoch, step: Option<StepId>, message: &str) -> FromWorker {
    FromWorker::Failed(Failed { epoch, step, code: FailureCode::Step, message: message.to_owned() })
}

/// As a model's whose weights are broken.
fn spoiled(result: StepResult) -> StepResult {
    let errors = result.slots.iter().map(|&slot| (slot, RowError::NotANumber)).collect();
    StepResult { slots: Vec::new(), tokens: Vec::new(), errors, ..result }
}

/// What a worker says about a step; nothing, if it passes it over.
fn compute(worker: &mut HashWorker, delta: &Delta, lapse: bool, raises: bool) -> Option<FromWorker> {
    if worker.passes_over(delta) {
        return None;
    }
    if lapse && !raises {
        worker.lose_mirror();
    }
    Some(match worker.run(delta, 1_000) {
        Ok(_) if lapse && raises => {
            worker.lose_mirror();
            failed(delta.epoch, Some(delta.step), "it raised")
        }
        Ok(result) => FromWorker::Result(result),
        Err(StepFailure::Gap(gap)) => FromWorker::NeedSnapshot(NeedSnapshot {
            epoch: gap.epoch,
            step: gap.step,
            last: None,
            bad_host_blocks: Vec::new(),
        }),
        Err(StepFailure::BadHostBlocks(_)) => unreachable!("there is no host tier here"),
        Err(StepFailure::Poison) => unreachable!("no token is deadly here"),
    })
}
