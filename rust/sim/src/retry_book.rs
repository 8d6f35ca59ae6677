//! The book of one front's retries, kept from what its clients submitted: in no window may requests that failed before be
//! tried again more often than their budget allows. O(what the window holds) per retry. Knows nothing of why they failed.

use llmscale_front::RetryOptions;
use llmscale_types::Time;

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct RetryBook {
    requests: Vec<Time>,
    retries: Vec<Time>,
}

impl RetryBook {
    /// A request was taken.
    pub(crate) fn taken(&mut self, now: Time) {
        self.requests.push(now);
    }

    /// So many retries that need room have been made until now. Panics if there was no room.
    pub(crate) fn retried(&mut self, now: Time, retries: u64, options: &RetryOptions) {
        if self.retries.len() as u64 == retries {
            return;
        }
        self.retries.resize(retries as usize, now);
        let half_us = (options.window.0 / 2).max(1);
        let is_recent = |at: &&Time| at.0 / half_us + 1 >= now.0 / half_us;
        let count = |times: &[Time]| times.iter().rev().take_while(is_recent).count() as u64;
        let most = u64::from(options.least_retries) + count(&self.requests) * u64::from(options.permille) / 1_000;
        let recent = count(&self.retries);
        assert!(recent <= most, "{recent} repeated retries in a window that has room for {most}");
    }
}
