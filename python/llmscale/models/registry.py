"""Which architectures there are: the name in config.json and the module that reads it, one line each.

A new architecture is one file with a function `spec(fields) -> ModelSpec` and one line here. Modules are imported when
a folder asks for them. It does not know what an architecture consists of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from llmscale.end_tokens import folder_end_token_ids
from llmscale.errors import UnsupportedModel
from llmscale.models.config import ConfigFields, GenerationDefaults, read_config, read_generation_defaults
from llmscale.models.folder import ModelFolder
from llmscale.models.quantization import read_quantization, requested_quantization
from llmscale.models.spec import ModelSpec

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llmscale.models.llama",
    "MistralForCausalLM": "llmscale.models.mistral",
    "Qwen2ForCausalLM": "llmscale.models.qwen2",
    "Qwen3ForCausalLM": "llmscale.models.qwen3",
}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a folder says about its model, before any weight is read."""

    folder: ModelFolder
    spec: ModelSpec
    defaults: GenerationDefaults

    def end_token_ids(self) -> tuple[int, ...]:
        """The ids at which an engine ends a sequence: the configs' and the tokenizer's own, whose files are read for
        it. Raises InvalidTokenizer for malformed ones."""
        found = folder_end_token_ids(self.defaults.eos_token_ids, self.folder.path)
        # The tokenizer of another model is refused where text is made; an id that cannot come ends nothing.
        return tuple(token for token in found if token < self.spec.vocabulary)


def describe_model(path: str | Path, quantization: str | None = None) -> ModelDescription:
    """Reads config.json and generation_config.json of a model folder. `quantization` asks for dense weights to be
    quantized while they are loaded, by a name of `models/quantization.py`.

    Raises InvalidCheckpoint for malformed files, UnsupportedModel for what is not implemented, and ConfigError for a
    quantization that contradicts the checkpoint.
    """
    folder = ModelFolder(path)
    fields = read_config(folder)
    found = requested_quantization(quantization, read_quantization(fields))
    spec = replace(spec_for(fields), quantization=found)
    return ModelDescription(folder, spec, read_generation_defaults(folder, fields, spec.vocabulary))


def spec_for(fields: ConfigFields) -> ModelSpec:
    """The spec of a config, made by its architecture's module."""
    names = fields.texts("architectures")
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        shown = ", ".join(names[:4]) or "none"
        raise UnsupportedModel(
            f"{fields.source}: architectures is {shown}; expected one of {', '.join(sorted(ARCHITECTURES))}."
        )
    spec = import_module(ARCHITECTURES[names[0]]).spec(fields)
    assert isinstance(spec, ModelSpec)
    return spec
