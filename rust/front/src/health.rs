//! What the front tells its fleet about how replicas answer, and when it looks again at one that is left alone. A dead node
//! is one failure, whatever it took down; a full one, a recall and a client who leaves are none. O(1) per outcome,
//! O(replicas) for the moment of the next trial. Whom that ejects is the fleet's to say.

use crate::front::Front;
use crate::request::Place;
use crate::timers::Due;
use llmscale_fleet::{PoolId, ReplicaState, Trust};
use llmscale_types::{Duration, ReplicaId, RequestId, Time};

/// The first token of an attempt, with what was predicted for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FirstToken {
    pub(crate) request: RequestId,
    pub(crate) predicted: Duration,
    pub(crate) taken: Duration,
}

impl Front {
    /// First tokens came from a replica.
    pub(crate) fn credit(&mut self, now: Time, replica: ReplicaId, first_tokens: &[FirstToken]) {
        for first in first_tokens {
            self.fleet.answered(now, replica, first.request, first.predicted, first.taken);
            if let Some(pool) = self.fleet.get(replica).map(|member| member.pool) {
                self.observe_lateness(pool, Duration(first.taken.0.saturating_sub(first.predicted.0)));
            }
        }
    }

    /// An attempt is about to end by the fault of the replica that it is on.
    pub(crate) fn blame(&mut self, now: Time, id: RequestId) {
        if let Place::Sent(sent) = self.requests[&id].place {
            self.fleet.failed(now, sent.replica, Some(id));
        }
    }

    /// A replica is gone. One that was draining had said so.
    pub(crate) fn blame_lost(&mut self, now: Time, replica: ReplicaId) {
        let Some(member) = self.fleet.get(replica) else { return };
        if member.state != Some(ReplicaState::Draining) {
            let probe = match member.health.trust() {
                Trust::Probing { request } => Some(request),
                Trust::Trusted | Trust::Ejected { .. } => None,
            };
            self.fleet.failed(now, replica, probe);
        }
    }

    /// While requests wait, the moment is planned at which the next replica that is left alone may be tried.
    pub(crate) fn arm_trial(&mut self, now: Time, pool: PoolId) {
        let waits = !self.queue(pool).is_empty();
        let next = if waits { self.fleet.next_trial(now, pool) } else { None };
        let last = std::mem::replace(&mut self.queue_mut(pool).trial_at, next);
        if last != next {
            if let Some(at) = last {
                self.timers.clear(at, Due::Trial(pool));
            }
            if let Some(at) = next {
                self.timers.set(at, Due::Trial(pool));
            }
        }
    }
}
