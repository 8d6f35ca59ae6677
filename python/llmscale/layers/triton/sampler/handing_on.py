"""Ids that were just drawn become token ids of the next step, without the processor between.

A step that is packed while the one before it runs names, for each decode row, the row there that samples its id. A
program per sequence, which reads two words and writes one. It does not know who packs.
"""

import triton
import triton.language as tl


@triton.jit
def hand_on_kernel(drawn_from, drawn_tokens, token_ids):
    """Grid (S). `drawn_from` int32 [S]: 0, or one more than a row of `drawn_tokens`, whose id goes to `token_ids`."""
    row = tl.program_id(0)
    place = tl.load(drawn_from + row)
    if place > 0:
        tl.store(token_ids + row, tl.load(drawn_tokens + place - 1))
