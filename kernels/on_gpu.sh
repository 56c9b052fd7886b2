#!/usr/bin/env bash
# Everything that a few minutes on a GPU are for, into one folder: the kernels' tests on the real driver and under
# compute-sanitizer, the benches with their comparison, a whole LLaMA-7B of random weights, and cuBLAS and transformers + PEFT beside it.
#   kernels/on_gpu.sh DIR [lonas bench's arguments]
# Needs no compiler: build `cargo test --release --locked --features cuda --no-run` where there is one, and bring the folder along.
# LONAS and LONAS_TESTS name the program and the library's tests, by default those in target/release. SCRATCH is where random
# weights go, 14 GB of them; LLAMA_7B=no leaves them out. SANITIZER is how many seconds each of compute-sanitizer's tools may take,
# 600 unless it is set: the tests that it got to are in its output. LIMIT is the same for tests and benches, 900. A step that fails does not end the script; the last line says
# which have, and the exit status too.
set -uo pipefail

[[ $# -ge 1 ]] || { echo "usage: $0 DIR [lonas bench's arguments]" >&2; exit 2; }
report=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lonas=${LONAS:-$root/target/release/lonas}

# The newest of the library's test programs that has tests of the GPU: cargo keeps old ones beside it.
newest_tests() {
  local program
  for program in $(ls -t "$root"/target/release/deps/lonas-* 2>/dev/null | grep -v '\.'); do
    if "$program" --list 2>/dev/null | grep -q '^backend::cuda::tests::'; then
      echo "$program"
      return
    fi
  done
}
tests=${LONAS_TESTS:-$(newest_tests)}
[[ -x $lonas && -x $tests ]] || { echo "no program at $lonas, or no tests: build them first, see above" >&2; exit 2; }
mkdir -p "$report"
scratch=$(mktemp -d -p "${SCRATCH:-/tmp}")
trap 'rm -rf "$scratch"' EXIT

failed=()
# step NAME COMMAND...: its output goes to NAME.txt.
step() {
  local name=$1 began=$SECONDS
  shift
  if "$@" >"$report/$name.txt" 2>&1; then
    echo "ok      $name, $((SECONDS - began)) s"
  else
    echo "FAILED  $name, $((SECONDS - began)) s: $report/$name.txt"
    failed+=("$name")
  fi
}

limited() { timeout "${LIMIT:-900}" "$@"; }
# random NAME SPACE: a super-network of random weights, of a shape in benches/shapes.
random() { "$lonas" random --config "$root/benches/shapes/$1/config.json" --space "$root/$2" --out "$scratch/$1"; }
# Tests under a tool, as many as there is time for: reaching the limit is no failure, finding something is.
sanitize() {
  timeout "${SANITIZER:-600}" "$sanitizer" --tool "$1" --error-exitcode 1 "$tests" backend::cuda:: --test-threads 1
  local status=$?
  ((status == 0 || status == 124))
}

if command -v nvidia-smi >/dev/null; then step gpu nvidia-smi; fi
step random-smollm2 random smollm2-135m models/smollm2-135m-space.json
if [[ ${LLAMA_7B:-yes} == yes ]]; then
  random llama-7b benches/shapes/llama-7b/space.json >"$report/random-7b.txt" 2>&1 &
  making=$!
fi
step tests limited "$tests" backend::cuda::
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
if [[ -n $sanitizer ]]; then
  for tool in memcheck racecheck synccheck initcheck; do step "sanitizer-$tool" sanitize "$tool"; done
else
  echo "left out: compute-sanitizer, which is not here"
fi
if [[ ${LLAMA_7B:-yes} == yes ]]; then step made-7b wait "$making"; fi
# The report itself writes bench.txt.
step bench-log limited "$lonas" bench "$scratch/smollm2-135m" --device cuda --report "$report" --context 128 --without-adapter --streams 1,8,16 \
  --mixed-streams 32 "$@"
if [[ ${LLAMA_7B:-yes} == yes ]]; then
  for dtype in bf16 int8; do
    step "llama-7b-$dtype" limited "$lonas" bench "$scratch/llama-7b" --device cuda --dtype $dtype --rounds 3 --prompt 2048 \
      --step-tokens 2048 --context 128 --output 64 --streams 1,8,16 --mixed-streams 32 --without-adapter
  done
fi
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  step cublas limited python3 "$root/kernels/cublas.py"
  if python3 -c 'import peft, transformers' 2>/dev/null; then step transformers-peft limited python3 "$root/kernels/transformers_peft.py"; fi
else
  echo "left out: cuBLAS and transformers beside it, by PyTorch, which is not here"
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
