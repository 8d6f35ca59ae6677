"""Quantized weights: how checkpoints store them, what they mean, and how products with them are computed.

`layouts` is plain data without torch; one file per method (`int8`, `int4`, `fp8`) has its reference and its product.
"""
