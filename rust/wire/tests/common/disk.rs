//! What engines and workers say of the disk tier, with any numbers.

use super::{long_number, number};
use llmscale_types::{BlockCopy, CopyDirection, DiskBlockId, DiskDirection, DiskReport, DiskTransfer, Epoch};
use proptest::collection::vec;
use proptest::prelude::*;

pub(crate) fn report() -> impl Strategy<Value = DiskReport> {
    let failed = vec(long_number(), 0..5);
    (long_number(), long_number(), failed, any::<bool>(), number(), long_number(), number()).prop_map(
        |(epoch, through, failed, refused, read_blocks, read_ns, waits)| {
            let epoch = Epoch(epoch);
            DiskReport { epoch, through, failed, refused, read_blocks, read_ns, waits }
        },
    )
}

/// As many transfers as copies, of blocks with the same numbers.
pub(crate) fn transfers_like(copies: &[BlockCopy]) -> Vec<DiskTransfer> {
    let transfer = |copy: &BlockCopy| {
        let out = copy.direction == CopyDirection::Offload;
        let direction = if out { DiskDirection::Write } else { DiskDirection::Read };
        let (host, disk) = (copy.host, DiskBlockId(copy.block.0));
        DiskTransfer { number: copy.tag / 2, direction, host, disk, tag: copy.tag }
    };
    copies.iter().map(transfer).collect()
}
