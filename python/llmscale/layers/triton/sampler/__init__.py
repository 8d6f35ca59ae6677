"""The batched sampler on Triton: the tokens of the CPU sampler (`rust/kernels/src/sampler.rs`) from equal logits."""
