#!/usr/bin/env bash
# Everything that a few minutes on a GPU are for, into one folder: the kernels' tests on the real driver, the same under
# compute-sanitizer, the benches with their comparison, and cuBLAS beside them.
#   kernels/on_gpu.sh DIR [lonas bench's arguments]
# Needs no compiler: build `cargo test --release --locked --features cuda --no-run` where there is one, and bring the folder along.
# LONAS and LONAS_TESTS name the program and the library's tests, by default those in target/release. A step that fails does
# not end it; the last line says which have, and the exit status too.
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

failed=()
# step NAME COMMAND...: its output goes to NAME.txt.
step() {
  local name=$1 began=$SECONDS
  shift
  if "$@" >"$report/$name.txt" 2>&1; then
    echo "ok      $name, $((SECONDS - began)) s"
  else
    echo "FAILED  $name: $report/$name.txt"
    failed+=("$name")
  fi
}

if command -v nvidia-smi >/dev/null; then step gpu nvidia-smi; fi
step tests "$tests" backend::cuda::
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
if [[ -n $sanitizer ]]; then
  for tool in memcheck racecheck synccheck initcheck; do
    step "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 "$tests" backend::cuda:: --test-threads 1
  done
else
  echo "left out: compute-sanitizer, which is not here"
fi
# The report itself writes bench.txt.
step bench-log "$lonas" bench --device cuda --report "$report" "$@"
# A whole LLaMA-7B of random weights, which takes 14 GB of disk; LLAMA_7B=no leaves it out.
if [[ ${LLAMA_7B:-yes} == yes ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  shape=$root/benches/shapes/llama-7b
  step random-7b "$lonas" random --config "$shape/config.json" --space "$shape/space.json" --out "$scratch/llama-7b"
  for dtype in bf16 int8; do
    step "llama-7b-$dtype" "$lonas" bench "$scratch/llama-7b" --device cuda --dtype $dtype --rounds 3 --prompt 2048 \
      --step-tokens 2048 --context 128 --streams 1,8 --mixed-streams 32 --without-adapter
  done
fi
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  step cublas python3 "$root/kernels/cublas.py"
else
  echo "left out: cuBLAS beside it, by PyTorch, which is not here"
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
