"""`llmscale keys`: what it writes, what it keeps, what it never shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
import zmq.auth
from typer.testing import CliRunner

from llmscale.cli import app
from llmscale.cli.keys import Holder, run
from llmscale.client.keys import CurveKeys, read_pair
from llmscale.errors import ConfigError

FLEET = ("node", "gateway:edge", "client:app:acme")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the keys go; it is not there yet."""
    return tmp_path / "fleet" / "keys"


def test_a_fleet_gets_pairs_that_only_their_owner_may_read_and_a_list_of_the_public_halves(folder: Path) -> None:
    run(folder, FLEET, force=False)
    pairs = {name: read_pair(folder / name) for name in ("node.key", "gateway-edge.key", "client-app.key")}
    assert len({key for pair in pairs.values() for key in pair}) == 6
    for name, (public, secret) in pairs.items():
        assert (folder / name).stat().st_mode & 0o777 == 0o600
        assert zmq.curve_public(secret.encode()).decode() == public
        # The format is that of pyzmq, so that other programs can use the keys.
        assert zmq.auth.load_certificate(folder / name) == (public.encode(), secret.encode())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "node.public").read_text().strip() == pairs["node.key"][0]
    assert (folder / "allowed").read_text().splitlines() == [
        f"gateway edge {pairs['gateway-edge.key'][0]}",
        f"client app acme {pairs['client-app.key'][0]}",
    ]
    keys = CurveKeys.load(folder / "client-app.key", server=pairs["node.key"][0])
    assert (keys.public, keys.secret) == pairs["client-app.key"]


def test_the_command_says_what_to_do_next_and_never_a_secret(folder: Path) -> None:
    answer = CliRunner().invoke(app, ["keys", str(folder), *FLEET])
    assert answer.exit_code == 0, answer.output
    for said in ("python -m llmscale.node", "python -m llmscale.gateway", "CurveKeys.load", "--allow-list"):
        assert said in answer.output
    public = (folder / "node.public").read_text().strip()
    assert public in answer.output.replace("\n", "")
    for path in folder.glob("*.key"):
        assert read_pair(path)[1] not in answer.output


def test_without_holders_a_node_and_one_gateway_get_keys(folder: Path) -> None:
    assert CliRunner().invoke(app, ["keys", str(folder)]).exit_code == 0
    assert {path.name for path in folder.iterdir()} == {"node.key", "node.public", "gateway-first.key", "allowed"}


def test_a_pair_that_exists_is_not_overwritten_and_nothing_else_is_written(folder: Path) -> None:
    run(folder, FLEET, force=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"gateway-edge\.key.*--force"):
        run(folder, ("client:second:acme", "gateway:edge"), force=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_holder_can_be_added_later(folder: Path) -> None:
    run(folder, FLEET, force=False)
    node = (folder / "node.key").read_bytes()
    (folder / "allowed").write_text("# by hand\n" + (folder / "allowed").read_text())
    run(folder, ["client:second:acme"], force=False)
    assert (folder / "node.key").read_bytes() == node
    holders = [line.rpartition(" ")[0] for line in (folder / "allowed").read_text().splitlines()]
    assert holders == ["# by", "gateway edge", "client app acme", "client second acme"]


def test_force_replaces_the_named_pairs_and_takes_their_old_keys_off_the_list(folder: Path) -> None:
    run(folder, FLEET, force=False)
    before = {path.name: read_pair(path) for path in folder.glob("*.key")}
    run(folder, ["client:app:other"], force=True)
    after = {path.name: read_pair(path) for path in folder.glob("*.key")}
    assert {name for name in before if before[name] != after[name]} == {"client-app.key"}
    assert (folder / "client-app.key").stat().st_mode & 0o777 == 0o600
    assert (folder / "allowed").read_text().splitlines() == [
        f"gateway edge {after['gateway-edge.key'][0]}",
        f"client app other {after['client-app.key'][0]}",
    ]


def test_a_second_key_of_one_name_joins_the_first_so_that_it_can_be_changed_without_a_gap(folder: Path) -> None:
    run(folder, FLEET, force=False)
    (folder / "gateway-edge.key").rename(folder / "old.key")
    run(folder, ["gateway:edge"], force=False)
    lines = (folder / "allowed").read_text().splitlines()
    keys = {line.split()[-1] for line in lines if line.startswith("gateway edge ")}
    assert keys == {read_pair(folder / name)[0] for name in ("old.key", "gateway-edge.key")}


@pytest.mark.parametrize(
    "text",
    [
        *("", "nodes", "node:a", "gateway", "gateway:", "gateway:a:b", "client:a", "client:a:b:c", "admin:a"),
        *("client:a b:c", "gateway:../../etc/x", "gateway:a/b", "gateway:é", "gateway:a\n", f"gateway:{'x' * 65}"),
    ],
)
def test_what_is_no_holder_is_refused_before_anything_is_written(text: str, folder: Path) -> None:
    with pytest.raises(ConfigError):
        run(folder, ["node", text], force=True)
    assert not folder.exists()


def test_a_name_of_the_longest_length_is_a_holder() -> None:
    assert Holder.parse(f"gateway:{'x' * 64}").file_name == f"gateway-{'x' * 64}.key"


def test_two_clients_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a name of its own"):
        run(folder, ["client:app:acme", "client:app:other"], force=False)


def test_a_key_file_is_not_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "node.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        run(folder, ["node"], force=False)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be"):
        run(tmp_path / "file" / "keys", ["node"], force=False)
