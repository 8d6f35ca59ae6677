//! Predicted times in integer nanoseconds, learned from what steps took: `model` fits, `shape` says what a step is made of.
//! An observation costs a few hundred integer operations, a prediction four. No float and no clock, so equal
//! observations give equal predictions everywhere. Knows nothing of queues, replicas or requests.

mod model;
mod shape;

pub use model::CostModel;
pub use shape::StepShape;
