"""API keys decide who a request is from, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.errors import ConfigError, Unauthorized
from llmscale.gateway.auth import hash_key, load_keys
from llmscale.gateway.config import GatewayConfig


def test_a_key_gives_its_tenant(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\nacme {hash_key('key-of-acme')}\nglobex {hash_key('key-of-globex')} # two\n\n")
    keys = load_keys(["key-of-nobody"], path)
    assert keys.tenant_of(b"Bearer key-of-acme") == "acme"
    assert keys.tenant_of(b"bearer key-of-globex") == "globex"
    assert keys.tenant_of(b"Bearer key-of-nobody") == "default"
    assert keys.tenants == ["acme", "default", "globex"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic key-of-acme",
        b"Bearer key-of-acme2",
        b"Bearer key-of-acm",
        b"Bearer \xff\xfe",
        b"Bearer ' OR '1'='1",
        b"Bearer key-of-acme\x00",
        b"Bearer " + b"x" * 100_000,
        hash_key("key-of-acme").encode(),
        b"Bearer " + hash_key("key-of-acme").encode(),
    ],
)
def test_anything_but_the_whole_key_is_refused(header: bytes | None) -> None:
    with pytest.raises(Unauthorized):
        load_keys(["key-of-acme"], None).tenant_of(header)


def test_two_keys_with_a_long_common_prefix_are_two_tenants(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    prefix = "x" * 200
    path.write_text(f"a {hash_key(prefix + '1')}\nb {hash_key(prefix + '2')}\n")
    keys = load_keys([], path)
    assert keys.tenant_of(f"Bearer {prefix}1".encode()) == "a"
    assert keys.tenant_of(f"Bearer {prefix}2".encode()) == "b"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("acme secret-key-in-clear", "TENANT DIGEST"),
        ("acme", "TENANT DIGEST"),
        (f"bad/name {'0' * 64}", "TENANT DIGEST"),
        (f"a {'0' * 64}\nb {'0' * 64}", "second tenant"),
        ("# nothing", "holds no key"),
    ],
)
def test_a_malformed_key_file_is_refused_without_repeating_it(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint) as refused:
        load_keys([], path)
    assert "secret" not in str(refused.value)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 to 512"):
        load_keys(["short"], None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_listening_beyond_this_machine_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        GatewayConfig(host=host)
    assert GatewayConfig(host=host, api_keys=("long-enough-key",)).asks_for_keys


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_without_keys_every_request_on_this_machine_is_the_default_tenants(host: str) -> None:
    assert not GatewayConfig(host=host).asks_for_keys
    assert load_keys([], None).tenant_of(None) == "default"
