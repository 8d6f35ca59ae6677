"""llmscale: a multi-node LLM inference runtime.

`LLM` runs a model in this process, `Client` and `AsyncClient` talk to a gateway or to a node, `SamplingParams` says how
tokens are chosen. Names are loaded when they are first used, so that `import llmscale` costs milliseconds and a program
that only talks to a server never loads torch.
"""

from __future__ import annotations

from importlib import import_module

# Type checkers know the name; `typing` itself would be two thirds of what this import costs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from llmscale import errors
    from llmscale.client import AsyncClient, Client
    from llmscale.llm import LLM
    from llmscale.types import SamplingParams

    __version__: str

_MODULES = {
    "AsyncClient": "llmscale.client",
    "Client": "llmscale.client",
    "LLM": "llmscale.llm",
    "SamplingParams": "llmscale.types",
}

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__", "errors"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    elif name == "errors":
        value = import_module("llmscale.errors")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("llmscale")
    else:
        raise AttributeError(f"module 'llmscale' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
