"""The command line: `llmscale --help`.

Each command is one file; heavy modules are imported inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmscale.errors import ConfigError, LlmscaleError

app = typer.Typer(
    name="llmscale",
    help="Serve large language models: fair, deterministic scheduling and streams that survive a killed process.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A folder, a GGUF file, a hub id in the local Hugging Face cache, tiny-chat or tiny-chat-mini."
    ),
]


ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(help="A key that clients must send; visible to other users of this host. May be repeated."),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(help="Longest sequence in tokens (default: the model's, or what a quarter of the memory holds)."),
]
DeviceOption = Annotated[
    str, typer.Option(help="What workers compute on: cpu, cuda, or auto for CUDA where torch sees devices for all.")
]
ExecutorOption = Annotated[
    str, typer.Option(help="What computes steps: native, torch, or auto for native where one rank of a CPU can.")
]
HedgingOption = Annotated[
    bool, typer.Option("--hedging", help="Try a request at a second replica when its first token is unusually late.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel-size", "-tp", help="Workers that share every layer.")
]
PipelineParallelOption = Annotated[
    int, typer.Option("--pipeline-parallel-size", "-pp", help="Workers that divide the layers.")
]
StepTargetOption = Annotated[
    float, typer.Option(help="What a prompt may add to a step that streams wait for; 0 for no bound.")
]
DiskOption = Annotated[
    str | None, typer.Option(help="Folder for what the host has no room for; it outlives the process.")
]
KillButtonOption = Annotated[
    bool, typer.Option("--kill-button", help="Let the chat page kill workers, to see answers survive it.")
]
AllowedOriginsOption = Annotated[
    list[str] | None,
    typer.Option(help="Origin of web pages that may ask, with a key, or * for all. May be repeated."),
]
ReplicasOption = Annotated[int, typer.Option(help="Whole copies of the model; a dead one's answers go on at another.")]
KvDtypeOption = Annotated[
    str, typer.Option(help="What keys and values are kept as: auto (as the activations) or int8, in half the memory.")
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(help="Quantize dense weights while loading: int8, int4 (groups of 32), int4-64, int4-128."),
]


CalibrateOption = Annotated[
    str | None,
    typer.Option(
        help='Choose codes for these texts: a file of JSON lines ({"text"}, {"prompt", "completion"} or {"messages"}),'
        " or builtin for questions that tiny-chat was trained on the like of."
    ),
]


@app.command()
def serve(
    context: typer.Context,
    model: ModelArgument = "tiny-chat",
    host: Annotated[str, typer.Option(help="Address; anything but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: ApiKeyOption = None,
    api_key_file: Annotated[str | None, typer.Option(help="File of API keys with their tenants.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    kv_dtype: KvDtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens per step, at least --max-num-seqs.")] = 512,
    step_target_milliseconds: StepTargetOption = 20.0,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Memory for the KV cache.")] = None,
    kv_host_bytes: Annotated[int | None, typer.Option(help="Memory for what the KV cache evicts; 0 for none.")] = None,
    device: DeviceOption = "auto",
    executor: ExecutorOption = "auto",
    kv_disk: DiskOption = None,
    kv_disk_bytes: Annotated[int | None, typer.Option(help="Most bytes there, of each replica.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a worker.")] = None,
    tensor_parallel_size: TensorParallelOption = 1,
    pipeline_parallel_size: PipelineParallelOption = 1,
    replicas: ReplicasOption = 1,
    kill_button: KillButtonOption = False,
    allowed_origins: AllowedOriginsOption = None,
    hedging: HedgingOption = False,
    fleet_file: Annotated[
        Path | None, typer.Option(help="Serve the models of this llmscale.toml; it stands for MODEL and all options.")
    ] = None,
) -> None:
    """Serve MODEL over OpenAI's HTTP API on this machine: a gateway, a node and a chat page."""
    from llmscale.cli.serve import ServeOptions, run, run_file

    if fleet_file is not None:
        _check_stands_alone(context, "fleet_file")
        run_file(fleet_file)
        return
    run(
        ServeOptions(
            model=model,
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            api_key_file=api_key_file,
            served_model_name=served_model_name,
            dtype=dtype,
            quantization=quantization,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            step_target_milliseconds=step_target_milliseconds,
            kv_cache_bytes=kv_cache_bytes,
            kv_host_bytes=kv_host_bytes,
            device=device,
            executor=executor,
            kv_disk=kv_disk,
            kv_disk_bytes=kv_disk_bytes,
            threads=threads,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            replicas=replicas,
            kill_button=kill_button,
            allowed_origins=tuple(allowed_origins or ()),
            hedging=hedging,
        )
    )


