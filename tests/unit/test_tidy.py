"""Style as a test: what points at what, what is never used, how long a file may be, which words are not ours.

Method: the tree as git knows it, read as text, as TOML or as syntax trees; nothing of ours is imported but in one
child process. Every exception stands in a list here, with its reason, and one that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "llmscale"
VENDORED = "rust/zmq-sys/"
SOURCES = {".rs", ".py", ".pyi", ".js", ".css", ".html", ".sh", ".cu", ".cuh"}
BINARY = {".safetensors", ".png", ".bin", ".gz", ".woff2", ".ico"}
GENERATED = {"Cargo.lock"}

MAX_LINES = 450
LONG_FILES: dict[str, tuple[int, str]] = {
    "python/llmscale/_core.pyi": (720, "one module, and a stub is its table of contents")
}
MAX_FUNCTION_LINES = 70

CRATES = {
    "types": set[str](),
    "cost": set[str](),
    "blocks": {"types"},
    "scheduler": {"types", "cost", "blocks"},
    "fleet": {"types", "cost"},
    "front": {"types", "cost", "fleet"},
    "wire": {"types"},
    "net": {"types"},
    "engine": {"types", "cost", "blocks", "scheduler", "front", "wire", "net"},
    "kernels": set[str](),
    "executor": {"kernels"},
    "sim": {"types", "cost", "blocks", "scheduler", "front", "wire"},
    "py": {"types", "scheduler", "kernels", "executor", "wire", "net", "engine", "front"},
}
PURE_CRATES = ("types", "cost", "blocks", "scheduler", "fleet", "front", "wire")
# Live things a deterministic state machine must not see, as words of Rust.
LIVE = re.compile(
    r"\b(?:Instant|SystemTime|Mutex|RwLock|Condvar)\b|std::(?:thread|net|fs|env|process|sync::(?!Arc))|\basync fn\b"
)
# Their order differs from run to run; FxHashMap's does not.
RANDOMLY_ORDERED = re.compile(r"\b(?:HashMap|HashSet|RandomState)\b")
FLOAT = re.compile(r"\bf(?:32|64)\b")

# What each part of the package may use of the others. A part is a folder or a file directly under `llmscale`.
PARTS = {
    "errors": set[str](),
    "env": set[str](),
    "machine": set[str](),
    "collector": set[str](),
    "metrics": set[str](),
    "detokenizer": set[str](),
    "stop_strings": set[str](),
    "embedded": set[str](),
    "extras": set[str](),
    "types": {"errors"},
    "config": {"errors", "env", "types"},
    "toml_document": {"errors"},
    "origins": set[str](),
    "fleet_file": {"config", "embedded", "errors", "origins", "toml_document"},
    "logs": {"env"},
    "template_budget": {"errors"},
    "template_sandbox": {"errors", "template_budget"},
    "samples": {"embedded", "errors"},
    "chat_template": {"errors", "template_budget", "template_sandbox"},
    "tokenizer_json": {"errors"},
    "end_tokens": {"tokenizer_json"},
    "final_message": {"errors"},
    "tokenizer": {
        *("errors", "chat_template", "detokenizer", "end_tokens", "final_message", "template_budget", "tokenizer_json"),
    },
    "choice": {"errors", "stop_strings", "types"},
    "models": {"_core", "end_tokens", "errors", "env", "embedded", "extras", "quant"},
    "cuda": {"errors", "env"},
    "layers": {"models", "quant", "_core"},
    "devices": {"_core", "cuda", "errors", "extras", "layers", "models", "quant"},
    "quant": {"errors", "types"},
    "calibration": {"embedded", "errors", "layers", "models", "quant", "samples"},
    "evaluation": {
        *("_core", "config", "devices", "embedded", "env", "errors", "llm", "models", "node", "samples", "types"),
        *("worker",),
    },
    "parallel": {"_core", "errors", "models"},
    "worker": {
        *("_core", "errors", "env", "logs", "machine", "config", "models", "layers", "quant", "parallel", "devices")
    },
    "node": {"_core", "errors", "env", "extras", "logs", "machine", "config", "models", "parallel", "devices"},
    "client": {"errors", "types", "choice", "tokenizer", "models"},
    "gateway": {
        *("_core", "collector", "config", "devices", "errors", "fleet_file", "types", "choice", "metrics", "logs"),
        *("machine", "origins", "tokenizer", "models"),
    },
    "llm": {*("_core", "collector", "errors", "env", "types", "choice", "config", "tokenizer", "node", "worker")},
    "cli": {
        *("_core", "errors", "env", "types", "logs", "config", "fleet_file", "tokenizer", "models", "node", "gateway"),
        *("llm", "client", "calibration", "evaluation", "extras"),
    },
    "__init__": {"client", "errors", "llm", "types"},
}
# Only these may reach torch when they are imported.
TORCH_PARTS = {"calibration", "cuda", "devices", "evaluation", "layers", "worker", "quant", "llm", "cli"}
TORCH_FILES = {
    "models.gguf_import",
    "models.loader",
    "models.open_files",
    "models.quantizer",
    "parallel.groups",
    "parallel.pipeline",
    "parallel.tensor",
}

RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS_CODE_CALLS = {"eval", "exec", "compile", "__import__"}
RUNS_CODE_ATTRIBUTES = {("torch", "load"), ("os", "system"), ("yaml", "load")}
RUNS_CODE_METHODS = {"recv_pyobj", "send_pyobj"}
RUNS_CODE_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
PAGE_INJECTION = re.compile(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|new Function)\b|\beval\(")

BANNED_NAMES = re.compile(
    r"(?:^|[_\-./])(?:util|utils|helper|helpers|manager|managers|misc|common_utils)(?=[_\-./]|$)", re.I
)
# Put together here, so that this file does not hold what it looks for.
FOREIGN_WORDS = re.compile(
    "|".join([r"\bissue" + r"s? #?\d", r"(?<![\w./-])shared" + "/", r"(?<![\w.-])/work" + "/"]), re.I
)


@cache
def tracked() -> tuple[str, ...]:
    """Every file of the project, new ones included, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files are the project's")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file())


