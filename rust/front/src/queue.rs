//! Requests of one pool that wait for a replica: a line per class, ordered by arrival. A request that comes back from a
//! replica is older than what waits, so it stands at the front of its class again. O(log n) per change.

use llmscale_types::{Class, RequestId, Time};
use std::collections::BTreeSet;

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    lines: [BTreeSet<RequestId>; Class::ALL.len()],
    /// Context tokens of all that wait.
    pub(crate) context_tokens: u64,
    /// Output tokens expected of all that wait.
    pub(crate) output_tokens: u64,
    /// Since when the pool has no replica to wait for.
    pub(crate) alone_since: Option<Time>,
    /// When a replica that is left alone may be tried, while requests wait.
    pub(crate) trial_at: Option<Time>,
}

impl Queue {
    pub(crate) fn insert(&mut self, class: Class, request: RequestId, context_tokens: u64, output_tokens: u64) {
        let new = self.lines[class as usize].insert(request);
        assert!(new, "request {request} waits twice");
        self.context_tokens += context_tokens;
        self.output_tokens += output_tokens;
    }

    pub(crate) fn remove(&mut self, class: Class, request: RequestId, context_tokens: u64, output_tokens: u64) {
        let known = self.lines[class as usize].remove(&request);
        assert!(known, "request {request} does not wait");
        self.context_tokens -= context_tokens;
        self.output_tokens -= output_tokens;
    }

    pub(crate) fn contains(&self, class: Class, request: RequestId) -> bool {
        self.lines[class as usize].contains(&request)
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.iter().map(BTreeSet::len).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lines.iter().all(BTreeSet::is_empty)
    }

    /// The oldest of every class that has one which fits. O(those before it that do not).
    pub(crate) fn heads(&self, fits: impl Fn(RequestId) -> bool) -> impl Iterator<Item = (Class, RequestId)> {
        Class::ALL.into_iter().filter_map(move |class| {
            let first = self.lines[class as usize].iter().copied().find(|&id| fits(id))?;
            Some((class, first))
        })
    }

    /// All that wait, most urgent class first.
    pub(crate) fn all(&self) -> impl Iterator<Item = RequestId> {
        self.lines.iter().flatten().copied()
    }
}
