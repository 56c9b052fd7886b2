#!/usr/bin/env python3
"""What the prefix cache brings: one build's `lonas serve` with and without it, side by side, asked in turn.

    cargo build --release
    benches/peers/prefix.py --rounds 8

Prompts are random token ids, others in each round. Seconds, least..most of all rounds around the median.
"""

import argparse
import pathlib
import random
import statistics
import threading
import time

import http_load

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIDES = {"without": "false", "with": "true"}


def first_token(port: int, fields: dict, prompt: list[int]) -> float:
    sent, times = http_load.one(port, fields, prompt, 1)
    return times[0] - sent


def together(calls: list) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(ports: dict, fields: dict, ids, note) -> None:
    """One round; `note` takes what was measured, the side and a number."""
    common = ids(400)
    prompts = [common + ids(20) for _ in range(4)]
    for side, port in ports.items():
        first, *later = [first_token(port, fields, prompt) for prompt in prompts]
        note("420 tokens, the first with these 400", side, first)
        for seconds in later:
            note("420 tokens, each later one", side, seconds)
    common = ids(400)
    prompts = [common + ids(20) for _ in range(8)]
    for side, port in ports.items():
        times = []
        together([lambda p=prompt: times.append(first_token(port, fields, p)) for prompt in prompts])
        if len(times) < len(prompts):
            raise RuntimeError("a request failed, see above")
        note("eight of 420 at once, 400 in common: the median", side, statistics.median(times))
        note("the last of these eight", side, max(times))
    prompt = ids(500)
    for side, port in ports.items():
        began = time.perf_counter()
        body = {**fields, "prompt": prompt, "max_tokens": 1, "n": 4, "ignore_eos": True}
        connection, response = http_load.post(port, "/v1/completions", body)
        response.read()
        connection.close()
        note("four answers to 500 tokens", side, time.perf_counter() - began)
    # Nothing in common; on each side in its turn.
    prompts = [ids(128) for _ in range(16)]
    for side, port in ports.items():
        began = time.perf_counter()
        halves = [prompts[start::8] for start in range(8)]
        together([lambda of=half: [http_load.one(port, fields, p, 64) for p in of] for half in halves])
        note("nothing in common, eight streams: 16 times 128 and 64 tokens", side, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--lonas", type=pathlib.Path, default=ROOT / "target/release/lonas")
    parser.add_argument("--model", default="models/smollm2-135m-commonsense")
    args = parser.parse_args()
    fields, random_ids = {"model": pathlib.Path(args.model).name}, random.Random(5)
    measured: dict = {}

    def ids(count: int) -> list[int]:
        return [random_ids.choice(http_load.IDS) for _ in range(count)]

    def note(what: str, side: str, seconds: float) -> None:
        measured.setdefault(what, {}).setdefault(side, []).append(seconds)

    ports = {side: http_load.free_port() for side in SIDES}
    command = [args.lonas.resolve(), "serve", args.model, "--log", "warn"]
    servers = [
        http_load.Server([*command, "--port", ports[side], f"--prefix-cache={cache}"], ports[side], ROOT)
        for side, cache in SIDES.items()
    ]
    with servers[0], servers[1]:
        for _ in range(args.rounds):
            measure(ports, fields, ids, note)
    print("| seconds | without the cache | with it |\n|---|---|---|")
    for what, sides in measured.items():
        cells = [f"{statistics.median(s):.3f} ({min(s):.3f}..{max(s):.3f})" for s in sides.values()]
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