def ours(*suffixes: str, under: str = "") -> list[str]:
    """Our own files of some kinds, vendored ones excepted."""
    return [
        name
        for name in tracked()
        if name.startswith(under) and not name.startswith(VENDORED) and (not suffixes or Path(name).suffix in suffixes)
    ]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(text(name), filename=name)


def module_of(name: str) -> str:
    """python/llmscale/gateway/app.py is gateway.app; a package is its folder's name."""
    parts = Path(name).relative_to("python/llmscale").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_for_checkers_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and is_for_checkers_only(child):
            continue
        yield child
        yield from statements(child)


def imports(name: str) -> set[str]:
    """The modules that a file imports anywhere when it runs, by full name."""
    found: set[str] = set()
    for node in statements(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively; write the module's full name"
            module = node.module or ""
            found |= {
                f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names
            }
    return found


def is_module(full: str) -> bool:
    if full == "llmscale._core":
        return True
    path = ROOT / "python" / full.replace(".", "/")
    return full.startswith("llmscale") and (path.with_suffix(".py").is_file() or path.is_dir())


def manifest(crate: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = tomllib.loads(text(f"rust/{crate}/Cargo.toml"))
    return found


def crates() -> list[str]:
    return [Path(name).parts[1] for name in tracked() if re.fullmatch(r"rust/[^/]+/Cargo\.toml", name)]


def test_a_crate_depends_on_its_allowed_neighbours_only() -> None:
    assert {*CRATES, "zmq-sys"} == {*crates()}, "say in CRATES what a new crate may depend on"
    wrong = []
    for crate, allowed in CRATES.items():
        used = {
            name.removeprefix("llmscale-") for name in manifest(crate).get("dependencies", {}) if "llmscale" in name
        }
        # Also what is allowed and no longer used: the arrows of ARCHITECTURE.md are those that there are.
        wrong += [f"{crate} -> {name}" for name in sorted(used ^ allowed)]
    assert not wrong


def test_the_allowed_dependencies_have_no_cycle() -> None:
    done: set[str] = set()
    left = dict(CRATES)
    while ready := [crate for crate, needs in left.items() if needs <= done]:
        done |= set(ready)
        left = {crate: needs for crate, needs in left.items() if crate not in done}
    assert not left


def test_only_net_has_sockets_and_only_py_has_python() -> None:
    owners = {"zmq": {"net"}, "zmq-sys": {"net"}, "pyo3": {"py"}}
    for crate in crates():
        needs = {*manifest(crate).get("dependencies", {}), *manifest(crate).get("build-dependencies", {})}
        for dependency, allowed in owners.items():
            assert dependency not in needs or crate in allowed, f"{crate} depends on {dependency}"
        assert not needs & {"tokio", "rand", "async-std"}, f"{crate} brings a runtime or its own randomness"


def test_a_pure_crate_sees_no_clock_thread_file_or_socket_and_no_random_order() -> None:
    wrong = []
    for crate in PURE_CRATES:
        for name in ours(".rs", under=f"rust/{crate}/src/"):
            for number, line in enumerate(text(name).splitlines(), start=1):
                code = line.split("//")[0]
                if LIVE.search(code) or RANDOMLY_ORDERED.search(code):
                    wrong.append(f"{name}:{number} {line.strip()}")
    assert not wrong


@pytest.mark.parametrize("crate", ["cost", "blocks", "fleet", "front"])
def test_decisions_are_made_in_integers(crate: str) -> None:
    wrong = [
        f"{name}:{number}"
        for name in ours(".rs", under=f"rust/{crate}/src/")
        for number, line in enumerate(text(name).splitlines(), start=1)
        if FLOAT.search(line.split("//")[0])
    ]
    assert not wrong


def test_a_part_of_the_package_imports_its_allowed_neighbours_only() -> None:
    wrong = []
    for name in ours(".py", under="python/llmscale/"):
        part = module_of(name).split(".")[0]
        assert part in PARTS, f"say in PARTS what the new part {part} may import"
        for full in imports(name):
            module = full.removeprefix("llmscale").removeprefix(".")
            other = module.split(".")[0]
            if full.startswith("llmscale") and module and other != part and other not in PARTS[part]:
                wrong.append(f"{name} -> {module}")
    assert not wrong


def test_only_workers_layers_and_the_loader_import_torch() -> None:
    wrong = [
        name
        for name in ours(".py", under="python/llmscale/")
        if any(module.split(".")[0] in {"torch", "safetensors"} for module in imports(name))
        and module_of(name).split(".")[0] not in TORCH_PARTS
        and module_of(name) not in TORCH_FILES
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["llmscale.client", "llmscale.types"], ["torch", "transformers", "llmscale._core", "starlette", "uvicorn"]),
        (
            ["llmscale.gateway.serve", "llmscale.gateway.app"],
            ["torch", "transformers", "llmscale.worker", "llmscale.node"],
        ),
        (["llmscale.node.plan", "llmscale.node.supervisor"], ["torch", "transformers", "llmscale.gateway"]),
        (["llmscale.cli"], ["torch", "llmscale._core", "llmscale.gateway"]),
    ],
    ids=["client", "gateway", "node", "cli"],
)
def test_importing_a_process_loads_nothing_that_belongs_to_another(modules: list[str], absent: list[str]) -> None:
    code = f"import json, sys, {', '.join(modules)}; json.dump(sorted(sys.modules), sys.stdout)"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not set(absent) & set(loaded)


