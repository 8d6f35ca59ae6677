"""Mistral 7B and its relatives (MistralForCausalLM).

Source: Jiang et al. 2023 (arXiv 2310.06825). A Llama with a sliding window in every layer; later releases have none.
It does not know tensor names.
"""

from __future__ import annotations

from llmscale.models import config
from llmscale.models.config import ConfigFields
from llmscale.models.decoder import DecoderTraits, decoder_spec
from llmscale.models.spec import ModelSpec


def spec(fields: ConfigFields) -> ModelSpec:
    """The spec for a Mistral config. A null `sliding_window` means full attention."""
    window = fields.integer("sliding_window", 2, config.MAX_POSITIONS) if fields.present("sliding_window") else None
    layers = fields.integer("num_hidden_layers", 1, config.MAX_LAYERS)
    return decoder_spec(
        fields,
        DecoderTraits("MistralForCausalLM", window_tokens=window, windowed_layers=frozenset(range(layers))),
    )
