//! Two builds in one fleet: what a process speaks that was started before, during and after an upgrade. The next build
//! speaks one version more; its frames differ in the version that they name, which a process of today refuses to read.
//! A fleet may go back and forth: operators roll back. Decides nothing that the live processes do not.

use crate::around::Around;
use crate::random::Random;
use llmscale_types::Time;
use llmscale_wire::{VERSIONS, VersionRange};

/// What the next build speaks.
pub(crate) const NEXT: VersionRange = VersionRange { low: VERSIONS.low, high: VERSIONS.high + 1 };

/// When a fleet gets another build, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Upgrade {
    /// Processes that start later are of the next build.
    pub at: Time,
    /// Of a thousand of them, this many are of the old one all the same.
    pub rolled_back: u64,
}

impl Upgrade {
    pub(crate) fn draw(random: &mut Random) -> Self {
        Self { at: Time(random.between(0, 1_500_000)), rolled_back: *random.pick(&[0, 0, 300]) }
    }
}

/// What a process speaks that starts now.
pub(crate) fn spoken_by_a_new_process(around: &mut Around) -> VersionRange {
    let Some(upgrade) = around.mix.upgrade.filter(|upgrade| around.now() >= upgrade.at) else { return VERSIONS };
    if around.random.chance(upgrade.rolled_back) { VERSIONS } else { NEXT }
}

/// The name under which a conversation of the next build is counted.
pub(crate) fn agreed(version: u8) -> &'static str {
    if version == NEXT.high { "version_next_agreed" } else { "version_of_today_agreed_by_a_newer_build" }
}
