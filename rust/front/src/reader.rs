//! What clients and their readers do: cancel, leave, come back, catch up. Each ends or changes exactly one request; an
//! order for one that has ended already is counted and ignored. O(log n), and O(unread tokens) for a reader who is back.

use crate::delivery::Deliveries;
use crate::event::{EndReason, FrontAction};
use crate::front::Front;
use crate::request::{Place, Reader};
use llmscale_types::{FinishReason, Planted, RequestId, Time};

impl Front {
    /// Ends a request by its client's wish: as stopped when the answer is cut at a token, else as aborted.
    pub(crate) fn cancel(&mut self, id: RequestId, at_token: Option<u32>, out: &mut Vec<FrontAction>) {
        if !self.lives(id) {
            return;
        }
        let reason = if at_token.is_some() { FinishReason::Stop } else { FinishReason::Aborted };
        self.withdraw(id, at_token, out);
        self.finish(id, EndReason::Finished(reason), at_token, out);
    }

    /// The reader is away; tokens are kept for a bounded time.
    pub(crate) fn detach(&mut self, now: Time, id: RequestId, out: &mut Vec<FrontAction>) {
        if !self.lives(id) {
            return;
        }
        let until = now + self.options.limits.max_detached;
        let request = self.request_mut(id);
        // Leaving twice does not buy time.
        if request.reader == Reader::Attached {
            request.reader = Reader::Detached(until);
            self.arm(id);
        }
        if self.options.limits.max_detached.0 == 0 {
            self.cancel(id, None, out);
        }
    }

    /// A reader takes over: it gets what it lacks at once, and the end if the request is over.
    pub(crate) fn attach(&mut self, id: RequestId, from_index: u32, out: &mut Vec<FrontAction>) {
        if !self.lives(id) {
            return;
        }
        let request = self.request_mut(id);
        request.reader = Reader::Attached;
        let from_index = if Planted::TellsReadersTwice.is_here() { 0 } else { from_index.min(request.output_tokens()) };
        request.read(from_index);
        let so_far = request.so_far();
        let mut logprobs = request.logprobs_from(from_index).peekable();
        let mut deliveries = Deliveries::with_capacity((request.output_tokens() - from_index) as usize);
        for (index, &token) in (from_index..).zip(&request.output()[from_index as usize..]) {
            let found = logprobs.next_if(|(at, _)| *at == index).map(|(_, logprobs)| logprobs.clone());
            deliveries.push(id, so_far, index, token, found);
        }
        drop(logprobs);
        let place = request.place;
        if !deliveries.is_empty() {
            out.push(FrontAction::Deliver(deliveries));
        }
        if let Place::Held(reason) = place {
            self.finish(id, reason, None, out);
        } else {
            self.arm(id);
        }
    }

    /// The reader has got tokens for good.
    pub(crate) fn read(&mut self, id: RequestId, up_to_index: u32) {
        if self.lives(id) {
            self.request_mut(id).read(up_to_index);
        }
    }

    fn lives(&mut self, id: RequestId) -> bool {
        let lives = self.requests.contains_key(&id);
        if !lives {
            self.counters.late += 1;
        }
        lives
    }
}
