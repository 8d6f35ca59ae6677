"""Folders that are there whole or not at all: what is half made goes when its maker is ended, or with the next import.

Method: real processes whose unpacking of blocks never returns, so that a signal always comes in the middle.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from llmscale.errors import ConfigError, InvalidCheckpoint
from llmscale.models import gguf_cache
from llmscale.models.end_signals import ENDING, unwound_by_signals
from llmscale.models.locate import locate_model
from llmscale.models.new_folder import new_folder, remove_abandoned
from tests import family
from tests.processes import START_SECONDS, wait_until

pytest.importorskip("gguf", reason="needs the package gguf: pip install 'llmscale[gguf]'")

from tests.gguf_files import gguf_tokenizer, write_dense, write_gguf

LOCATE = "import sys; from llmscale.models.locate import locate_model; locate_model(sys.argv[1])"
COMMAND = "from llmscale.cli import main; main()"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with blocks to unpack."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tensors = write_dense(tmp_path / "dense", num_hidden_layers=1)
    path = tmp_path / "model.gguf"
    write_gguf(path, tmp_path / "dense", tensors, type_of=lambda _: "Q8_0", tokenizer=gguf_tokenizer())
    return path


@pytest.fixture
def endless(tmp_path: Path) -> dict[str, str]:
    """An environment in which no block is ever unpacked."""
    package = tmp_path / "endless" / "gguf"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "constants.py").write_text("GGMLQuantizationType = {'Q8_0': 8}\n")
    (package / "quants.py").write_text(
        "import threading\n\n\ndef dequantize(*_):\n    threading.Event().wait()\n",
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(package.parent), *filter(None, sys.path)])}


@pytest.fixture(autouse=True)
def signals_do_what_they_do_by_default() -> Iterator[None]:
    """Also under nohup, in the background of a script, and after a test that left a handler: children inherit what is
    ignored, and what somebody handles is not ours."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def making(words: list[str], environment: dict[str, str], room: Path, hidden: str) -> Iterator[subprocess.Popen[str]]:
    """A process group that has begun to write into a hidden folder of `room`."""
    process = subprocess.Popen(
        [sys.executable, "-c", *words], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: any(room.glob(hidden)), START_SECONDS, "nothing is written")
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def entries(room: Path) -> list[str]:
    return sorted(path.name for path in room.iterdir())


@pytest.mark.parametrize("number", ENDING)
def test_an_import_that_is_ended_leaves_nothing(
    number: signal.Signals, file: Path, endless: dict[str, str], tmp_path: Path
) -> None:
    room = tmp_path / "cache" / "llmscale" / "gguf"
    with making([LOCATE, str(file)], endless, room, ".*.*") as process:
        os.killpg(process.pid, number)
        process.wait(START_SECONDS)
        # The process that writes may outlive the one that asked for it.
        wait_until(lambda: not entries(room), START_SECONDS, "something is left", lambda: entries(room))


def test_an_import_that_was_killed_is_removed_by_the_next_one(
    file: Path, endless: dict[str, str], tmp_path: Path
) -> None:
    room = tmp_path / "cache" / "llmscale" / "gguf"
    with making([LOCATE, str(file)], endless, room, ".*.*") as process:
        writers = psutil.Process(process.pid).children()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(START_SECONDS)
        assert not family.alive_after(writers, family.STOP_SECONDS)
    (left,) = entries(room)
    # A process of several threads is a zombie before the last of them has closed its files.
    wait_until(lambda: not is_locked(room / left), START_SECONDS, "its maker's lock is gone")
    target = locate_model(str(file))
    assert entries(room) == [target.name]
    assert left.startswith(f".{target.name}.")


NODE = "import sys; from llmscale.node.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_node_that_is_ended_while_it_imports_ends_the_import(
    number: signal.Signals, file: Path, endless: dict[str, str], tmp_path: Path
) -> None:
    room = tmp_path / "cache" / "llmscale" / "gguf"
    words = [NODE, "--model", str(file), "--listen", f"ipc://{tmp_path}/node"]
    with making(words, endless, room, ".*.*") as process:
        writers = psutil.Process(process.pid).children()
        assert writers
        # The node alone: nobody tells the one that writes.
        process.send_signal(number)
        assert process.wait(START_SECONDS) == (0 if number != signal.SIGKILL else -number)
        assert not family.alive_after(writers, family.STOP_SECONDS)
    assert not entries(room)


def test_what_another_process_makes_and_what_is_not_ours_stays(file: Path, tmp_path: Path) -> None:
    room = tmp_path / "cache" / "llmscale" / "gguf"
    target = locate_model(str(file))
    shutil.rmtree(target)
    stale, live, other = (f".{name}" for name in (f"{target.name}.deadbeef", f"{target.name}.0123abcd", "b.deadbeef"))
    for name in (stale, live, other, f"{target.name}.deadbeef"):
        (room / name / "inner").mkdir(parents=True)
    lock = os.open(room / live, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert locate_model(str(file)) == target
    finally:
        os.close(lock)
    assert entries(room) == sorted([live, other, target.name, f"{target.name}.deadbeef"])


def test_a_folder_that_is_being_made_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "a").touch()
        remove_abandoned(target)
        assert (folder / "a").exists()
    assert entries(tmp_path) == ["out"]
    assert entries(target) == ["a"]
    with pytest.raises(ConfigError, match="exists; give a folder that does not"), new_folder(target):
        raise AssertionError
    with pytest.raises(KeyError), new_folder(tmp_path / "other"):
        raise KeyError
    assert entries(tmp_path) == ["out"]


def test_a_folder_is_made_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_lock: int, _how: int) -> None:
        raise OSError(9, "no locks for folders here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.deadbeef").mkdir()
    remove_abandoned(tmp_path / "out")
    with new_folder(tmp_path / "out"):
        pass
    assert entries(tmp_path) == [".out.deadbeef", "out"]


def test_an_import_that_takes_too_long_is_ended_with_its_limit(
    file: Path, endless: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", endless["PYTHONPATH"])
    monkeypatch.setattr(gguf_cache, "MAX_IMPORT_SECONDS", 0.2)
    with pytest.raises(InvalidCheckpoint, match=r"not imported within 0 s \(MAX_IMPORT_SECONDS\)\. Import it once"):
        locate_model(str(file))
    assert not entries(tmp_path / "cache" / "llmscale" / "gguf")


@pytest.mark.parametrize("method", ["keep", "int8"])
def test_a_command_that_is_ended_leaves_nothing(
    method: str, file: Path, endless: dict[str, str], tmp_path: Path
) -> None:
    room = tmp_path / "room"
    words = [COMMAND, "quantize", str(file), str(room / "out"), "--method", method]
    with making(words, endless, room, ".out.*" if method == "keep" else ".out.*/.*") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_SECONDS) == 128 + signal.SIGTERM
    assert not entries(room)


def test_one_signal_unwinds_and_those_after_it_do_not() -> None:
    before = {number: signal.getsignal(number) for number in ENDING}
    cleaned: list[signal.Signals] = []

    def half_made() -> None:
        with unwound_by_signals(), unwound_by_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                for number in ENDING:
                    signal.raise_signal(number)
                    cleaned.append(number)

    with pytest.raises(SystemExit, match="143"):
        half_made()
    assert cleaned == list(ENDING)
    assert {number: signal.getsignal(number) for number in ENDING} == before


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwound_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
