"""Choosing codes with texts: a dense model is run block by block, and its weights are quantized for what they meet.

`texts` makes token ids of calibration texts, `dense_block` runs a block in float32, `statistics` keeps what its
products meet, `scaling` and `block` choose scales and codes, `folder` writes the result.
"""
