"""`llmscale info`: what a model folder holds and how a node would serve it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from llmscale.config import NodeSettings
from llmscale.models.registry import describe_model
from llmscale.node.plan import plan_replica


def run(model: str) -> None:
    """Prints one table. Raises ModelError for a folder that cannot be served."""
    plan = plan_replica(NodeSettings(model=model, listen=""))
    spec = describe_model(plan.folder).spec
    attention = spec.blocks[0].attention
    cache_mib = plan.limits.total_blocks * plan.block_bytes >> 20
    table = Table(show_header=False, box=None)
    rows = (
        ("model", plan.name),
        ("folder", str(plan.folder)),
        ("architecture", spec.architecture),
        ("parameters", f"{spec.parameters:,}"),
        ("layers", str(len(spec.blocks))),
        ("attention", f"{attention.query_heads} query heads, {attention.kv_heads} KV heads of {attention.head_dim}"),
        ("vocabulary", f"{spec.vocabulary:,}"),
        ("longest sequence", f"{plan.limits.max_sequence_tokens:,} tokens ({plan.sequence_reason})"),
        ("executor", f"{plan.executor} ({plan.executor_reason})"),
        ("device", plan.device),
        ("number format", plan.dtype),
        ("quantization", plan.quantization_label),
        ("KV cache", f"{plan.limits.total_blocks:,} blocks of {plan.limits.block_tokens} tokens, {cache_mib:,} MiB"),
        ("revision", plan.revision),
    )
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
