"""Reads config.json and generation_config.json with a bound on every field.

`ConfigFields` hands out one typed, bounded field at a time, so that no architecture touches raw JSON and every refusal
names the field, the value and the limit. Both spellings of rotary parameters are understood: `rope_theta` with
`rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). It does not know any architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmscale.errors import InvalidCheckpoint, UnsupportedModel
from llmscale.models.folder import ModelFolder
from llmscale.models.spec import RopeScaling, RopeSpec

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

MAX_HIDDEN_SIZE = 1 << 17
MAX_INNER_SIZE = 1 << 20
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 256
MAX_VOCABULARY = 1 << 22
MAX_POSITIONS = 1 << 24
MAX_EOS_TOKENS = 64
HEAD_DIM_MULTIPLE = 8
"""Kernels read heads in vectors of eight elements, and hold one of up to 256 in registers."""


class ConfigFields:
    """The fields of one JSON object of a model folder. Absent and null mean the same: the default, if there is one."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    def present(self, name: str) -> bool:
        """Whether the field has a value other than null."""
        return self._values.get(name) is not None

    def integer(self, name: str, minimum: int, maximum: int, default: int | None = None) -> int:
        """An integer within `[minimum, maximum]`. Required when there is no default."""
        value = self._value(name, default)
        # bool is an int in Python; `true` heads are a mistake, not one head.
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._out_of_bounds(name, value, f"an integer from {minimum:,} to {maximum:,}")
        return value

    def number(self, name: str, minimum: float, maximum: float, default: float | None = None) -> float:
        """A finite number within `[minimum, maximum]`. Required when there is no default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
            raise self._out_of_bounds(name, value, f"a number from {minimum:g} to {maximum:g}")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._out_of_bounds(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._out_of_bounds(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; absent is empty."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._out_of_bounds(name, value, "a list of strings")
        return tuple(value)

    def token_ids(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """One id or a list of ids of the vocabulary; absent is empty."""
        value = self._values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS_TOKENS:
            raise self._out_of_bounds(name, f"{len(ids)} ids", f"at most {MAX_EOS_TOKENS} ids")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise self._out_of_bounds(name, token, f"an id of the vocabulary, 0 to {vocabulary - 1:,}")
        return tuple(ids)

    def nested(self, name: str) -> ConfigFields | None:
        """A JSON object inside this one, or None if it is absent, null or empty."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._out_of_bounds(name, value, "an object")
        return ConfigFields(value, f"{self.source}: {name}") if value else None

    def objects(self, name: str, maximum: int) -> dict[str, ConfigFields]:
        """A JSON object whose values are objects, at most so many; absent is empty."""
        value = self._values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise self._out_of_bounds(name, value, "an object of objects")
        if len(value) > maximum:
            raise self._out_of_bounds(name, f"{len(value)} objects", f"at most {maximum}")
        return {key: ConfigFields(item, f"{self.source}: {name}: {key[:80]}") for key, item in value.items()}

    def integers(self, name: str, length: int, minimum: int, maximum: int) -> tuple[int, ...] | None:
        """A list of exactly so many integers within `[minimum, maximum]`; None where it is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        expected = f"{length} integers from {minimum:,} to {maximum:,}"
        if not isinstance(value, list) or len(value) != length:
            raise self._out_of_bounds(name, value, expected)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not minimum <= item <= maximum:
                raise self._out_of_bounds(name, value, expected)
        return tuple(value)

    def _value(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise InvalidCheckpoint(f"{self.source} has no field {name!r}, which is needed here.")
        return default

    def _out_of_bounds(self, name: str, value: object, expected: str) -> InvalidCheckpoint:
        shown = repr(value)
        # A hostile config must not put megabytes into a log line.
        shown = shown if len(shown) <= 80 else shown[:80] + "..."
        return InvalidCheckpoint(f"{self.source}: {name} is {shown}, expected {expected}.")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's authors suggest for sampling. None: they say nothing. `eos_token_ids` end a sequence."""

    eos_token_ids: tuple[int, ...] = ()
    greedy: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_config(folder: ModelFolder) -> ConfigFields:
    """The fields of config.json, with what no architecture can serve already refused.

    Raises InvalidCheckpoint if it is missing or malformed, UnsupportedModel if it asks for remote code.
    """
    fields = ConfigFields(folder.json_object(CONFIG_NAME), CONFIG_NAME)
    if fields.present("auto_map"):
        raise UnsupportedModel(
            f"{CONFIG_NAME} has an auto_map: the model wants to run Python code of its own, which is never done. "
            "If the weights fit a supported architecture as it is, remove auto_map from a copy of the folder."
        )
    return fields


