"""Who a request is from: API keys and their tenants.

Keys are kept as SHA-256 digests only and looked up by the full digest in O(1), so a memory dump or a truncated cache
key tells nothing; the final comparison takes constant time. The tenant comes from the key and from nothing else in a
request. Knows nothing of quotas or of routes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from llmscale.errors import ConfigError, Unauthorized

DEFAULT_TENANT: Final = "default"
_MIN_KEY_CHARACTERS: Final = 8
_MAX_KEY_BYTES: Final = 512
_MAX_KEYS: Final = 100_000
_TENANT: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_BEARER: Final = b"bearer "


def hash_key(key: str) -> str:
    """The digest under which a key is stored, as 64 hexadecimal characters."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The keys of one gateway. Without any, every request belongs to the default tenant."""

    def __init__(self, tenants_by_digest: Mapping[str, str]) -> None:
        if len(tenants_by_digest) > _MAX_KEYS:
            raise ConfigError(f"there are {len(tenants_by_digest)} API keys, the limit is {_MAX_KEYS}")
        self._entries = {
            bytes.fromhex(digest): (bytes.fromhex(digest), tenant) for digest, tenant in tenants_by_digest.items()
        }

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self._entries)

    @property
    def tenants(self) -> list[str]:
        """Every tenant that has a key, in order."""
        return sorted({tenant for _, tenant in self._entries.values()}) or [DEFAULT_TENANT]

    def tenant_of(self, authorization: bytes | None) -> str:
        """The tenant of an Authorization header. Raises `Unauthorized`, which never tells why beyond that."""
        if not self._entries:
            return DEFAULT_TENANT
        if authorization is None:
            raise Unauthorized("an API key is needed: send the header 'Authorization: Bearer KEY'")
        key = authorization[len(_BEARER) :].strip()
        if authorization[: len(_BEARER)].lower() != _BEARER or not key or len(key) > _MAX_KEY_BYTES:
            raise Unauthorized("the Authorization header must be 'Bearer KEY'")
        digest = hashlib.sha256(key).digest()
        stored, tenant = self._entries.get(digest, (b"", ""))
        if not hmac.compare_digest(stored, digest):
            raise Unauthorized("the API key is not known")
        return tenant


def load_keys(keys: Iterable[str], path: Path | None) -> ApiKeys:
    """Keys of the default tenant, and a file with one `TENANT DIGEST` per line; `#` begins a comment."""
    found: dict[str, str] = {}
    for key in keys:
        if len(key) < _MIN_KEY_CHARACTERS or len(key.encode()) > _MAX_KEY_BYTES or key != key.strip():
            raise ConfigError(
                f"an API key has {len(key)} characters, it must have {_MIN_KEY_CHARACTERS} to {_MAX_KEY_BYTES}"
                " without spaces around it"
            )
        found[hash_key(key)] = DEFAULT_TENANT
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key file {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            fields = line.partition("#")[0].split()
            if not fields:
                continue
            if len(fields) != 2 or not _TENANT.fullmatch(fields[0]) or not _DIGEST.fullmatch(fields[1]):
                # The line itself is not repeated: it may hold a key that was pasted by mistake.
                raise ConfigError(f"{path}:{number} must be 'TENANT DIGEST', a name and 64 hexadecimal characters")
            if fields[1] in found and found[fields[1]] != fields[0]:
                raise ConfigError(f"{path}:{number} gives a key to a second tenant")
            found[fields[1]] = fields[0]
        if not found:
            raise ConfigError(f"the API key file {path} holds no key; add one, or leave the setting out")
    return ApiKeys(found)
