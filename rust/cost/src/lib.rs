//! Predicted times in integer nanoseconds, learned from what steps took: `model` fits, `shape` says what a step is made of,
//! `copy` learns what a block takes between tiers.
//! An observation costs a few hundred integer operations, a prediction four. No float and no clock, so equal
//! observations give equal predictions everywhere. Knows nothing of queues, replicas or requests.

mod copy;
mod model;
mod shape;

pub use copy::CopyCost;
pub use model::CostModel;
pub use shape::StepShape;
