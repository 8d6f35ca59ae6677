"""Goal: whether a prompt was computed before is known to the tenant who sent it, and to nobody else.

Method: a real server with two keys; the usage of equal prompts says how many of their tokens were found in the cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.processes import serving

PROMPT = "Once upon a time there was a fox who liked to count. " * 12


def test_a_tenant_finds_its_own_prefixes_in_the_cache_and_never_another_tenants(tmp_path: Path) -> None:
    keys = {tenant: f"{tenant}-" + "k" * 32 for tenant in ("first", "second")}
    lines = [f"{tenant} {hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in keys.items()]
    (tmp_path / "keys").write_text("\n".join(lines) + "\n")
    body = {"model": "tiny-chat", "prompt": PROMPT, "max_tokens": 1}
    with serving("tiny-chat", "--api-key-file", str(tmp_path / "keys")) as server:

        def cached_tokens(tenant: str) -> int:
            headers = {"authorization": f"Bearer {keys[tenant]}"}
            answer = server.client.post(f"{server.base}/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert cached_tokens("first") == 0
        assert cached_tokens("first") >= 64
        assert cached_tokens("second") == 0
        assert cached_tokens("second") >= 64
