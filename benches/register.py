#!/usr/bin/env python3
"""What it costs to register a sub-network with a running server, and to switch between registered ones.

    cargo build --release && benches/register.py [--model DIR] [--count 1000]

Starts `lonas serve`, registers COUNT random sub-networks over one connection, and says how many bytes each took, how long,
and by how much the server grew. Then short requests (8 tokens in, 1 out: one step each) are answered by one sub-network,
and by another one each time; all of them are `minimal` under different names, so that nothing but the switch differs.
Ten of one kind and ten of the other alternate. Standard library only.
"""

import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import time

KEY = "bench"


class Server:
    def __init__(self, arguments):
        command = [arguments.lonas, "serve", arguments.model, "--port", "0", "--admin-key", KEY]
        self.process = subprocess.Popen(command + arguments.more, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"listening on http://([0-9.]+):([0-9]+)", line):
                break
        # The rest of the log goes nowhere, but must not fill the pipe.
        subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        self.connection = http.client.HTTPConnection(found[1], int(found[2]))

    def ask(self, method, path, body=None):
        """Answer and milliseconds."""
        text = json.dumps(body) if body is not None else None
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        began = time.perf_counter()
        self.connection.request(method, path, text, headers)
        answer = self.connection.getresponse()
        said = answer.read()
        took = 1e3 * (time.perf_counter() - began)
        assert answer.status < 300, (answer.status, said)
        return json.loads(said), took

    def resident(self):
        """Bytes in memory."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return 1024 * int(re.search(r"VmRSS:\s+([0-9]+)", status.read())[1])


def quantiles(times):
    ordered = sorted(times)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return f"median {statistics.median(ordered):.3f}, 99 % {at(0.99):.3f}, most {ordered[-1]:.3f} ms"


def one_step(server, name):
    body = {"model": name, "prompt": [5, 6, 7, 8, 9, 10, 11, 12], "max_tokens": 1, "temperature": 0}
    return server.ask("POST", "/v1/completions", body)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lonas", default="target/release/lonas")
    parser.add_argument("--model", default="models/smollm2-135m-commonsense")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    arguments, arguments.more = parser.parse_known_args()
    random.seed(0)
    with open(os.path.join(arguments.model, "supernet.json")) as file:
        supernet = json.load(file)
    groups, model = [g["choices"] for g in supernet["groups"]], supernet["name"]
    server = Server(arguments)
    try:
        minimal = server.ask("GET", f"/v1/subnetworks/{model}:minimal")[0]["choices"]
        steps = [one_step(server, f"{model}:minimal") for _ in range(200)]
        print(f"one step of minimal, {len(groups)} groups, before: {quantiles(steps)}")
        before, sizes, times = server.resident(), [], []
        for number in range(arguments.count):
            # Half of them are minimal by other names, for the switching.
            choices = minimal if number % 2 else [random.choice(c) for c in groups]
            body = {"model": model, "name": f"n{number}", "choices": choices}
            sizes.append(len(json.dumps(body)))
            times.append(server.ask("POST", "/v1/subnetworks", body)[1])
        grown = (server.resident() - before) / arguments.count
        print(f"{arguments.count} registered: bodies of {min(sizes)} to {max(sizes)} bytes, {grown / 1024:.1f} KiB of memory each")
        print(f"to register one, over HTTP: {quantiles(times)}; the last hundred: {quantiles(times[-100:])}")
        names = [f"{model}:n{number}" for number in range(1, arguments.count, 2)]
        same, other, ratios = [], [], []
        for turn in range(arguments.rounds):
            ten = [names[(10 * turn + i) % len(names)] for i in range(10)]
            # Who begins takes turns too.
            rows = [[ten[0]] * 10, ten][:: 1 if turn % 2 else -1]
            times = [[one_step(server, name) for name in row] for row in rows][:: 1 if turn % 2 else -1]
            same, other = same + times[0], other + times[1]
            ratios.append(statistics.median(times[1]) / statistics.median(times[0]))
        print(f"one step, the same sub-network each time: {quantiles(same)}")
        print(f"one step, another sub-network each time: {quantiles(other)}")
        quarters = statistics.quantiles(ratios, n=4)
        print(f"ratio of medians of ten in turn: {quarters[1]:.4f} (quartiles {quarters[0]:.4f}..{quarters[2]:.4f})")
        removed = [server.ask("DELETE", f"/v1/subnetworks/{model}:n{n}")[1] for n in range(arguments.count)]
        print(f"to remove one: {quantiles(removed)}")
    finally:
        server.process.terminate()
        server.process.wait()


if __name__ == "__main__":
    main()
