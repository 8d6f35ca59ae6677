//! How a request comes in: checked against the model's and the front's bounds in that order, and either refused with what
//! to do about it, or queued. O(prompt) for the check of its ids, O(log n) for the rest.

use crate::event::{FrontAction, NewRequest, SubmitError};
use crate::front::Front;
use crate::request::Request;
use llmscale_fleet::{Member, Need, PoolId};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Duration, Planted, Refusal, RequestId, Time};
use std::sync::Arc;

/// What a refused client is told to wait where no pool with a ready replica makes the room, so that nothing is predicted.
const RETRY_WITHOUT_REPLICA: Duration = Duration::from_millis(5_000);
/// The least that a refused client is told to wait.
const LEAST_RETRY: Duration = Duration::from_millis(1);

impl Front {
    /// Takes a request, or says why not. Its actions follow as for any event.
    pub fn submit(&mut self, now: Time, new: NewRequest, out: &mut Vec<FrontAction>) -> Result<RequestId, SubmitError> {
        self.fall_due(now, out);
        let pool = match self.admissible(now, &new, out) {
            Ok(pool) => pool,
            Err(error) => {
                self.counters.refused += 1;
                self.settle(now, out);
                return Err(error);
            }
        };
        self.last_request = self.last_request.next();
        let id = self.last_request;
        let expected_tokens = self.usual_output.expect(new.sampling.max_tokens);
        self.requests.insert(id, Request::new(new, pool, now, expected_tokens, &self.options));
        self.counters.submitted += 1;
        self.retry_budget.earn(now, &self.options.retries);
        self.enqueue(id);
        self.settle(now, out);
        Ok(id)
    }

    fn admissible(&mut self, now: Time, new: &NewRequest, out: &mut Vec<FrontAction>) -> Result<PoolId, SubmitError> {
        let pool = self.pool_for(&new.model)?;
        self.fits_model(pool, new)?;
        self.fits_bounds(now, pool, new, out)?;
        Ok(pool)
    }

    fn pool_for(&self, model: &str) -> Result<PoolId, SubmitError> {
        let unavailable = || SubmitError::Unavailable { model: model.to_owned() };
        if self.fleet.pool_count() == 0 {
            return Err(unavailable());
        }
        let pool = self.fleet.serving(model);
        let pool = pool.ok_or_else(|| SubmitError::UnknownModel { model: model.to_owned() })?;
        // Its replicas have been gone, or without a worker, for longer than a request would wait for them.
        let given_up = !self.fleet.has_prospect(pool) && self.queue(pool).alone_since.is_none();
        if given_up { Err(unavailable()) } else { Ok(pool) }
    }

