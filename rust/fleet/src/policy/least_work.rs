//! The replica that will be done first, by predicted time of everything this front has sent there. Favours fast and empty
//! replicas, hence short queues everywhere; blind to what is in their prefix caches. A stream that goes on takes a replica
//! that computes as the last one did, if one can begin it now, and pays with a longer queue there. Ties go to the lowest
//! number.

use super::{Need, Policy};
use crate::fleet::Fleet;
use llmscale_types::ReplicaId;

/// See the file's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LeastWork;

impl Policy for LeastWork {
    fn choose(&self, fleet: &Fleet, need: &Need) -> Option<ReplicaId> {
        fleet
            .members()
            .filter(|member| need.fits(member))
            .min_by_key(|member| (need.changes_numerics(member), member.remaining_ns(need.now), member.id))
            .map(|member| member.id)
    }
}
