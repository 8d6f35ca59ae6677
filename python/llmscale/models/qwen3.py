"""Qwen3, the dense models (Qwen3ForCausalLM).

Source: Yang et al. 2025 (arXiv 2505.09388). RMS norms on every query and key head, no biases on q, k and v, and a head
size of its own (128 where the config does not say). It does not know tensor names.
"""

from __future__ import annotations

from llmscale.models.config import ConfigFields
from llmscale.models.decoder import DecoderTraits, decoder_spec
from llmscale.models.qwen2 import window_tokens, windowed_layers
from llmscale.models.spec import ModelSpec


def spec(fields: ConfigFields) -> ModelSpec:
    """The spec for a Qwen3 config."""
    layers = windowed_layers(fields)
    attention_bias = fields.boolean("attention_bias", default=False)
    return decoder_spec(
        fields,
        DecoderTraits(
            architecture="Qwen3ForCausalLM",
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            head_norms=True,
            default_head_dim=128,
            window_tokens=window_tokens(fields) if layers else None,
            windowed_layers=layers,
        ),
    )
