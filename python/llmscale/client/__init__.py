"""The SDK: one client for gateways (HTTP) and nodes (ZeroMQ), sync and async, pure Python.

`Client("http://127.0.0.1:8000").generate("Once upon a time")` completes a prompt; the address alone decides the
transport. What both transports and both styles share (formats, stream state, errors) is written once and does no input
or output of its own.
"""

from llmscale.client.asynchronous import AsyncClient, AsyncStream
from llmscale.client.keys import CurveKeys
from llmscale.client.results import Health, ModelInfo, StreamChunk
from llmscale.client.synchronous import Client, Stream

__all__ = ["AsyncClient", "AsyncStream", "Client", "CurveKeys", "Health", "ModelInfo", "Stream", "StreamChunk"]
