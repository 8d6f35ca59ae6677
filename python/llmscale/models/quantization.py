"""Reads how a checkpoint is quantized from its config, or makes a layout for weights that are quantized while loading.

Understands quantization_config of compressed-tensors, AWQ, GPTQ and FP8 (transformers', vLLM's and DeepSeek's); every
field is bounded, and what would change the arithmetic without being implemented is refused by name. Which weights are
quantized is not read from the config's patterns: the checkpoint's tensors say so. O(fields). It reads no tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from llmscale.errors import ConfigError, UnsupportedModel
from llmscale.models.config import ConfigFields
from llmscale.quant.layouts import (
    MAX_GROUP,
    MIN_GROUP,
    Fp8Layout,
    Fp8Scales,
    Int4Layout,
    Int8Layout,
    Layout,
    Quantization,
    awq_int4,
    compressed_fp8,
    compressed_int4,
    compressed_int8,
    gptq_int4,
)

MAX_CONFIG_GROUPS = 256
MAX_BLOCK = 1 << 14
CONFIG_FIELDS = ("quantization_config", "compression_config")


def read_quantization(fields: ConfigFields) -> Quantization | None:
    """What config.json says, None for a dense checkpoint. Raises UnsupportedModel and InvalidCheckpoint."""
    for name in CONFIG_FIELDS:
        found = fields.nested(name)
        if found is not None:
            method = found.text("quant_method", "unknown")
            if method not in READERS:
                raise UnsupportedModel(
                    f"{found.source}: quant_method is {method[:80]!r}; implemented are {', '.join(sorted(READERS))}."
                    " Use a checkpoint in one of these, or the original one with --quantization."
                )
            return Quantization(READERS[method](found), is_stored=True)
    return None


QUANTIZATIONS: dict[str, Callable[[], Layout]] = {
    "int8": compressed_int8,
    "int4": lambda: compressed_int4(32, symmetric=False),
    "int4-64": lambda: compressed_int4(64, symmetric=False),
    "int4-128": lambda: compressed_int4(128, symmetric=False),
}
"""What dense weights can be made while they are loaded, by the names of `--quantization`. 32 inputs share a scale
unless the name says otherwise: rounding to the nearest, without calibration, needs small groups."""


def requested_quantization(name: str | None, stored: Quantization | None) -> Quantization | None:
    """How a model's weights are held: as the checkpoint stores them, else as asked for.

    Raises ConfigError for an unknown name, or one that contradicts the checkpoint.
    """
    if name is None:
        return stored
    if name not in QUANTIZATIONS:
        raise ConfigError(f"quantization is {name!r}, it must be one of {', '.join(QUANTIZATIONS)}")
    layout = QUANTIZATIONS[name]()
    if stored is None:
        return Quantization(layout, is_stored=False)
    if stored.layout.method == layout.method and name == layout.method:
        return stored
    raise ConfigError(
        f"quantization is {name!r}, but the checkpoint is quantized already ({stored.label}, {stored.layout.format});"
        " leave it out, or use the original checkpoint"
    )


def _awq(fields: ConfigFields) -> Layout:
    version = fields.text("version", fields.text("format", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedModel(
            f"{fields.source}: version is {version[:40]!r}; of AWQ's packings only 'gemm' is implemented."
        )
    _require_bits(fields, fields.integer("bits", 1, 64, fields.integer("w_bit", 1, 64, 4)), 4)
    if not fields.boolean("zero_point", default=True):
        raise UnsupportedModel(f"{fields.source}: zero_point is false; only AWQ with zero points is implemented.")
    name = "q_group_size" if fields.present("q_group_size") else "group_size"
    return awq_int4(_group_size(fields, name))


def _gptq(fields: ConfigFields) -> Layout:
    version = fields.text("checkpoint_format", fields.text("format", "gptq")).lower()
    if version not in {"gptq", "gptq_v2"}:
        raise UnsupportedModel(
            f"{fields.source}: checkpoint_format is {version[:40]!r}; implemented are 'gptq' and 'gptq_v2'."
        )
    _require_bits(fields, fields.integer("bits", 1, 64), 4)
    dynamic = fields.nested("dynamic")
    if dynamic is not None:
        raise UnsupportedModel(f"{fields.source}: dynamic gives modules settings of their own, which is not read.")
    return gptq_int4(_group_size(fields, "group_size"), is_v2=version == "gptq_v2")


def _fp8(fields: ConfigFields) -> Layout:
    kind = fields.text("fmt", "e4m3")
    if kind != "e4m3":
        raise UnsupportedModel(f"{fields.source}: fmt is {kind[:40]!r}; only e4m3 is implemented.")
    block = fields.integers("weight_block_size", 2, 1, MAX_BLOCK)
    if block is None:
        return Fp8Layout("fp8", Fp8Scales.TENSOR, "weight_scale")
    return Fp8Layout("fp8", Fp8Scales.BLOCK, "weight_scale_inv", (block[0], block[1]))


def _compressed_tensors(fields: ConfigFields) -> Layout:
    if fields.nested("kv_cache_scheme") is not None:
        raise UnsupportedModel(f"{fields.source}: kv_cache_scheme quantizes keys and values, which is not implemented.")
    sparsity = fields.nested("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise UnsupportedModel(f"{fields.source}: sparsity_config is not dense; sparse weights are not implemented.")
    groups = fields.objects("config_groups", MAX_CONFIG_GROUPS)
    layouts = {_compressed_group(group, fields) for group in groups.values()}
    if len(layouts) != 1:
        raise UnsupportedModel(
            f"{fields.source}: config_groups describes {len(layouts)} kinds of weights; one for all is implemented."
        )
    return layouts.pop()


def _compressed_group(group: ConfigFields, fields: ConfigFields) -> Layout:
    weights = group.nested("weights")
    if weights is None:
        raise UnsupportedModel(f"{group.source} has no weights; quantized activations alone are not implemented.")
    if group.nested("output_activations") is not None:
        raise UnsupportedModel(f"{group.source}: output_activations is given; only inputs are quantized here.")
    inputs = group.nested("input_activations")
    kind, bits = weights.text("type", "int"), weights.integer("num_bits", 1, 64)
    form = group.text("format", fields.text("format", "unknown"))
    if kind == "float" and bits == 8 and form in {"float-quantized", "naive-quantized"}:
        return _compressed_fp8(weights)
    if kind == "int" and bits == 8 and form in {"int-quantized", "naive-quantized"} and inputs is not None:
        return _compressed_int8(weights, inputs)
    if kind == "int" and bits == 4 and form == "pack-quantized" and inputs is None:
        return _compressed_int4(weights)
    activations = (
        "activations as they are" if inputs is None else f"{inputs.integer('num_bits', 1, 64)}-bit activations"
    )
    raise UnsupportedModel(
        f"{group.source}: {kind[:20]} weights of {bits} bits with {activations} in format {form[:40]!r} are not"
        " implemented. Implemented are 8-bit int weights with 8-bit activations (int-quantized), 4-bit int weights"
        " (pack-quantized) and 8-bit float weights (float-quantized)."
    )


def _compressed_fp8(weights: ConfigFields) -> Fp8Layout:
    strategy = weights.text("strategy", "tensor")
    if strategy == "block":
        block = weights.integers("block_structure", 2, 1, MAX_BLOCK)
        if block is not None:
            return compressed_fp8(Fp8Scales.BLOCK, (block[0], block[1]))
    if strategy not in {"tensor", "channel"}:
        raise _strategy(weights, strategy, "tensor, channel and block with its block_structure")
    return compressed_fp8(Fp8Scales(strategy))


def _compressed_int8(weights: ConfigFields, inputs: ConfigFields) -> Int8Layout:
    strategy = weights.text("strategy", "tensor")
    if strategy not in {"tensor", "channel"}:
        raise _strategy(weights, strategy, "tensor and channel")
    _require_symmetric(weights)
    _require_symmetric(inputs)
    _require_bits(inputs, inputs.integer("num_bits", 1, 64), 8)
    if not inputs.boolean("dynamic", default=False) or inputs.text("strategy", "tensor") != "token":
        raise UnsupportedModel(
            f"{inputs.source}: only activations that are quantized per token while they are used (dynamic, strategy"
            " 'token') are implemented."
        )
    return Int8Layout("compressed-tensors", is_per_channel=strategy == "channel")


def _compressed_int4(weights: ConfigFields) -> Int4Layout:
    strategy = weights.text("strategy", "group")
    if strategy not in {"group", "channel"}:
        raise _strategy(weights, strategy, "group and channel")
    group_size = _group_size(weights, "group_size") if strategy == "group" else None
    return compressed_int4(group_size, symmetric=weights.boolean("symmetric", default=True))


def _group_size(fields: ConfigFields, name: str) -> int | None:
    """Inputs that share a scale; None for -1, which means all of them."""
    size = fields.integer(name, -1, MAX_GROUP)
    if size == -1:
        return None
    if size == 0 or size % MIN_GROUP != 0:
        raise UnsupportedModel(
            f"{fields.source}: {name} is {size}; implemented are multiples of {MIN_GROUP}, and -1 for one group."
        )
    return size


def _require_bits(fields: ConfigFields, bits: int, wanted: int) -> None:
    if bits != wanted:
        raise UnsupportedModel(
            f"{fields.source}: values have {bits} bits; only {wanted} are implemented in this format."
        )


def _require_symmetric(fields: ConfigFields) -> None:
    if not fields.boolean("symmetric", default=True):
        raise UnsupportedModel(
            f"{fields.source}: symmetric is false; 8-bit codes with zero points are not implemented."
        )


def _strategy(fields: ConfigFields, strategy: str, known: str) -> UnsupportedModel:
    return UnsupportedModel(f"{fields.source}: strategy is {strategy[:40]!r}; implemented are {known}.")


READERS: dict[str, Callable[[ConfigFields], Layout]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
"""By quant_method; one line and one reader per format."""
