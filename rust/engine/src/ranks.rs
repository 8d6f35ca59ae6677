//! The links to all ranks of a group as one link: what is sent goes to every rank, what is heard is the leader's word.
//! The group is ready when all are, and what goes wrong at any rank goes wrong for the group. O(ranks) per frame.
//! Knows who leads and nothing of steps; a group of one needs none of this.

use crate::rank_transfers::RankTransfers;
use llmscale_net::PollHandle;
use llmscale_net::link::{LinkError, WorkerLink};
use llmscale_types::Epoch;
use llmscale_wire::{CodecLimits, Failed, FailureCode, FromWorker, Ready, decode, encode};

/// See the file's header.
pub struct RankLinks {
    links: Vec<Box<dyn WorkerLink>>,
    leader: usize,
    codec: CodecLimits,
    epoch: Epoch,
    /// A rank whose link is down; said once, then the link as a whole is.
    down: Option<usize>,
    /// Which ranks have loaded their part.
    ready: Vec<bool>,
    /// The leader's report that it is ready, until all others are.
    held: Option<Ready>,
    /// Which host memories the ranks have found, together.
    host_memory: u64,
    /// And which files of the disk tier.
    disk_files: u64,
    /// How far the ranks are with the disk.
    transfers: RankTransfers,
    /// What the group says next, and last.
    last_word: Option<Vec<u8>>,
}

impl RankLinks {
    /// Joins the links of ranks 0, 1, ... of which one speaks for all.
    pub fn new(links: Vec<Box<dyn WorkerLink>>, leader: usize, epoch: Epoch) -> Self {
        assert!(leader < links.len(), "the leader is one of the ranks");
        let ranks = links.len();
        let ready = vec![false; ranks];
        Self {
            links,
            leader,
            codec: CodecLimits::default(),
            epoch,
            down: None,
            ready,
            held: None,
            host_memory: 0,
            disk_files: 0,
            transfers: RankTransfers::new(ranks),
            last_word: None,
        }
    }

    /// The frame, if the engine should see it.
    fn sort(&mut self, rank: usize, frame: Vec<u8>) -> Option<Vec<u8>> {
        match decode::<FromWorker>(&frame, &self.codec) {
            // Its memories would count twice.
            Ok(FromWorker::Ready(ready)) if self.ready[rank] => {
                Some(self.end_of_group(ready.epoch, &format!("rank {rank} said twice that it is ready")))
            }
            Ok(FromWorker::Ready(ready)) => {
                self.ready[rank] = true;
                // Another memory at any rank is another memory of the group.
                self.host_memory ^= ready.host_memory.rotate_left(rank as u32);
                self.disk_files ^= ready.disk_files.rotate_left(rank as u32);
                if rank == self.leader {
                    self.held = Some(ready);
                }
                None
            }
            // Results come from the leader alone; whatever else a rank says is said by the group.
            Ok(FromWorker::Result(_)) if rank != self.leader => None,
            // The other ranks are in the step that this one gave up: they would meet it in another one, and add up what
            // does not belong together. A snapshot cannot help them, a new group can.
            Ok(FromWorker::NeedSnapshot(need)) if !need.bad_host_blocks.is_empty() => {
                // The engine learns of the blocks first; then the group ends like after any other step that one rank left.
                let why = format!("rank {rank} found bad host blocks at step {}", need.step);
                self.last_word = Some(self.end_of_group(need.epoch, &why));
                Some(frame)
            }
            Ok(FromWorker::NeedSnapshot(gap)) => {
                Some(self.end_of_group(gap.epoch, &format!("rank {rank} lost the order of steps at step {}", gap.step)))
            }
            Ok(FromWorker::Failed(Failed { epoch, step: Some(step), message, .. })) => {
                Some(self.end_of_group(epoch, &format!("step {step} raised on rank {rank}: {message}")))
            }
            // A content is where all ranks have it.
            Ok(FromWorker::Disk(report)) => {
                let report = self.transfers.join(rank, rank == self.leader, report)?;
                Some(encode(&FromWorker::Disk(report), &self.codec).expect("it is as small as those of the ranks"))
            }
            Ok(_) | Err(_) => Some(frame),
        }
    }

    fn end_of_group(&self, epoch: Epoch, message: &str) -> Vec<u8> {
        let message = self.codec.bounded_text(message).to_owned();
        let failed = Failed { epoch, step: None, code: FailureCode::Protocol, message };
        encode(&FromWorker::Failed(failed), &self.codec).expect("a bounded message fits a frame")
    }
}

