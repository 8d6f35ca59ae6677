"""Bugs that the cases must find: a kernel file, what stands in it, what is planted instead, and where it must show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plant:
    """One change of one line; some case that begins with `cases` must fail then, and does not otherwise."""

    file: str
    old: str
    new: str
    cases: str


PLANTS = {
    "attention_reads_past_the_length": Plant(
        "key_range.py", "present = at < length", "present = at <= length", "attention_decode_24"
    ),
    "a_row_does_not_see_itself": Plant(
        "key_range.py", "at[None, :] <= positions", "at[None, :] < positions", "attention_chunks_96"
    ),
    "the_window_is_one_token_wide_too_much": Plant(
        "key_range.py",
        "positions[:, None] - at[None, :] < window",
        "positions[:, None] - at[None, :] <= window",
        "attention_decode_window_of_one",
    ),
    "sums_are_not_faded_with_the_maximum": Plant(
        "key_range.py", "total * faded + tl.sum", "total + tl.sum", "attention_decode_24"
    ),
    "parts_are_merged_without_their_weights": Plant(
        "decode_attention.py", "weight - tl.max(weight, 0)", "weight - weight", "attention_decode_in_parts_window"
    ),
    "tiles_of_chunks_forget_that_sequences_begin_tiles": Plant(
        "chunk_attention.py",
        "begins = tl.load(query_start + middle) // tile_rows + middle",
        "begins = tl.load(query_start + middle) // tile_rows",
        "attention_chunks_96",
    ),
    "all_rows_are_said_to_see_one_key_more": Plant(
        "chunk_attention.py", "(first + 1) // tile * tile", "tl.cdiv(first + 1, tile) * tile", "attention_chunks_96"
    ),
    "the_rotation_turns_the_other_way": Plant(
        "rotary.py",
        "wide_second * cosine + wide_first * sine",
        "wide_second * cosine - wide_first * sine",
        "attention_decode_24",
    ),
    "values_are_stored_over_keys": Plant(
        "rotary.py", "tl.where(is_rotated, 0, 1)", "tl.where(is_rotated, 0, 0)", "attention_decode_24"
    ),
    "the_stream_is_not_rounded_before_the_norm": Plant(
        "norm.py", "wide = after.to(tl.float32)", "wide = before", "norm_of_72"
    ),
    "the_row_behind_the_named_one_is_handed_on": Plant(
        "sampler/handing_on.py", "drawn_tokens + place - 1", "drawn_tokens + place", "sampling_hands_on"
    ),
    "noise_of_two_words_is_swapped": Plant(
        "sampler/race.py",
        "words0, words1, words2, words3 = random",
        "words1, words0, words2, words3 = random",
        "sampling_plain_b",
    ),
    "ties_at_the_cut_are_all_kept": Plant(
        "sampler/race.py", "& (ids <= last)", "& (ids >= 0)", "sampling_filters_equal"
    ),
    "the_share_of_top_p_is_taken_twice": Plant(
        "sampler/threshold.py",
        "target = tl.maximum(share * total",
        "target = tl.maximum(share * share * total",
        "sampling_filters_equal",
    ),
    "frequency_counts_once": Plant(
        "sampler/scores.py", "frequency * count.to(tl.float32)", "frequency", "sampling_penalties"
    ),
}
