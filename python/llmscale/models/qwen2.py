"""Qwen2 and Qwen2.5 (Qwen2ForCausalLM).

Source: Yang et al. 2024 (arXiv 2407.10671). Biases on q, k and v only; small models tie the head. It does not know
tensor names.
"""

from __future__ import annotations

from llmscale.errors import UnsupportedModel
from llmscale.models import config
from llmscale.models.config import ConfigFields
from llmscale.models.decoder import DecoderTraits, decoder_spec
from llmscale.models.spec import ModelSpec


def spec(fields: ConfigFields) -> ModelSpec:
    """The spec for a Qwen2 config."""
    layers = windowed_layers(fields)
    return decoder_spec(
        fields,
        DecoderTraits(
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            window_tokens=window_tokens(fields) if layers else None,
            windowed_layers=layers,
        ),
    )


def window_tokens(fields: ConfigFields) -> int:
    """The size of the sliding window of those layers that have one."""
    return fields.integer("sliding_window", 2, config.MAX_POSITIONS)


def windowed_layers(fields: ConfigFields) -> frozenset[int]:
    """The layers with a sliding window; none unless `use_sliding_window` is true, which few configs say.

    `layer_types` lists each layer's kind; where it is absent, the layers from `max_window_layers` on are windowed.
    """
    if not fields.boolean("use_sliding_window", default=False) or not fields.present("sliding_window"):
        return frozenset()
    layers = fields.integer("num_hidden_layers", 1, config.MAX_LAYERS)
    kinds = fields.texts("layer_types")
    if not kinds:
        return frozenset(range(fields.integer("max_window_layers", 0, config.MAX_LAYERS, 28), layers))
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"{fields.source}: layer_types has {len(kinds)} kinds, expected full_attention or sliding_attention for "
            f"each of the {layers} layers."
        )
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