impl WorkerLink for RankLinks {
    /// A rank that cannot take the frame has fallen behind the others for good, so no frame is given back.
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
        if !self.is_attached() {
            return Err(LinkError::NotAttached(frame));
        }
        for link in &mut self.links {
            link.send(frame.clone()).map_err(|error| match error {
                LinkError::Full(_) | LinkError::NotAttached(_) => LinkError::Down,
                other => other,
            })?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        if let Some(frame) = self.last_word.take() {
            return Ok(Some(frame));
        }
        for rank in 0..self.links.len() {
            loop {
                match self.links[rank].receive() {
                    Ok(None) => break,
                    Ok(Some(frame)) => {
                        if let Some(frame) = self.sort(rank, frame) {
                            return Ok(Some(frame));
                        }
                    }
                    // Said by name first: on which of many hosts to look is what an operator wants to know.
                    Err(LinkError::Down) if self.down.is_none() => {
                        self.down = Some(rank);
                        return Ok(Some(self.end_of_group(self.epoch, &format!("the link of rank {rank} is down"))));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        if !self.ready.iter().all(|&ready| ready) {
            return Ok(None);
        }
        let (host_memory, disk_files) = (self.host_memory, self.disk_files);
        let ready = self.held.take().map(|ready| FromWorker::Ready(Ready { host_memory, disk_files, ..ready }));
        Ok(ready.map(|ready| encode(&ready, &self.codec).expect("it came in a frame")))
    }

    fn is_attached(&self) -> bool {
        self.links.iter().all(|link| link.is_attached())
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.links.len()).filter(|&rank| !self.links[rank].is_attached()).collect()
    }

    fn poll_handle(&self) -> Option<PollHandle<'_>> {
        self.links[self.leader].poll_handle()
    }

    fn poll_handles(&self) -> Vec<PollHandle<'_>> {
        self.links.iter().flat_map(|link| link.poll_handles()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_types::{HostBlockId, StepId, StepResult};
    use llmscale_wire::NeedSnapshot;
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex, MutexGuard};

    #[derive(Default)]
    struct Inner {
        attached: bool,
        full: bool,
        down: bool,
        sent: Vec<Vec<u8>>,
        said: VecDeque<Vec<u8>>,
    }

    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<Inner>>);

    impl Fake {
        fn inner(&self) -> MutexGuard<'_, Inner> {
            self.0.lock().expect("nobody panicked")
        }

        fn say(&self, message: &FromWorker) {
            self.inner().said.push_back(encode(message, &CodecLimits::default()).expect("it is small"));
        }
    }

    impl WorkerLink for Fake {
        fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
            if self.inner().full {
                return Err(LinkError::Full(frame));
            }
            self.inner().sent.push(frame);
            Ok(())
        }

        fn receive(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
            let said = self.inner().said.pop_front();
            if said.is_none() && self.inner().down { Err(LinkError::Down) } else { Ok(said) }
        }

        fn is_attached(&self) -> bool {
            self.inner().attached
        }

