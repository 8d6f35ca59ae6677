"""`import llmscale` loads nothing heavy; names load what they need."""

import subprocess
import sys

import pytest

import llmscale

HEAVY = ("torch", "tokenizers", "zmq", "httpx2", "starlette", "uvicorn", "msgspec", "numpy", "llmscale._core")


def modules_after(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    before = set(modules_after("pass"))
    after = modules_after("import llmscale")
    assert not [name for name in HEAVY if name in after]
    # What counts is the package itself and a few standard modules: 300 would be the tens of milliseconds of asyncio.
    assert len(set(after) - before) <= 12


def test_a_client_loads_no_torch_and_nothing_compiled_of_ours():
    after = modules_after("import llmscale; llmscale.Client('http://127.0.0.1:1'); llmscale.AsyncClient('ipc:///x')")
    assert not [name for name in ("torch", "tokenizers", "starlette", "numpy", "llmscale._core") if name in after]


def test_a_client_of_a_gateway_loads_no_zeromq():
    assert "zmq" not in modules_after("import llmscale; llmscale.Client('http://127.0.0.1:1')")


def test_every_public_name_is_there_and_listed():
    assert sorted(llmscale.__all__) == sorted(
        ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__", "errors"]
    )
    assert set(llmscale.__all__) <= set(dir(llmscale))
    assert llmscale.SamplingParams is llmscale.SamplingParams
    assert llmscale.errors.LlmscaleError
    assert llmscale.__version__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llmscale.no_such_name