def _check_stands_alone(context: typer.Context, option: str) -> None:
    """An option beside a file that says the same would win or lose; either would surprise somebody."""
    given = [
        name
        for name in context.params
        if name != option and (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)} is given beside --{option.replace('_', '-')}: write it into the file, or leave one out"
        )


@app.command()
def info(model: ModelArgument = "tiny-chat") -> None:
    """Say what a model folder holds and how a node would serve it."""
    from llmscale.cli.info import run

    run(model)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to complete.")],
    model: Annotated[
        str, typer.Option(help="A folder, GGUF file, hub id in the local cache, tiny-chat or tiny-chat-mini.")
    ] = "tiny-chat",
    max_tokens: Annotated[int, typer.Option(help="Most output tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """Complete a text in this process, without a server."""
    from llmscale.cli.generate import run

    run(prompt, model, max_tokens, temperature)


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="A dense model: folder, GGUF file, hub id in the local cache, tiny-chat or tiny-chat-mini."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    method: Annotated[
        str, typer.Option("--method", "--scheme", help="int8, int4, fp8, or keep for a GGUF file as it is.")
    ] = "int4",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale in int4: 32, 64 or 128 (the default).")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="int4 without zero points: a little smaller, a little worse.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer of the original, for a GGUF file.")
    ] = None,
    calibrate: CalibrateOption = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Most texts that are drawn from the file (default: 1024).")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of all texts together (default: 65536).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which texts are drawn, and which tokens compare scales (default: 0).")
    ] = None,
) -> None:
    """Write a quantized copy of MODEL as a compressed-tensors checkpoint, which vLLM reads too.

    Without --calibrate every weight is rounded to the nearest. With it, scales and codes are chosen for what the texts
    send through each layer (AWQ and GPTQ), block by block.
    """
    from llmscale.cli.quantize import QuantizeOptions, run

    run(
        QuantizeOptions(
            model=model,
            target=target,
            method=method,
            group_size=group_size,
            symmetric=symmetric,
            tokenizer=tokenizer,
            calibrate=calibrate,
            calibration_samples=calibration_samples,
            calibration_tokens=calibration_tokens,
            seed=seed,
        )
    )


@app.command(name="eval")
def evaluate(
    model: ModelArgument = "tiny-chat",
    tasks: Annotated[
        str,
        typer.Option(
            help="tiny-chat for unseen questions of the embedded model, or a file of JSON lines: "
            '{"prompt", "answer"}, {"messages", "answer"} or {"text"}.'
        ),
    ] = "tiny-chat",
    against: Annotated[
        str | None, typer.Option(help="The model that this one was made from: answers and probabilities are compared.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32, of both models.")] = "auto",
    quantization: QuantizationOption = None,
    limit: Annotated[int | None, typer.Option(help="Most items; 2,000 of tiny-chat, all of a file.")] = None,
    seed: Annotated[int, typer.Option(help="Which items are drawn.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    executor: ExecutorOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure MODEL on items: perplexity, exact match of greedy answers, and both beside a reference.

    Perplexity and divergence count the tokens of the right answers, or all tokens of a text. Runs on the CPU.
    """
    from llmscale.cli.eval import EvalOptions, run

    run(EvalOptions(model, tasks, against, dtype, quantization, limit, seed, threads, executor, kv_dtype, as_json))


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Where the keys are written.")] = Path("keys"),
    holders: Annotated[
        list[str] | None,
        typer.Argument(help="node, gateway:NAME or client:NAME:TENANT; without any: node gateway:first."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the keys of these holders if they exist.")] = False,
) -> None:
    """Make CURVE key pairs for a fleet, and the list of those that its nodes admit."""
    from llmscale.cli.keys import run

    run(folder, holders or ("node", "gateway:first"), force=force)


def main() -> None:
    """Entry point. User errors are one line and exit code 1, never a traceback; so is what the system refuses (a file
    that may not be read, a full disk), whose message names the file."""
    try:
        app()
    except (LlmscaleError, MemoryError, OSError) as error:
        sys.stderr.write(f"llmscale: {error}\n")
        raise SystemExit(1) from None
