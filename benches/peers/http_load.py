"""A server for a while, and what its clients see: time to first token, gaps between tokens, tokens a second, loss."""

import http.client
import json
import pathlib
import random
import socket
import subprocess
import tempfile
import threading
import time

PROMPT = 128
OUTPUT = 64
# Token ids that are words in SmolLM2's vocabulary: special ones lie below, the last ones above.
IDS = range(100, 49_000)
# Tokens of one window of the text whose loss is measured.
WINDOW = 512
PATIENCE = 300


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A server that runs within a `with`."""

    def __init__(self, command: list, port: int, folder: pathlib.Path):
        self.command, self.port, self.folder = [str(c) for c in command], port, folder

    def __enter__(self):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, cwd=self.folder)
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE and self.process.poll() is None:
            try:
                if get(self.port, "/health") == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"{' '.join(self.command)} does not listen; it said\n{self.said}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.log.seek(0)
        self.said = self.log.read()[-2000:].decode(errors="replace")
        self.log.close()


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def post(port: int, path: str, body: dict) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {response.read()[:500]!r}")
    return connection, response


def one(port: int, fields: dict, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
    """When the request was sent, and when each chunk with text came."""
    body = {
        "temperature": 0, **fields, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    connection, response = post(port, "/v1/completions", body)
    times, generated = [], None
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        now, chunk = time.perf_counter(), json.loads(line[6:])
        if any(choice.get("text") for choice in chunk["choices"]):
            times.append(now)
        generated = (chunk.get("usage") or {}).get("completion_tokens", generated)
    connection.close()
    if generated != tokens or not times:
        raise RuntimeError(f"expected {tokens} tokens, got {generated} in {len(times)} chunks")
    return sent, times


def load(port: int, fields: dict, streams: int, requests: int, tokens: int = OUTPUT) -> dict:
    """So many requests by so many clients, each of which sends its next one when it has its answer. Milliseconds."""
    # The same prompts on both sides.
    ids = random.Random(streams)
    prompts = [[ids.choice(IDS) for _ in range(PROMPT)] for _ in range(requests)]
    answers, failures, lock = [], [], threading.Lock()

    def client() -> None:
        while not failures:
            with lock:
                if not prompts:
                    return
                prompt = prompts.pop()
            try:
                answers.append(one(port, fields, prompt, tokens))
            except Exception as failure:
                failures.append(failure)

    clients = [threading.Thread(target=client) for _ in range(streams)]
    began = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    first = [1e3 * (times[0] - sent) for sent, times in answers]
    gaps = [1e3 * (b - a) for _, times in answers for a, b in zip(times, times[1:])]
    return {
        "ttft_p50": percentile(first, 50), "ttft_p95": percentile(first, 95),
        "itl_p50": percentile(gaps, 50), "itl_p95": percentile(gaps, 95),
        "tokens_per_second": requests * tokens / seconds,
    }


def percentile(values: list[float], percent: int) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, percent * len(ordered) // 100)]


def loss(port: int, model: str, text: str) -> tuple[float, int]:
    """Mean negative log likelihood of the text's tokens in windows, each window's first token left out."""
    connection, response = post(port, "/tokenize", {"prompt": text, "add_special_tokens": False})
    tokens = json.load(response)["tokens"]
    connection.close()
    total, count = 0.0, 0
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        if len(window) < 2:
            continue
        body = {"model": model, "prompt": window, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        connection, response = post(port, "/v1/completions", body)
        scores = json.load(response)["choices"][0]["logprobs"]["token_logprobs"][1 : len(window)]
        connection.close()
        total, count = total - sum(scores), count + len(scores)
    return total / count, count
