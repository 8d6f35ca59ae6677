"""Asks every model of a server the same question at once: python examples/several_models/ask.py [URL] [QUESTION]"""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI


async def main(url: str = "http://127.0.0.1:8000", question: str = "What is 23 + 45?") -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(model: str) -> str:
            messages = [{"role": "user", "content": question}]
            answer = await client.chat.completions.create(model=model, messages=messages, temperature=0)
            return f"{model}: {answer.choices[0].message.content}"

        models = [model.id async for model in client.models.list()]
        print(*await asyncio.gather(*map(ask, models)), sep="\n")


asyncio.run(main(*sys.argv[1:]))