def read_generation_defaults(folder: ModelFolder, config: ConfigFields, vocabulary: int) -> GenerationDefaults:
    """generation_config.json, or the end-of-sequence ids of config.json where it is absent or silent on them.

    Raises InvalidCheckpoint for a field outside its bound.
    """
    fallback = config.token_ids("eos_token_id", vocabulary)
    if not folder.has(GENERATION_CONFIG_NAME):
        return GenerationDefaults(eos_token_ids=fallback)
    fields = ConfigFields(folder.json_object(GENERATION_CONFIG_NAME), GENERATION_CONFIG_NAME)

    def number(name: str, minimum: float, maximum: float) -> float | None:
        return fields.number(name, minimum, maximum) if fields.present(name) else None

    return GenerationDefaults(
        eos_token_ids=fields.token_ids("eos_token_id", vocabulary) or fallback,
        greedy=not fields.boolean("do_sample", default=False) if fields.present("do_sample") else None,
        temperature=number("temperature", 0.0, 100.0),
        top_p=number("top_p", 0.0, 1.0),
        top_k=fields.integer("top_k", 0, MAX_VOCABULARY) if fields.present("top_k") else None,
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 1e-3, 1e3),
    )


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The rotary parameters, and how long a sequence may be for them to hold."""

    rope: RopeSpec
    max_tokens: int
    reason: str


def read_rope(fields: ConfigFields) -> RopeConfig:
    """Rotary parameters in either spelling, with the longest sequence that they define.

    The scaled spelling wins over `rope_parameters` as in transformers. Raises UnsupportedModel for kinds that are not
    implemented, InvalidCheckpoint for values outside their bounds.
    """
    positions = fields.integer("max_position_embeddings", 2, MAX_POSITIONS)
    scaling = fields.nested("rope_scaling") or fields.nested("rope_parameters")
    top_theta = fields.number("rope_theta", 1.0, 1e12, 10_000.0)
    partial = fields.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    reason = f"max_position_embeddings in {CONFIG_NAME}"
    if scaling is None:
        _refuse_partial(partial)
        return RopeConfig(RopeSpec(theta=top_theta), positions, reason)
    _refuse_partial(scaling.number("partial_rotary_factor", 0.0, 1.0, partial))
    theta = scaling.number("rope_theta", 1.0, 1e12, top_theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeConfig(RopeSpec(theta=theta), positions, reason)
    if kind == "linear":
        factor = scaling.number("factor", 1.0, 1e4)
        limit = min(int(positions * factor), MAX_POSITIONS)
        return RopeConfig(RopeSpec(theta, RopeScaling.LINEAR, factor), limit, f"{reason} times the linear rope factor")
    if kind == "llama3":
        return RopeConfig(_llama3(scaling, theta, positions), positions, reason)
    if kind == "dynamic":
        # Up to the original length dynamic scaling is no scaling. Beyond it every key would have to be rotated anew
        # whenever the sequence grows, which a KV cache cannot do.
        scaling.number("factor", 1.0, 1e4)
        original = scaling.integer("original_max_position_embeddings", 2, MAX_POSITIONS, positions)
        return RopeConfig(
            RopeSpec(theta=theta), min(positions, original), f"{reason}; dynamic rope scaling is not extended beyond it"
        )
    raise UnsupportedModel(
        f"{scaling.source}: rope type {kind!r} is not implemented. Implemented are default, linear, llama3, and "
        "dynamic up to the original length."
    )


def _llama3(scaling: ConfigFields, theta: float, positions: int) -> RopeSpec:
    low = scaling.number("low_freq_factor", 1e-3, 1e4)
    high = scaling.number("high_freq_factor", 1e-3, 1e4)
    if high <= low:
        raise InvalidCheckpoint(f"{scaling.source}: high_freq_factor is {high:g}, expected more than low ({low:g}).")
    return RopeSpec(
        theta=theta,
        scaling=RopeScaling.LLAMA3,
        factor=scaling.number("factor", 1.0, 1e4),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_tokens=scaling.integer("original_max_position_embeddings", 2, MAX_POSITIONS, positions),
    )


def _refuse_partial(factor: float) -> None:
    if factor != 1.0:
        raise UnsupportedModel(
            f"{CONFIG_NAME}: partial_rotary_factor is {factor:g}; only whole heads are rotated (1.0)."
        )
