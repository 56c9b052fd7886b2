#!/usr/bin/env python3
"""What drawing tokens costs beside taking the likeliest: builds of `lonas serve` side by side, asked in turn.

    cargo build --release
    benches/peers/sampling.py --rounds 8 target/release/lonas [another build's lonas ...]

Streams of 16 random tokens and 64 tokens out, one and eight at a time. Tokens a second: the median of all rounds, least..most.
"""

import argparse
import pathlib
import random
import statistics
import threading
import time

import http_load

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
    "temperature 0": {"temperature": 0},
    "temperature 1": {"temperature": 1},
    "temperature 1, top_p 0.95": {"temperature": 1, "top_p": 0.95},
    "temperature 0.7, top_k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 0, logprobs 5": {"temperature": 0, "logprobs": 5},
}
OUT = 64


def rate(port: int, fields: dict, prompts: list[list[int]]) -> float:
    """Tokens a second of all streams together, from the first request on to the last token."""
    done = []
    calls = [lambda p=prompt: done.append(http_load.one(port, fields, p, OUT)) for prompt in prompts]
    threads = [threading.Thread(target=call) for call in calls]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) < len(prompts):
        raise RuntimeError("a request failed, see above")
    return len(prompts) * OUT / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", default="models/smollm2-135m-commonsense")
    args = parser.parse_args()
    random_ids, measured = random.Random(5), {}
    ports = {build: http_load.free_port() for build in args.builds}
    servers = []
    try:
        for build, port in ports.items():
            command = [build.resolve(), "serve", args.model, "--log", "warn", "--port", port]
            servers.append(http_load.Server(command, port, ROOT).__enter__())
        for _ in range(args.rounds):
            prompts = [[random_ids.choice(http_load.IDS) for _ in range(16)] for _ in range(8)]
            for streams in (1, 8):
                for name, sampling in SETTINGS.items():
                    for build, port in ports.items():
                        fields = {"model": pathlib.Path(args.model).name, "seed": 1, **sampling}
                        what = measured.setdefault((streams, name), {})
                        what.setdefault(build, []).append(rate(port, fields, prompts[:streams]))
    finally:
        for server in servers:
            server.__exit__(None, None, None)
    print(f"| streams | {' | '.join(str(build) for build in args.builds)} |\n|---|{'---|' * len(args.builds)}")
    for (streams, name), builds in measured.items():
        cells = [f"{statistics.median(r):.0f} ({min(r):.0f}..{max(r):.0f})" for r in builds.values()]
        print(f"| {streams}, {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
