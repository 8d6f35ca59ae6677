"""Makes what peers read from the checkpoints that we read: `python -m bench.peers.models FOLDER --model S,L`.

Into FOLDER/models, for every shape: NAME-bf16.gguf and, by llama.cpp's own `llama-quantize`, NAME-Q8_0.gguf and
NAME-Q4_0.gguf (embedding and head in the same type); NAME-fp16-openvino, -int8- and -int4-openvino by Optimum; and
NAME-int8, the compressed-tensors folder of `llmscale quantize`, for vLLM. What is there is left alone, and what
a missing peer would have to make is left out. See bench/README.md for how FOLDER is laid out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.cpu_cases import machine_for_us
from bench.peers.gguf_file import write_gguf
from bench.shapes import SHAPES, model_folder

GGUF_TYPES = ("Q8_0", "Q4_0")
OPENVINO_FORMATS = ("fp16", "int8", "int4")


def main() -> None:
    """Takes minutes and gigabytes for L."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny,S,M,L", help="comma-separated shapes (default: %(default)s)")
    given = parser.parse_args()
    for name in given.model.split(","):
        make(given.folder, name)


def make(peers: Path, name: str) -> None:
    """All formats of one shape that are not there yet."""
    with machine_for_us({}, name):
        source = model_folder(name)
    models = peers / "models"
    models.mkdir(parents=True, exist_ok=True)
    quantize = peers / "llama.cpp/bin/llama-quantize"
    if quantize.is_file():
        dense = models / f"{name}-bf16.gguf"
        _make(dense, lambda part: write_gguf(source, part))
        for kind in GGUF_TYPES if name != "tiny" else ():
            types = ["--token-embedding-type", kind.lower(), "--output-tensor-type", kind.lower()]
            _make(
                models / f"{name}-{kind}.gguf",
                lambda part, kind=kind, types=types: _run([quantize, *types, dense, part, kind, "2"]),
            )
    optimum = peers / "openvino/bin/optimum-cli"
    if optimum.is_file() and name != "tiny":
        for kind in OPENVINO_FORMATS:
            command = [optimum, "export", "openvino", "-m", source, "--task", "text-generation-with-past"]
            command += ["--weight-format", kind, *(openvino_group(name) if kind == "int4" else ())]
            _make(
                models / f"{name}-{kind}-openvino",
                lambda part, command=command: _run([*command, "--disable-convert-tokenizer", part]),
            )
    if (peers / "vllm/bin/python").is_file() and name != "tiny":
        command = [sys.executable, "-m", "llmscale.cli", "quantize", source]
        _make(models / f"{name}-int8", lambda part: _run([*command, part, "--scheme", "int8"]))


def openvino_group(name: str) -> list[str]:
    """OpenVINO's default groups of 128 inputs must divide every width."""
    shape = SHAPES[name]
    fits = all(width % 128 == 0 for width in (shape.hidden, shape.ffn))
    return ["--group-size", "128" if fits else "64"]


def _make(target: Path, write: Callable[[Path], None]) -> None:
    if target.exists():
        return
    print(f"making {target}", file=sys.stderr, flush=True)
    # Renamed when complete, so that an interrupted run leaves nothing that looks whole.
    part = target.with_name(f"part-{target.name}")
    with machine_for_us({}, str(target)):
        write(part)
    part.rename(target)


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} ended with code {done.returncode}:\n{done.stderr[-2_000:]}")


if __name__ == "__main__":
    main()
