"""Many clients at once on a server of one's own, on loopback: throughput, memory, and whether anybody gets another's
answer.

    python scripts/load_test.py --model runs/demo/model --clients 32 --seconds 60

First every request of a list is asked alone, twice: what it gets is what it must get under load. Then one client asks
for a quarter of the time, then all of them, every second of which has its conversations streamed. Exit code 1 when an
answer was wrong or lost, or anything but 429 refused; with --least-ratio and --most-growth also when it was too slow or
took too much memory.
"""

import argparse
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from unitok.cli import positive_int
from unitok.core.errors import UserError
from unitok.core.rng import numpy_rng

LEVELS = 2  # of 255: batches of other sizes round differently
NAME = "load"
TEXTS = ["what color is the circle?", "is there a green triangle?", "red", "two", "how many objects are there?"]
COLORS = ["red", "blue", "green", "black"]


@dataclass
class Ask:
    """A request, and what it got when it was alone."""

    path: str
    body: dict[str, Any]
    expected: Any = None

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("completions")

    def answer(self, text: str, stream: bool = False) -> Any:
        """What an answer's body says; None for a stream that broke off."""
        if stream:
            events = [line.removeprefix("data: ") for line in text.splitlines() if line]
            if events[-1:] != ["[DONE]"]:
                return None
            return "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in events[:-1])
        data = json.loads(text)
        if self.is_chat:
            return data["choices"][0]["message"]["content"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in data["data"]]

    def fits(self, answer: Any) -> bool:
        if answer is None or isinstance(answer, str) or isinstance(self.expected, str):
            return answer == self.expected
        return len(answer) == len(self.expected) and all(
            np.abs(one.astype(int) - other).max() <= LEVELS for one, other in zip(answer, self.expected, strict=True)
        )


@dataclass
class Outcome:
    """What a phase gave."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB of the server's processes, once a second

    @property
    def per_second(self) -> float:
        return self.counts["right"] / self.seconds


def requests(seed: int, pictures: bool) -> list[Ask]:
    """Conversations with and without a picture, likeliest and drawn, and pictures; all different."""
    asks = []
    for i, text in enumerate(TEXTS):
        for color in COLORS:
            image = Image.new("RGB", (48, 40), "white")
            image.paste(color, (8 + i, 8, 30, 30))
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
            body = {"model": NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": 24}
            asks.append(Ask("/v1/chat/completions", body))
            drawn = {"temperature": 1.5, "seed": seed + len(asks)}
            messages = [{"role": "user", "content": f"{text} {color}"}]
            asks.append(Ask("/v1/chat/completions", body | {"messages": messages} | drawn))
    for number in range(len(asks) // 4 if pictures else 0):
        body = {"model": NAME, "prompt": f"a photo of a {COLORS[number % 4]} circle", "seed": seed + number}
        asks.append(Ask("/v1/images/generations", body))
    return asks


async def ask_once(client: httpx.AsyncClient, one: Ask, outcome: Outcome, asks: list[Ask], stream: bool) -> None:
    """One request, counted as right, crossed (another's answer), wrong, refused (429) or by its status."""
    start, stream = time.monotonic(), stream and one.is_chat
    try:
        response = await client.post(one.path, json=one.body | ({"stream": True} if stream else {}))
    except httpx.HTTPError as error:
        outcome.counts[f"lost: {type(error).__name__}"] += 1
        await asyncio.sleep(0.1)  # a server that has gone refuses thousands a second
        return
    if response.status_code == 429:
        outcome.counts["refused"] += 1
        await asyncio.sleep(min(1.0, float(response.headers["Retry-After"])))
        return
    if response.status_code != 200:
        outcome.counts[f"status {response.status_code}"] += 1
        return
    outcome.latencies.append(time.monotonic() - start)
    answer = one.answer(response.text, stream)
    if one.fits(answer):
        outcome.counts["right"] += 1
    else:
        outcome.counts["crossed" if any(other.fits(answer) for other in asks) else "wrong"] += 1


async def phase(url: str, asks: list[Ask], clients: int, seconds: float, seed: int, server: psutil.Process) -> Outcome:
    """`clients` that ask one request after the other for `seconds`."""
    outcome, start = Outcome(), time.monotonic()

    async def client_of(number: int) -> None:
        rng = numpy_rng("load", seed, number)
        while time.monotonic() - start < seconds:
            await ask_once(client, asks[int(rng.integers(len(asks)))], outcome, asks, stream=number % 2 == 1)

    async def watch() -> None:
        with suppress(psutil.NoSuchProcess):  # the server has ended; its requests are lost, and counted so
            while True:
                processes = [server, *server.children(recursive=True)]
                outcome.memory.append(sum(one.memory_info().rss for one in processes) / 2**20)
                await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client_of(number) for number in range(clients)))
        watching.cancel()
    outcome.seconds = time.monotonic() - start
    return outcome


