"""Requests as bytes, and what to read off the answers. Knows nothing of what is tested."""

from __future__ import annotations

import json

HEADER = b"Host: localhost\r\n"
BODY = b'{"model":"tiny","prompt":"x","max_tokens":1}'


def post(body: bytes, *, path: str = "/v1/completions", extra: bytes = b"Connection: close\r\n") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n".encode()
    return head + HEADER + extra + b"\r\n" + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def code(answer: bytes) -> str:
    error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])