def test_nothing_that_ships_can_run_code_that_it_reads() -> None:
    wrong = []
    for name in ours(".py", under="python/"):
        if any(module.split(".")[0] in RUNS_CODE for module in imports(name)):
            wrong.append(f"{name} imports a module that runs what it reads")
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call) and runs_code(node):
                wrong.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert not wrong


def runs_code(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name) and function.id in RUNS_CODE_CALLS:
        return True
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        if (owner, function.attr) in RUNS_CODE_ATTRIBUTES or function.attr in RUNS_CODE_METHODS:
            return True
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return any(name in given and not is_false(given[name]) for name in RUNS_CODE_KEYWORDS)


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "torch.load(path)",
        "socket.recv_pyobj()",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=wanted)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_what_runs_code_is_recognized(line: str) -> None:
    statement = ast.parse(line).body[0]
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert runs_code(statement.value)


def test_the_page_makes_no_markup_from_text() -> None:
    wrong = [
        f"{name}:{number}"
        for name in ours(".js", ".html", under="python/llmscale/gateway/page/")
        for number, line in enumerate(text(name).splitlines(), start=1)
        if PAGE_INJECTION.search(line)
    ]
    assert not wrong


def test_one_file_reads_the_environment() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name in ours(".py", under="python/")
        if name != "python/llmscale/env.py"
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}
    ]
    assert not wrong


def test_no_test_waits_by_sleeping() -> None:
    wrong = []
    for name in ours(".py", under="tests/"):
        if "time" not in imports(name):
            continue  # a virtual clock may be called `time` as well
        for node in ast.walk(tree(name)):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
            is_import = isinstance(node, ast.ImportFrom) and node.module == "time"
            if is_call or (is_import and any(alias.name == "sleep" for alias in node.names)):
                wrong.append(f"{name}:{node.lineno}")
    for name in ours(".rs", under="rust/"):
        lines = enumerate(text(name).splitlines(), start=1)
        wrong += [f"{name}:{number}" for number, line in lines if "thread::sleep" in line.split("//")[0]]
    assert not wrong


def test_files_are_short_enough_to_read() -> None:
    lines = {name: text(name).count("\n") for name in ours(*SOURCES)}
    wrong = {name: count for name, count in lines.items() if count > LONG_FILES.get(name, (MAX_LINES, ""))[0]}
    assert not wrong, f"over {MAX_LINES} lines: divide by nouns"
    needless = [name for name in LONG_FILES if lines.get(name, 0) <= MAX_LINES]
    assert not needless, "these exceptions are no longer needed: remove them"


def test_python_functions_are_at_most_seventy_lines() -> None:
    wrong = [
        f"{name}:{node.lineno} {node.name}"
        for name in ours(".py")
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not wrong


def test_every_source_file_says_what_it_owns() -> None:
    silent = [name for name in ours(".py", under="python/") if not ast.get_docstring(tree(name))]
    silent += [name for name in ours(".py", under="tests/") if text(name).strip() and not ast.get_docstring(tree(name))]
    for name in ours(".rs", under="rust/"):
        if not text(name).startswith("//!"):
            silent.append(name)
    assert not silent


def test_no_file_is_named_for_being_useful() -> None:
    assert not [name for name in ours() if BANNED_NAMES.search(Path(name).with_suffix("").as_posix())]
    assert BANNED_NAMES.search("python/llmscale/text_utils")
    assert not BANNED_NAMES.search("python/llmscale/utilization")


def test_the_project_speaks_of_itself_alone() -> None:
    wrong = []
    for name in ours():
        if Path(name).suffix in BINARY or name in GENERATED:
            continue
        content = (ROOT / name).read_bytes()
        if b"\0" in content[:1_024]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if found := FOREIGN_WORDS.search(line):
                wrong.append(f"{name}:{number} {found[0]!r}")
    assert not wrong