    /// The bounds of the widest replica, as requests may wait for any; of those that are there, if any is.
    fn fits_model(&self, pool: PoolId, new: &NewRequest) -> Result<(), SubmitError> {
        let is_alive = self.fleet.is_alive(pool);
        let members = || self.fleet.pool_members(pool).filter(|member| member.state.is_some() || !is_alive);
        let widest = |bound: fn(&Member) -> u32| members().map(bound).max().unwrap_or(0);
        let vocabulary = widest(|member| member.limits.vocabulary);
        if new.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt.into());
        }
        if let Some(&given) = new.prompt.iter().find(|&&token| token >= vocabulary) {
            return Err(Refusal::UnknownToken { given: u64::from(given), limit: u64::from(vocabulary) }.into());
        }
        new.sampling.check(vocabulary)?;
        let needed = new.prompt.len() as u64 + u64::from(new.sampling.max_tokens);
        let limit = u64::from(widest(|member| member.limits.max_sequence_tokens));
        if needed > limit {
            return Err(Refusal::TooLong { needed, limit }.into());
        }
        Ok(())
    }

    fn fits_bounds(
        &mut self,
        now: Time,
        pool: PoolId,
        new: &NewRequest,
        out: &mut Vec<FrontAction>,
    ) -> Result<(), Refusal> {
        if Planted::QueuesWithoutBound.is_here() {
            return Ok(());
        }
        let (live, most) = (self.requests.len() as u64, u64::from(self.options.limits.max_live_requests));
        if live >= most {
            return Err(self.full(now, live, most, QueueUnit::LiveRequests, 1));
        }
        let prompt_tokens = new.prompt.len() as u64;
        // The queues are bounded together, but what waits for others keeps nobody out who would not wait.
        if self.overfull(prompt_tokens).is_none() || self.starts_at_once(now, pool, new, out) {
            return Ok(());
        }
        match self.overfull(prompt_tokens) {
            Some((queued, limit, unit)) => {
                let asked = if unit == QueueUnit::Tokens { prompt_tokens } else { 1 };
                Err(self.full(now, queued, limit, unit, asked))
            }
            // What waited for the same replicas has gone there.
            None => Ok(()),
        }
    }

    /// What waits, and the bound that it would be above with one more prompt.
    fn overfull(&self, prompt_tokens: u64) -> Option<(u64, u64, QueueUnit)> {
        let limits = &self.options.limits;
        let (queued, most) = (self.queued_requests(), u64::from(limits.max_queued_requests));
        if queued >= most {
            return Some((queued, most, QueueUnit::Requests));
        }
        // A prompt longer than the bound waits alone, or it could never run.
        let tokens = self.queued_tokens();
        let above = queued > 0 && tokens + prompt_tokens > limits.max_queued_tokens;
        above.then_some((tokens, limits.max_queued_tokens, QueueUnit::Tokens))
    }

    /// Whether a new request would be sent before anything else happens. What waits in its pool goes first; whatever is
    /// left there needs a longer sequence than any replica takes now that has room, so nobody is overtaken.
    fn starts_at_once(&mut self, now: Time, pool: PoolId, new: &NewRequest, out: &mut Vec<FrontAction>) -> bool {
        self.fleet.review(now);
        self.place_waiting(now, pool, out);
        let need = Need {
            request: self.last_request.next(),
            pool,
            total_tokens: new.prompt.len() as u64 + u64::from(new.sampling.max_tokens),
            context_tokens: new.prompt.len() as u64,
            output_tokens: u64::from(self.usual_output.expect(new.sampling.max_tokens)),
            prefix: Arc::clone(&new.prefix),
            numerics: None,
            look_ahead: self.options.limits.look_ahead,
            now,
        };
        self.policy.choose(&self.fleet, &need).is_some()
    }

    /// There is room again when all that is above the bound has gone; a prompt longer than the bound waits for all of it.
    fn full(&self, now: Time, queued: u64, limit: u64, unit: QueueUnit, asked: u64) -> Refusal {
        let gone = (queued + asked).saturating_sub(limit).min(queued);
        Refusal::QueueFull { queued, limit, unit, retry_after: self.retry_after(now, gone, unit) }
    }

    /// Requests that wait, all pools together.
    pub(crate) fn queued_requests(&self) -> u64 {
        self.queues.iter().map(|queue| queue.len() as u64).sum()
    }

    /// Context tokens that wait, all pools together.
    pub(crate) fn queued_tokens(&self) -> u64 {
        self.queues.iter().map(|queue| queue.context_tokens).sum()
    }

    /// Predicted time until so many of what is counted have gone: that of the pool which is there first. One that holds
    /// fewer, or has no replica ready, makes no room.
    fn retry_after(&self, now: Time, gone: u64, unit: QueueUnit) -> Duration {
        let pools = (0..self.queues.len() as u32).map(PoolId);
        let first = pools.filter_map(|pool| self.room_ns(now, pool, gone, unit)).min();
        first.map_or(RETRY_WITHOUT_REPLICA, |room_ns| Duration::from_nanos(room_ns).max(LEAST_RETRY))
    }

    /// Predicted time until so many of what is counted have left a pool: `begin + work / replicas * gone / held`, rounded
    /// up, over its ready replicas. `held` is what is counted there: waiting requests, or their tokens, with `work` the time
    /// to compute their prompts and outputs and `begin` the shortest backlog, or requests that live, with `work` also what
    /// the replicas run and `begin` 0.
    fn room_ns(&self, now: Time, pool: PoolId, gone: u64, unit: QueueUnit) -> Option<u64> {
        let queue = self.queue(pool);
        let ready = || self.fleet.pool_members(pool).filter(|member| member.takes_work(now));
        let first = ready().next()?;
        let prompts = u32::try_from(queue.len()).unwrap_or(u32::MAX);
        let prefill_ns = first.prompts_ns(queue.context_tokens, prompts);
        let waiting_ns = prefill_ns.saturating_add(first.decode_ns(queue.output_tokens, first.limits.max_sequences));
        let begin_ns = ready().map(|member| member.backlog_ns(now)).min().unwrap_or(0);
        let (held, work_ns, begin_ns) = match unit {
            QueueUnit::Requests => (u64::from(prompts), waiting_ns, begin_ns),
            QueueUnit::Tokens => (queue.context_tokens, waiting_ns, begin_ns),
            QueueUnit::LiveRequests => {
                let running: u64 = ready().map(|member| u64::from(member.load.sequences)).sum();
                let running_ns = ready().map(|member| member.remaining_ns(now)).fold(waiting_ns, u64::saturating_add);
                (u64::from(prompts) + running, running_ns, 0)
            }
        };
        if held < gone.max(1) {
            return None;
        }
        let share_ns = (u128::from(work_ns) * u128::from(gone)).div_ceil(u128::from(held) * ready().count() as u128);
        // Not above `work_ns`, as no more goes than is held.
        Some(begin_ns.saturating_add(share_ns as u64))
    }
}
