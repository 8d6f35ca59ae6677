"""CUDA kernels as Python sees them: loading their images, planning and making launches, packing weights for them.

The kernels themselves are in `cuda/` at the root of the sources. Nothing is imported here, so that a process without a
device pays for nothing; `llmscale.cuda.operators` registers the torch operators when it is imported.
"""
