"""Qwen2 and Qwen2.5 (Qwen2ForCausalLM).

Source: Yang et al. 2024 (arXiv 2407.10671). Biases on q, k and v only, small models tie the head. It does not know tensor
names.
"""

from __future__ import annotations

from llmscale.errors import UnsupportedModel
from llmscale.models import config
from llmscale.models.config import ConfigFields
from llmscale.models.decoder import DecoderTraits, decoder_spec
from llmscale.models.spec import ModelSpec


def spec(fields: ConfigFields) -> ModelSpec:
    """The spec for a Qwen2 config."""
    return decoder_spec(
        fields, DecoderTraits(architecture="Qwen2ForCausalLM", qkv_bias=True, window_tokens=window_tokens(fields))
    )


def window_tokens(fields: ConfigFields) -> int | None:
    """The sliding window, if the config turns it on for at least one layer.

    Qwen configs carry `sliding_window` even where `use_sliding_window` is false. The window applies to the layers from
    `max_window_layers` on, unless `layer_types` lists each layer's kind.
    """
    if not fields.boolean("use_sliding_window", False) or not fields.present("sliding_window"):
        return None
    kinds = fields.texts("layer_types")
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"{fields.source}: layer_types has other kinds than full_attention and sliding_attention."
        )
    if kinds:
        windowed = "sliding_attention" in kinds
    else:
        layers = fields.integer("num_hidden_layers", 1, config.MAX_LAYERS)
        windowed = fields.integer("max_window_layers", 0, config.MAX_LAYERS, 28) < layers
    return fields.integer("sliding_window", 2, config.MAX_POSITIONS) if windowed else None
