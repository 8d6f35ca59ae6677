//! A fake worker. Its KV memory holds, per position, a hash of all ids up to there; its token is a hash over the KV of all
//! positions, the seed and the position, read through the block table as attention would. A wrong block, a reused block,
//! a missing or foreign id changes the token. Costs O(context) per row; knows nothing of time or transport.

use crate::disk_memory::DiskMemory;
use crate::host_memory::HostMemory;
use llmscale_scheduler::{Gap, Mirror};
use llmscale_types::{Delta, EngineLimits, Epoch, HostBlockId, StepResult, Token};

/// Fixed odd constants of the `SplitMix64` finalizer (Steele, Lea, Flood 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn extend(prefix: u64, token: Token) -> u64 {
    mix(prefix.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(token) + 1))
}

fn attend(sum: u64, position: u64, value: u64) -> u64 {
    sum.wrapping_add(mix(value ^ position.wrapping_mul(0xd6e8_feb8_6659_fd93)))
}

fn choose(sum: u64, seed: u64, choice: u32, vocabulary: u32) -> Token {
    (mix(sum ^ mix(seed) ^ u64::from(choice)) % u64::from(vocabulary)) as Token
}

/// The token that follows `ids`: what every sequence of every simulation must emit.
pub fn hash_token(ids: &[Token], seed: u64, choice: u32, vocabulary: u32) -> Token {
    let (mut prefix, mut sum) = (0, 0);
    for (position, &token) in ids.iter().enumerate() {
        prefix = extend(prefix, token);
        sum = attend(sum, position as u64, prefix);
    }
    choose(sum, seed, choice, vocabulary)
}

/// Why a step has no result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StepFailure {
    /// The delta did not follow. The worker lives and waits for a snapshot.
    Gap(Gap),
    /// Blocks of the host tier did not hold what they should. The worker lives and waits for a snapshot.
    BadHostBlocks(Vec<HostBlockId>),
    /// A row read the deadly token: the worker is gone, and so is its device's memory.
    Poison,
}

/// See the file's header.
#[derive(Debug)]
pub struct HashWorker {
    deadly_token: Option<Token>,
    mirror: Mirror,
    /// Rows of the last step.
    rows: usize,
    kv: Vec<Option<u64>>,
    host: HostMemory,
    disk: DiskMemory,
    /// What copying one block takes.
    copy_ns: u64,
    block_tokens: usize,
    vocabulary: u32,
}

impl HashWorker {
    /// A worker with empty memory.
    pub fn new(limits: &EngineLimits, epoch: Epoch) -> Self {
        Self {
            deadly_token: None,
            mirror: Mirror::new(limits, epoch),
            rows: 0,
            kv: vec![None; limits.total_blocks as usize * limits.block_tokens as usize],
            host: HostMemory::new(limits.host_blocks, 0),
            disk: DiskMemory::new(limits.disk_blocks, 0),
            copy_ns: 2_000,
            block_tokens: limits.block_tokens as usize,
            vocabulary: limits.vocabulary,
        }
    }

    /// A worker that finds this memory, and takes this long for a block.
    #[must_use]
    pub fn with_host(mut self, host: HostMemory, copy_ns: u64) -> Self {
        self.host = host;
        self.copy_ns = copy_ns;
        self
    }

    /// A worker that finds this file.
    #[must_use]
    pub fn with_disk(mut self, disk: DiskMemory) -> Self {
        self.disk = disk;
        self
    }

    /// What outlives it: its host memory and its disk, with what its death cut off there. With the step that it was at,
    /// whose copies are cut off. Says whether a place of the disk is torn.
    pub fn leave(mut self, at_work: Option<&Delta>) -> (HostMemory, DiskMemory, bool) {
        if let Some(delta) = at_work {
            // Copies wait for the transfers that stand in their way.
            self.disk.settle(&delta.copies, &mut self.host);
        }
        let torn = self.disk.tear(&mut self.host);
        if let Some(delta) = at_work {
            self.host.tear(&delta.copies);
        }
        (self.host, self.disk, torn)
    }

    /// The oldest transfer to or from its disk ends.
    pub fn end_transfer(&mut self) {
        self.disk.end_one(&mut self.host);
    }

