//! What has changed among the named prefixes since somebody last looked, in order, for the routing index of each front.
//! Nothing is kept while nobody listens. O(1) per change. Knows nothing of who is told.

use llmscale_types::{KvEvent, PrefixKey};

/// See the file's header.
#[derive(Debug, Default)]
pub struct Changes {
    wanted: bool,
    events: Vec<KvEvent>,
}

impl Changes {
    /// Begins or ends to keep changes; those that were kept are dropped.
    pub fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
        self.events = Vec::new();
    }

    /// A prefix can be found.
    pub fn stored(&mut self, key: PrefixKey) {
        if !self.wanted {
            return;
        }
        match self.events.last_mut() {
            Some(KvEvent::Stored(keys)) => keys.push(key),
            _ => self.events.push(KvEvent::Stored(vec![key])),
        }
    }

    /// A prefix can be found no longer.
    pub fn removed(&mut self, key: PrefixKey) {
        if !self.wanted {
            return;
        }
        match self.events.last_mut() {
            Some(KvEvent::Removed(keys)) => keys.push(key),
            _ => self.events.push(KvEvent::Removed(vec![key])),
        }
    }

    /// Nothing can be found any more, so what changed before does not matter.
    pub fn cleared(&mut self) {
        if self.wanted {
            self.events.clear();
            self.events.push(KvEvent::Cleared);
        }
    }

    /// Everything since the last call.
    pub fn take(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.events)
    }
}
