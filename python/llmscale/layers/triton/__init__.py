"""The operations of a decoder and its sampler as Triton kernels, one file per kernel family."""
