"""A model as its folder on the gateway's host describes it: what text is, and how long a sequence may be. O(bytes of
the tokenizer). Knows no replica.
"""

from __future__ import annotations

import time

from llmscale.fleet_file import ModelEntry
from llmscale.gateway.config import ServedModel
from llmscale.models.fingerprint import tokenizer_digest
from llmscale.models.locate import locate_model
from llmscale.models.registry import describe_model
from llmscale.tokenizer import Tokenizer


def load_model(name: str, entry: ModelEntry) -> ServedModel:
    """A model as its folder on this host describes it. Raises `ModelError` and `ConfigError`."""
    folder = locate_model(entry.model)
    spec = describe_model(folder).spec
    return ServedModel(
        name=name,
        tokenizer=Tokenizer(folder, vocabulary=spec.vocabulary),
        vocabulary=spec.vocabulary,
        max_sequence_tokens=spec.sequence_limit(entry.max_model_len),
        created=int(time.time()),
        tokenizer_digest=tokenizer_digest(folder).hex(),
    )
