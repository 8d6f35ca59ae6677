"""Keys of a client: what is no key is refused before a socket sees it, and a secret is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from llmscale.client import CurveKeys
from llmscale.client.keys import read_pair, write_pair
from llmscale.errors import ConfigError

PUBLIC, SECRET = (key.decode() for key in zmq.curve_keypair())
SERVER = zmq.curve_keypair()[0].decode()


def test_a_written_pair_is_read_back_and_shows_no_secret(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.key", PUBLIC, SECRET, replace=False)
    keys = CurveKeys.load(str(tmp_path / "a.key"), server=SERVER)
    assert (keys.public, keys.secret, keys.server) == (PUBLIC, SECRET, SERVER)
    assert SECRET not in repr(keys)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_file_that_others_may_read_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.key"
    write_pair(path, PUBLIC, SECRET, replace=False)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 600"):
        read_pair(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"public-key = x\n", b"\xff\xfe", b"secret-key = x\n" * 2, b"#" * (16 * 1024 + 1)],
    ids=["empty", "no secret", "no text", "no public", "over the limit"],
)
def test_a_file_that_holds_no_pair_is_refused_without_repeating_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.key"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.key") as refused:
        read_pair(path)
    assert len(str(refused.value)) < 400


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody\.key"):
        read_pair(tmp_path / "nobody.key")


@pytest.mark.parametrize(
    "wrong",
    ["", PUBLIC[:-1], PUBLIC + "0", PUBLIC[:-1] + " ", PUBLIC[:-1] + "é", PUBLIC[:-1] + '"'],
    ids=["empty", "short", "long", "a space", "no ASCII", "a quote"],
)
@pytest.mark.parametrize("name", ["public", "secret", "server"])
def test_what_is_no_key_is_refused_by_its_role_and_not_repeated(name: str, wrong: str) -> None:
    given = {"public": PUBLIC, "secret": SECRET, "server": SERVER} | {name: wrong}
    with pytest.raises(ConfigError, match=f"the {name} key") as refused:
        CurveKeys(**given)
    assert not wrong or wrong not in str(refused.value)


def test_a_pair_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    write_pair(path, PUBLIC, SECRET, replace=False)
    with pytest.raises(FileExistsError):
        write_pair(path, SERVER, SECRET, replace=False)
    assert read_pair(path) == (PUBLIC, SECRET)
    # What a process left that died while it wrote is no obstacle.
    (tmp_path / "a.key.new").write_text("half")
    write_pair(path, SERVER, SECRET, replace=True)
    assert read_pair(path) == (SERVER, SECRET)
    assert [found.name for found in tmp_path.iterdir()] == ["a.key"]
