"""Exports sub-networks and compares what llama.cpp writes with what lonas serves.

Usage: python check_llama_cpp.py LONAS LLAMA_SERVER MODEL_FOLDER DTYPE SUBNETWORK...

LONAS and LLAMA_SERVER are programs, MODEL_FOLDER a super-network. Both answer greedily in f32 (`--dtype f32`; f32 keys and
values); llama.cpp reads the weights as DTYPE. In f32 every text must be the same.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PROMPTS = [
    "Question: What do plants need to make food?\nAnswer:",
    "Question: Which of these is a mammal, a frog or a whale?\nAnswer:",
    "The capital of France is",
    "It's 1234 km, isn't it?  Well --\n\tnaïve café 日本",
    "def fibonacci(n):",
]
TOKENS = 24
LONAS_PORT, LLAMA_PORT = 18961, 18962


def ask(port, path, body):
    head = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), head)
    return json.load(urllib.request.urlopen(request, timeout=120))


class Server:
    def __init__(self, command, port):
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return
            except OSError:
                assert self.process.poll() is None, f"{command} ended"
                time.sleep(0.1)
        raise AssertionError(f"{command} does not answer")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def ours(model, subnetwork, prompt):
    body = {"model": model, "elastic": {"subnetwork": subnetwork}, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    choice = ask(LONAS_PORT, "/v1/completions", body)["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def theirs(prompt):
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 1, "cache_prompt": False}
    answer = ask(LLAMA_PORT, "/completion", body)
    return answer["content"], [p["logprob"] for p in answer["completion_probabilities"]]


def main(lonas, llama_server, model_folder, dtype, *subnetworks):
    model = json.loads(Path(model_folder, "supernet.json").read_text())["name"]
    serve = [lonas, "serve", model_folder, "--dtype", "f32", "--port", str(LONAS_PORT)]
    same = 0
    with tempfile.TemporaryDirectory() as folder, Server(serve, LONAS_PORT):
        for subnetwork in subnetworks:
            file = f"{folder}/{subnetwork}.gguf"
            command = [lonas, "export", model_folder, "--subnetwork", subnetwork, "--format", "gguf", "--out", file, "--dtype", dtype]
            subprocess.run(command, check=True)
            llama = [llama_server, "-m", file, "--port", str(LLAMA_PORT), "-c", "512", "-t", "2", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
            with Server(llama, LLAMA_PORT):
                for prompt in PROMPTS:
                    tokens = [ask(port, "/tokenize", body)["tokens"] for port, body in (
                        (LONAS_PORT, {"model": model, "prompt": prompt}), (LLAMA_PORT, {"content": prompt, "add_special": True}))]
                    assert tokens[0] == tokens[1], (prompt, tokens)
                    (text, logprobs), (their_text, their_logprobs) = ours(model, subnetwork, prompt), theirs(prompt)
                    # llama-server leaves out the tokens that end within a character.
                    comparable = len(logprobs) == len(their_logprobs)
                    off = max((abs(a - b) for a, b in zip(logprobs, their_logprobs)), default=0.0)
                    off = f"log probabilities differ by up to {off:.5f}" if comparable else "not every log probability is told"
                    equal = text == their_text
                    same += equal
                    print(f"{subnetwork} {dtype}: {'same' if equal else 'OTHER'} text, {off}: {text!r:.70}")
                    if not equal:
                        print(f"    llama.cpp: {their_text!r}")
    count = len(PROMPTS) * len(subnetworks)
    print(f"{same} of {count} texts are the same")
    assert same == count or dtype != "f32"


if __name__ == "__main__":
    main(*sys.argv[1:])