def learn(url: str, asks: list[Ask]) -> None:
    """What each request gets alone; UserError when it gets another answer the second time."""
    with httpx.Client(base_url=url, timeout=300) as client:
        for turn in range(2):
            for one in asks:
                try:
                    response = client.post(one.path, json=one.body)
                except httpx.HTTPError as error:
                    raise UserError(f"{one.path}: no answer ({error!r}); run `unitok serve` to see why") from error
                if response.status_code != 200:
                    raise UserError(f"{one.path}: {response.text}")
                answer = one.answer(response.text)
                if turn and not one.fits(answer):
                    raise UserError(f"{one.body}: two answers when asked alone twice")
                one.expected = answer


def start_server(model: str, options: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """`unitok serve` in a process of its own, and its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "unitok", "serve", "--model", model, "--name", NAME, "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
            return server, url
        except httpx.HTTPError:
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise UserError(f"the server of {model} did not start; run `unitok serve` to see why") from None
            time.sleep(0.2)


def summary(alone: Outcome, load: Outcome, clients: int, workers: int) -> dict[str, Any]:
    """The figures."""
    quarter = max(1, len(load.memory) // 4)
    early, late = load.memory[quarter : 2 * quarter] or load.memory, load.memory[-quarter:]
    return {
        "clients": clients,
        "workers": workers,
        "seconds": round(load.seconds, 1),
        "counts": dict(load.counts),
        "per_second_alone": round(alone.per_second, 2),
        "per_second": round(load.per_second, 2),
        "ratio": round(load.per_second / alone.per_second, 2) if alone.per_second else 0.0,
        "median_seconds": _percentile(load.latencies, 50, 3),
        "p95_seconds": _percentile(load.latencies, 95, 3),
        "memory_mib": {"second quarter": _percentile(early, 50, 1), "last quarter": _percentile(late, 50, 1)},
    }


def _percentile(values: list[float], share: float, digits: int) -> float | None:
    """None where nothing was measured."""
    return round(float(np.percentile(values, share)), digits) if values else None


def failures(figures: dict[str, Any], least_ratio: float, most_growth: float) -> list[str]:
    """What was not as it must be."""
    memory = figures["memory_mib"]
    growth = memory["last quarter"] / memory["second quarter"] if memory["second quarter"] else 0.0
    found = [f"{number} x {what}" for what, number in figures["failed"].items()]
    if figures["server_exit_code"]:
        found.append(f"the server ended with exit code {figures['server_exit_code']}")
    if figures["ratio"] < least_ratio:
        found.append(f"{figures['ratio']} times as many answers as with one client; expected at least {least_ratio:g}")
    if growth > most_growth:
        found.append(f"memory is {growth:.3f} times that of the second quarter; expected at most {most_growth:g}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the test and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--clients", type=positive_int, default=32)
    parser.add_argument("--seconds", type=positive_int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pictures", action="store_true", help="conversations only")
    parser.add_argument("--workers", type=int, default=2, help="copies of the model (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--least-ratio", type=float, default=0.0, help="answers a second over those with one client")
    parser.add_argument("--most-growth", type=float, default=inf, help="memory at the end over that of the 2nd quarter")
    parser.add_argument("--out", metavar="FILE", help="write the figures here too")
    arguments = parser.parse_args(argv)
    # Nobody waits for company: one client alone would pay for it, which would make the ratio look better.
    options = ["--max-wait-ms", "0", "--max-batch", str(arguments.max_batch), "--max-queue", str(arguments.max_queue)]
    options += ["--workers", str(arguments.workers)]
    server, url = start_server(arguments.model, options)
    try:
        asks = requests(arguments.seed, not arguments.no_pictures)
        learn(url, asks)
        process = psutil.Process(server.pid)
        alone = asyncio.run(phase(url, asks, 1, arguments.seconds / 4, arguments.seed, process))
        load = asyncio.run(phase(url, asks, arguments.clients, arguments.seconds, arguments.seed, process))
    finally:
        server.terminate()
        code = server.wait(timeout=60)
    failed = {what: n for what, n in (load.counts + alone.counts).items() if what not in ("right", "refused")}
    figures = summary(alone, load, arguments.clients, arguments.workers) | {"server_exit_code": code, "failed": failed}
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    found = failures(figures, arguments.least_ratio, arguments.most_growth)
    for one in found:
        print(f"load_test: {one}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"load_test: error: {error}")
