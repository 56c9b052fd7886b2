#!/usr/bin/env python3
"""lonas beside llama.cpp on the same machine, in turn, as a Markdown page in benches/runs/.

    benches/peers/setup.sh                  # once: builds llama.cpp and its models
    cargo build --release
    benches/peers/compare.py --rounds 5     # see --help

Three parts (--parts):
  steps    prefill of 512 tokens; decoding with 1 to 16 streams from several contexts; a rank-32 adapter beside the
           base on both sides, and left out. `lonas bench` against benches/peers/lora.cpp.
  http     `lonas serve` against `llama-server --lora` over /v1/completions: prompts of 128 random token ids, 64 tokens
           out, end-of-text ignored, 1 and 8 streams in a closed loop. The client shares the machine.
  quality  lonas only: mean loss on a text for each number format, by echoed log probabilities.

Both sides take turns within each round and swap who goes first from round to round, so only ratios within a round are
compared; their median counts. Each sample knows how much of the machine other processes and its host took meanwhile;
where there are rounds below QUIET, only those count.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

import http_load
from noise import Noise, wait_until_quiet

# lonas' number format of base weights, and llama.cpp's of the same size.
FORMATS = {"int8": "q8_0", "bf16": "bf16", "q4": "q4_0"}
# Most that others may take of the machine in a round that counts.
QUIET = 0.06
ROOT = pathlib.Path(__file__).resolve().parents[2]


def peers_folder() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("LONAS_PEERS") or pathlib.Path(cache) / "lonas-peers")


PEERS = peers_folder()
ADAPTER = PEERS / "model/lora-r32-f16.gguf"


def peer_model(dtype: str) -> pathlib.Path:
    return PEERS / f"model/smollm2-{FORMATS[dtype]}.gguf"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["steps", "http", "quality"], default=["steps", "http", "quality"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048])
    parser.add_argument("--streams", default="1,4,8,16", help="of the steps part")
    parser.add_argument("--http-streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "README.md", help="of the quality part")
    parser.add_argument("--quiet-seconds", type=float, default=20, help="longest wait for a quiet machine before a sample")
    parser.add_argument("--lonas", type=pathlib.Path, default=ROOT / "target/release/lonas")
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-commonsense"))
    parser.add_argument("--machine", help="for the file's name; by default processor and cores")
    parser.add_argument("--out", type=pathlib.Path, help="by default benches/runs/DATE-MACHINE-peers.md")
    return parser.parse_args()


def output(command: list) -> str:
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, cwd=ROOT)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{ran.stderr[-2000:]}")
    return ran.stdout


def known_dtypes(args: argparse.Namespace) -> list[str]:
    """Those of --dtypes that this lonas has."""
    accepted = output([args.lonas, "bench", "--help"])
    known = [d for d in args.dtypes if f"- {d}" in accepted or f"{d}," in accepted or f"{d}]" in accepted]
    for dtype in set(args.dtypes) - set(known):
        print(f"{dtype}: this lonas has no such --dtype; left out", file=sys.stderr)
    return known


# --- steps ------------------------------------------------------------------------------------------------------------


def lonas_steps(args, dtype: str, threads: int, context: int) -> list[dict]:
    lines = output([
        args.lonas, "bench", args.model, "--json", "--rounds", 1, "--subnetwork", "maximal", "--without-adapter",
        "--prompt", 512, "--output", 128, "--context", context, "--streams", args.streams,
        "--dtype", dtype, "--threads", threads,
    ])
    lines = [json.loads(line) for line in lines.splitlines()]
    rates = [line for line in lines if line["test"] in ("prefill", "decode")]
    return [{**r, "rate": r["tokens_per_second"]["median"], "bound": r["share_of_bound"]} for r in rates]


def llama_steps(args, dtype: str, threads: int, context: int) -> list[dict]:
    lines = output([PEERS / "lora", peer_model(dtype), ADAPTER, threads, 1, context, args.streams])
    rates = [json.loads(line) for line in lines.splitlines()]
    return [{**r, "rate": r["tokens_per_second"], "bound": None} for r in rates]


def measure_steps(args, dtypes: list[str]) -> list[dict]:
    """Samples: side, round, dtype, threads, test, context, streams, adapter, rate, bound, others."""
    samples = []
    cases = list(itertools.product(range(args.rounds), dtypes, args.threads, args.contexts))
    for round_, dtype, threads, context in cases:
        for side, measure in in_turn({"lonas": lonas_steps, "llama.cpp": llama_steps}, round_):
            wait_until_quiet(args.quiet_seconds)
            with Noise() as noise:
                rates = measure(args, dtype, threads, context)
            note("steps", round_, f"{dtype} x{threads} from {context} {side}", noise)
            for rate in rates:
                # Prefill is measured with every context; once is enough.
                if rate["test"] == "decode" or context == args.contexts[0]:
                    keys = ("test", "context", "streams", "adapter", "rate", "bound")
                    about = {"side": side, "round": round_, "dtype": dtype, "threads": threads, "others": noise.others}
                    samples.append(about | {k: rate[k] for k in keys})
    return samples


def in_turn(sides: dict, round_: int) -> list[tuple]:
    """Another side goes first in each round."""
    return list(sides.items())[:: 1 if round_ % 2 == 0 else -1]


def note(part: str, round_: int, what: str, noise: Noise) -> None:
    print(f"{part}, round {round_ + 1}: {what}; others took {noise.others:.0%}", file=sys.stderr)


def counted(samples: list[dict]) -> tuple[list[int], str]:
    """The rounds that count, and how many of all were quiet."""
    rounds = sorted({s["round"] for s in samples})
    quiet = [r for r in rounds if all(s["others"] < QUIET for s in samples if s["round"] == r)]
    return quiet or rounds, f"{len(quiet)} of {len(rounds)}"


def spread(values: list[float], form: str = "{:.2f}") -> str:
    median = form.format(statistics.median(values))
    return median if len(values) < 2 else f"{median} ({form.format(min(values))}..{form.format(max(values))})"


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def steps_table(samples: list[dict]) -> str:
    titles = [
        "lonas / llama.cpp", "threads", "test", "lonas, tok/s", "llama.cpp, tok/s", "ratio", "ratio without adapters",
        "adapter's share: lonas", "llama.cpp", "lonas, of bound", "quiet rounds",
    ]
    rows = {}
    for sample in samples:
        key = tuple(sample[k] for k in ("dtype", "threads", "test", "context", "streams"))
        rows.setdefault(key, []).append(sample)
    order = sorted(rows, key=lambda k: (list(FORMATS).index(k[0]), k[1], k[2] != "prefill", k[3], k[4]))
    return table(titles, [steps_row(*key, rows[key]) for key in order])


def steps_row(dtype: str, threads: int, test: str, context: int, streams: int, samples: list[dict]) -> list[str]:
    rounds, quiet = counted(samples)
    of_round = {(s["side"], s["adapter"], s["round"]): s for s in samples}

    def rates(side: str, adapter: bool) -> list[float]:
        return [of_round[side, adapter, r]["rate"] for r in rounds]

    def over(a: list[float], b: list[float]) -> list[float]:
        return [x / y for x, y in zip(a, b)]

    def adapter_share(side: str) -> list[float]:
        return [1 - x for x in over(rates(side, True), rates(side, False))]

    return [
        f"{dtype} / {FORMATS[dtype]}",
        str(threads),
        "prefill 512" if test == "prefill" else f"decode x{streams} from {context}",
        spread(rates("lonas", True), "{:.0f}"),
        spread(rates("llama.cpp", True), "{:.0f}"),
        f"**{spread(over(rates('lonas', True), rates('llama.cpp', True)))}**",
        spread(over(rates("lonas", False), rates("llama.cpp", False))),
        spread(adapter_share("lonas"), "{:.0%}"),
        spread(adapter_share("llama.cpp"), "{:.0%}"),
        spread([of_round["lonas", True, r]["bound"] for r in rounds], "{:.0%}"),
        quiet,
    ]


# --- http -------------------------------------------------------------------------------------------------------------


def server_command(args, side: str, dtype: str, threads: int, port: int) -> list:
    if side == "lonas":
        # Rounds ask for the same prompts; llama-server computes them anew, too.
        options = ["--port", port, "--threads", threads, "--dtype", dtype, "--prefix-cache=false"]
        return [args.lonas, "serve", args.model, *options]
    most = max(args.http_streams)
    return [
        PEERS / "build/bin/llama-server", "-m", peer_model(dtype), "--lora", ADAPTER, "-t", threads, "-tb", threads,
        "-np", most, "-c", 1024 * most, "--host", "127.0.0.1", "--port", port, "--no-webui",
    ]


def measure_http(args, dtypes: list[str]) -> list[dict]:
    """Samples: side, round, dtype, streams, what `http_load.load` returns, others."""
    samples = []
    threads, most = max(args.threads), max(args.http_streams)
    fields = {"lonas": {"model": model_name(args)}, "llama.cpp": {"cache_prompt": False}}
    for round_, dtype in itertools.product(range(args.rounds), dtypes):
        for side, own in in_turn(fields, round_):
            port = http_load.free_port()
            with http_load.Server(server_command(args, side, dtype, threads, port), port, ROOT) as server:
                http_load.load(port, own, most, requests=most, tokens=8)
                for streams in args.http_streams:
                    wait_until_quiet(args.quiet_seconds)
                    with Noise(server.process.pid) as noise:
                        result = http_load.load(port, own, streams, requests=max(4, 2 * streams))
                    note("http", round_, f"{dtype} x{streams} {side}", noise)
                    about = {"side": side, "round": round_, "dtype": dtype, "streams": streams, "others": noise.others}
                    samples.append(about | result)
    return samples


def model_name(args) -> str:
    return pathlib.Path(args.model).name + ":maximal"


def http_table(samples: list[dict]) -> str:
    fields = [
        ("tokens_per_second", "out, tok/s", "{:.1f}"),
        ("ttft_p50", "TTFT p50, ms", "{:.0f}"),
        ("ttft_p95", "p95", "{:.0f}"),
        ("itl_p50", "ITL p50, ms", "{:.1f}"),
        ("itl_p95", "p95", "{:.1f}"),
    ]
    rows = []
    for dtype, streams in dict.fromkeys((s["dtype"], s["streams"]) for s in samples):
        own = [s for s in samples if (s["dtype"], s["streams"]) == (dtype, streams)]
        rounds, quiet = counted(own)
        of_round = {(s["side"], s["round"]): s for s in own}
        rates = [[of_round[side, r]["tokens_per_second"] for r in rounds] for side in ("lonas", "llama.cpp")]
        ratio = spread([a / b for a, b in zip(*rates)])
        for side, last in [("lonas", [f"**{ratio}**", quiet]), ("llama.cpp", ["", ""])]:
            values = [form.format(statistics.median(of_round[side, r][field] for r in rounds)) for field, _, form in fields]
            rows.append([f"{dtype} / {FORMATS[dtype]}", str(streams), side, *values, *last])
    titles = ["lonas / llama.cpp", "streams", "server", *(title for _, title, _ in fields), "ratio of tok/s", "quiet rounds"]
    return table(titles, rows)


# --- quality ----------------------------------------------------------------------------------------------------------


def measure_quality(args, dtypes: list[str]) -> dict[str, tuple[float, int]]:
    """By dtype: mean loss in nats and the number of tokens; f32 to compare with."""
    losses = {}
    text = args.text.read_text(encoding="utf-8")
    for dtype in ["f32", *dtypes]:
        port = http_load.free_port()
        with http_load.Server(server_command(args, "lonas", dtype, max(args.threads), port), port, ROOT):
            losses[dtype] = http_load.loss(port, model_name(args), text)
    return losses


def quality_table(losses: dict[str, tuple[float, int]]) -> str:
    exact = losses["f32"][0]
    rows = [
        [dtype, f"{loss:.4f}", f"{math.exp(loss):.3f}", f"{loss - exact:+.4f}", str(tokens)]
        for dtype, (loss, tokens) in losses.items()
    ]
    return table(["base as", "loss, nats a token", "perplexity", "over f32's loss", "tokens"], rows)


# --- the page ---------------------------------------------------------------------------------------------------------


def machine_name() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)
    return f"{model} x{os.cpu_count()}"


def main() -> None:
    args = arguments()
    args.lonas = args.lonas.resolve()
    if not (PEERS / "lora").exists():
        sys.exit(f"nothing in {PEERS}: run benches/peers/setup.sh first, or set LONAS_PEERS")
    dtypes = known_dtypes(args)
    if not dtypes:
        sys.exit("no dtype is left to measure")
    machine = args.machine or machine_name()
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine.lower()).split())
    today = datetime.date.today().isoformat()
    out = args.out or ROOT / f"benches/runs/{today}-{slug}-peers.md"
    commit = output(["git", "describe", "--always", "--dirty"]).strip()
    command = "benches/peers/compare.py " + " ".join(sys.argv[1:])
    page = (
        f"# {today}, {machine}: lonas beside llama.cpp\n\n    {command.strip()}\n\n"
        f"lonas {commit}; llama.cpp as benches/peers/setup.sh builds it. SmolLM2-135M, maximal sub-network, rank-32 "
        f"adapters on q, k, v, gate, up and down on both sides. {args.rounds} rounds in turn: median (min..max), ratios "
        f"within a round, above 1 where lonas is faster. A round is quiet where others took less than {QUIET:.0%} of the "
        "machine; where there are such rounds, only they count.\n"
    )
    raw = PEERS / f"results/{today}-{time.strftime('%H%M%S')}.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    if "steps" in args.parts:
        results["steps"] = measure_steps(args, dtypes)
        page += "\n## Steps, in process\n\n" + steps_table(results["steps"])
    if "http" in args.parts:
        results["http"] = measure_http(args, dtypes)
        page += f"\n## Over HTTP, {max(args.threads)} threads\n\n" + http_table(results["http"])
    if "quality" in args.parts:
        results["quality"] = measure_quality(args, dtypes)
        page += f"\n## Loss of lonas on {args.text.name}, maximal sub-network\n\n" + quality_table(results["quality"])
    raw.write_text(json.dumps(results))
    out.write_text(page)
    print(f"{out}\nsamples: {raw}", file=sys.stderr)


if __name__ == "__main__":
    main()
