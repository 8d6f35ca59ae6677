"""Llama 1, 2, 3 and 3.x (LlamaForCausalLM), and whatever else declares itself as such (TinyLlama, SmolLM, Yi).

Source: Touvron et al. 2023 (arXiv 2302.13971), Grattafiori et al. 2024 (arXiv 2407.21783). Differs from the common
decoder by optional biases only. It does not know tensor names.
"""

from __future__ import annotations

from llmscale.models.config import ConfigFields
from llmscale.models.decoder import DecoderTraits, decoder_spec
from llmscale.models.spec import ModelSpec


def spec(fields: ConfigFields) -> ModelSpec:
    """The spec for a Llama config. `attention_bias` covers all four projections of attention."""
    attention_bias = fields.boolean("attention_bias", default=False)
    return decoder_spec(
        fields,
        DecoderTraits(
            architecture="LlamaForCausalLM",
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=fields.boolean("mlp_bias", default=False),
        ),
    )