        fn poll_handle(&self) -> Option<PollHandle<'_>> {
            None
        }
    }

    fn group(ranks: usize, leader: usize) -> (Vec<Fake>, RankLinks) {
        let fakes: Vec<Fake> = (0..ranks).map(|_| Fake::default()).collect();
        let links = fakes.iter().map(|fake| Box::new(fake.clone()) as Box<dyn WorkerLink>).collect();
        (fakes, RankLinks::new(links, leader, Epoch(1)))
    }

    fn attach(fakes: &[Fake]) {
        for fake in fakes {
            fake.inner().attached = true;
        }
    }

    fn ready(pid: u32) -> FromWorker {
        let numerics = "a".to_owned();
        let (epoch, total_blocks, layers) = (Epoch(1), 9, 1);
        FromWorker::Ready(Ready {
            epoch,
            pid,
            total_blocks,
            layers,
            numerics,
            loading_ns: 1,
            host_memory: 7,
            disk_files: 5,
        })
    }

    fn result(step: u64) -> FromWorker {
        FromWorker::Result(StepResult {
            epoch: Epoch(1),
            step: StepId(step),
            slots: Vec::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            errors: Vec::new(),
            elapsed_ns: 1,
            waited_ns: 0,
            copied_ns: 0,
        })
    }

    fn heard(links: &mut RankLinks) -> Option<FromWorker> {
        links.receive().expect("no link fails").map(|frame| decode(&frame, &CodecLimits::default()).expect("readable"))
    }

    #[test]
    fn the_group_is_attached_and_ready_when_its_last_rank_is() {
        let (fakes, mut links) = group(3, 2);
        for (rank, fake) in fakes.iter().enumerate() {
            assert!(!links.is_attached(), "rank {rank} is missing");
            assert_eq!(links.missing(), (rank..3).collect::<Vec<_>>());
            assert!(matches!(links.send(vec![1]), Err(LinkError::NotAttached(_))));
            fake.inner().attached = true;
        }
        assert_eq!((links.is_attached(), links.missing()), (true, Vec::new()));
        fakes[2].say(&ready(22));
        fakes[0].say(&ready(20));
        assert_eq!(heard(&mut links), None, "rank 1 still loads");
        fakes[1].say(&ready(21));
        let FromWorker::Ready(of_leader) = ready(22) else { unreachable!() };
        let group = Ready { host_memory: 7 ^ (7 << 1) ^ (7 << 2), disk_files: 5 ^ (5 << 1) ^ (5 << 2), ..of_leader };
        assert_eq!(heard(&mut links), Some(FromWorker::Ready(group)), "the leader speaks for all");
        assert_eq!(heard(&mut links), None);
    }

    #[test]
    fn a_rank_that_is_ready_twice_ends_the_group() {
        let (fakes, mut links) = group(2, 0);
        attach(&fakes);
        fakes[1].say(&ready(21));
        fakes[1].say(&ready(21));
        let Some(FromWorker::Failed(failed)) = heard(&mut links) else { panic!("the group ends") };
        assert_eq!((failed.step, failed.message.as_str()), (None, "rank 1 said twice that it is ready"));
    }

    #[test]
    fn frames_go_to_every_rank_and_results_come_from_the_leader() {
        let (fakes, mut links) = group(2, 1);
        attach(&fakes);
        links.send(vec![7]).expect("both read");
        assert!(fakes.iter().all(|fake| fake.inner().sent == [[7]]));
        fakes[0].say(&result(1));
        fakes[1].say(&result(2));
        assert_eq!(heard(&mut links), Some(result(2)));
        assert_eq!(heard(&mut links), None);
    }

    #[test]
    fn a_failure_of_any_rank_is_one_of_the_group() {
        let (fakes, mut links) = group(2, 0);
        attach(&fakes);
        let failed = FromWorker::Failed(Failed {
            epoch: Epoch(1),
            step: None,
            code: FailureCode::Step,
            message: "rank 1: no".to_owned(),
        });
        fakes[1].say(&failed);
        assert_eq!(heard(&mut links), Some(failed));
        fakes[1].inner().full = true;
        assert!(matches!(links.send(vec![1]), Err(LinkError::Down)), "the ranks would differ from now on");
    }

    #[test]
    fn bad_host_blocks_of_a_rank_are_named_before_the_group_ends() {
        let (fakes, mut links) = group(2, 0);
        attach(&fakes);
        let bad_host_blocks = vec![HostBlockId(5)];
        let need =
            FromWorker::NeedSnapshot(NeedSnapshot { epoch: Epoch(3), step: StepId(8), last: None, bad_host_blocks });
        fakes[1].say(&need);
        assert_eq!(heard(&mut links), Some(need));
        let message = "rank 1 found bad host blocks at step 8".to_owned();
        let failed = Failed { epoch: Epoch(3), step: None, code: FailureCode::Protocol, message };
        assert_eq!(heard(&mut links), Some(FromWorker::Failed(failed)));
    }

    #[test]
    fn a_link_that_is_down_is_named_once_and_then_the_group_is() {
        let (fakes, mut links) = group(3, 0);
        attach(&fakes);
        fakes[2].inner().down = true;
        let message = "the link of rank 2 is down".to_owned();
        let failed = Failed { epoch: Epoch(1), step: None, code: FailureCode::Protocol, message };
        assert_eq!(heard(&mut links), Some(FromWorker::Failed(failed)));
        assert!(matches!(links.receive(), Err(LinkError::Down)));
    }

    #[test]
    fn a_rank_that_gave_up_a_step_ends_the_group_because_the_others_are_in_it() {
        let (fakes, mut links) = group(2, 0);
        attach(&fakes);
        let last = Some(StepId(6));
        let need = NeedSnapshot { epoch: Epoch(3), step: StepId(8), last, bad_host_blocks: Vec::new() };
        fakes[1].say(&FromWorker::NeedSnapshot(need));
        let (code, message) = (FailureCode::Step, "no".to_owned());
        fakes[0].say(&FromWorker::Failed(Failed { epoch: Epoch(3), step: Some(StepId(8)), code, message }));
        for said in ["step 8 raised on rank 0: no", "rank 1 lost the order of steps at step 8"] {
            let (code, message) = (FailureCode::Protocol, said.to_owned());
            let failed = Failed { epoch: Epoch(3), step: None, code, message };
            assert_eq!(heard(&mut links), Some(FromWorker::Failed(failed)));
        }
    }
}
