"""64 clients at once for minutes, one in ten leaving early: python .ci/soak.py --minutes 5 (extra `serve`).

Starts `kivi-jax serve demo`, asks it a few texts alone, then all of them all the time. Nothing may be lost or
mixed up, nothing compiled after the start, and the server's memory must not grow.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO, Annotated, Any

import httpx2
import numpy as np
import openai
import typer

TEXTS = [
    f"Copy: {a} {b} lemon. Copied:" for a in ("moon", "owl", "tree", "river") for b in ("key", "fox", "sun")
]
GROWTH = 1.05  # of the server's memory, from the first minute to the last


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 5.0,
    clients: Annotated[int, typer.Option(min=1)] = 64,
    cache: Annotated[str, typer.Option(help="As for kivi-jax serve.")] = "kivi2",
    slots: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Check it; a failure is an exception."""
    words = ["serve", "demo", "--cache", cache, "--slots", str(slots), "--context", "256", "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "kivi_jax", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_LOG_COMPILES": "1", "COLUMNS": "200"},
    )
    assert server.stderr is not None
    try:
        line = next(line for line in iter(server.stderr.readline, "") if " at http://" in line)
        said: list[str] = []
        threading.Thread(target=listen, args=(server.stderr, said), daemon=True).start()
        address = next(word for word in line.split() if word.startswith("http://"))
        asyncio.run(soak(address, server.pid, minutes * 60, clients))
        compiled = [line for line in said if "Compiling" in line]
        print(f"compiled after the start: {len(compiled)}", *compiled[:3])
        assert not compiled
    finally:
        server.terminate()
        server.wait()


def listen(stream: IO[str], said: list[str]) -> None:
    """What the server says, line by line, so that it never waits to be heard."""
    for line in iter(stream.readline, ""):
        said.append(line)


def resident(pid: int) -> float:
    """A process's memory, in MiB."""
    fields = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(fields.split("VmRSS:")[1].split()[0]) / 1024


async def soak(address: str, pid: int, seconds: float, clients: int) -> None:
    """Ask all the time, and look at the memory every few seconds."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    options: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 48}
    alone = {
        text: (await client.completions.create(prompt=text, **options)).choices[0].text for text in TEXTS
    }
    counts: Counter[str] = Counter()
    memory: list[float] = []
    end = time.monotonic() + seconds

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident(pid))
            await asyncio.sleep(5)

    async def ask(number: int) -> None:
        random = np.random.default_rng(number)
        while time.monotonic() < end:
            text, leaves = TEXTS[random.integers(len(TEXTS))], random.random() < 0.1
            if random.random() < 0.5 and not leaves:
                found = await client.completions.create(prompt=text, **options)
                shown = found.choices[0].text
            else:
                shown, most = "", int(random.integers(1, 8)) if leaves else 10**6
                async with await client.completions.create(prompt=text, stream=True, **options) as stream:
                    async for chunk in stream:
                        shown += chunk.choices[0].text
                        if (most := most - 1) <= 0:
                            break
            counts["left" if leaves else "whole"] += 1
            counts["mixed up"] += not alone[text].startswith(shown) if leaves else shown != alone[text]

    began = time.monotonic()
    await asyncio.gather(watch(), *(ask(number) for number in range(clients)))
    took = time.monotonic() - began
    early, late = np.median(memory[: len(memory) // 5 + 1]), np.median(memory[-(len(memory) // 5 + 1) :])
    whole, left = counts["whole"], counts["left"]
    answers = (
        f"{whole} whole answers ({whole / took:.1f}/s), {left} left early, {counts['mixed up']} mixed up"
    )
    print(f"{clients} clients, {took:.0f} s: {answers}")
    print(
        f"memory of the server: {early:.0f} MiB at first, {late:.0f} MiB at last, {max(memory):.0f} at most"
    )
    stats = httpx2.get(f"{address}/metrics").text.splitlines()
    print(*(line for line in stats if line.startswith(("kivi_finished", "kivi_new_tokens"))), sep="\n")
    assert not counts["mixed up"]
    assert late <= early * GROWTH
    await client.close()


if __name__ == "__main__":
    typer.run(main)