    /// Its disk.
    pub fn disk(&self) -> &DiskMemory {
        &self.disk
    }

    /// Its disk, for doing harm to it, and for its reports.
    pub fn disk_mut(&mut self) -> &mut DiskMemory {
        &mut self.disk
    }

    /// Which host memory it has found.
    pub fn host_memory(&self) -> u64 {
        self.host.incarnation()
    }

    /// Its host memory, for doing harm to it.
    pub fn host_mut(&mut self) -> &mut HostMemory {
        &mut self.host
    }

    /// The worker dies when it computes this token, as with a request that triggers a bug in a kernel.
    #[must_use]
    pub fn killed_by(mut self, token: Option<Token>) -> Self {
        self.deadly_token = token;
        self
    }

    /// Its mirror is void from now on; its memory stays.
    pub fn lose_mirror(&mut self) {
        self.mirror.lose();
    }

    /// Ids of the rows that ran last.
    pub fn fed(&self) -> &[i32] {
        &self.mirror.buffers().token_ids[..self.rows]
    }

    /// Whether a step is to be passed over, because the worker waits for a snapshot.
    pub fn passes_over(&self, delta: &Delta) -> bool {
        self.mirror.passes_over(delta)
    }

    /// Runs one step. `elapsed_ns` is what the simulation says that it took.
    pub fn run(&mut self, delta: &Delta, elapsed_ns: u64) -> Result<StepResult, StepFailure> {
        let counts = self.mirror.expand(delta).map_err(StepFailure::Gap)?;
        self.disk.settle(&delta.copies, &mut self.host);
        let bad = self.host.copy(&delta.copies, &mut self.kv, self.block_tokens);
        if !bad.is_empty() {
            self.mirror.lose();
            return Err(StepFailure::BadHostBlocks(bad));
        }
        self.disk.ask(&delta.transfers);
        self.rows = counts.rows as usize;
        let buffers = self.mirror.buffers();
        let mut ids = buffers.token_ids[..counts.rows as usize].iter();
        if ids.any(|&id| Some(id as Token) == self.deadly_token) {
            return Err(StepFailure::Poison);
        }
        let mut sums = vec![0_u64; counts.rows as usize];
        for sequence in 0..counts.sequences as usize {
            let first = buffers.query_start[sequence] as usize;
            let last = buffers.query_start[sequence + 1] as usize;
            let table = buffers.table_offsets[sequence] as usize;
            assert_eq!(
                buffers.sequence_lengths[sequence],
                buffers.positions[last - 1] + 1,
                "length of sequence {sequence}"
            );
            for (row, row_sum) in sums.iter_mut().enumerate().take(last).skip(first) {
                let position = buffers.positions[row] as usize;
                let place = |at: usize| {
                    let block = buffers.block_tables[table + at / self.block_tokens] as usize;
                    block * self.block_tokens + at % self.block_tokens
                };
                assert_eq!(place(position), buffers.slot_mapping[row] as usize, "slot mapping of row {row}");
                let prefix =
                    if position == 0 { 0 } else { self.kv[place(position - 1)].expect("the KV before a row is there") };
                self.kv[place(position)] = Some(extend(prefix, buffers.token_ids[row] as Token));
                for at in 0..=position {
                    let value = self.kv[place(at)].expect("all KV of a sequence is there");
                    *row_sum = attend(*row_sum, at as u64, value);
                }
            }
        }
        let slots = self.mirror.sample_slots().to_vec();
        let tokens: Vec<Token> = slots
            .iter()
            .zip(&buffers.sample_rows[..])
            .map(|(&slot, &row)| {
                let sampling = &self.mirror.sampling(slot).sampling;
                choose(sums[row as usize], sampling.seed, sampling.choice, self.vocabulary)
            })
            .collect();
        self.mirror.record(&tokens.iter().map(|&token| Some(token)).collect::<Vec<_>>());
        Ok(StepResult {
            epoch: delta.epoch,
            step: delta.step,
            slots,
            tokens,
            logprobs: Vec::new(),
            errors: Vec::new(),
            elapsed_ns: elapsed_ns + self.copy_ns * delta.copies.len() as u64,
            waited_ns: 0,
            copied_ns: self.copy_ns * delta.copies.len() as u64,
        })
    }
}
