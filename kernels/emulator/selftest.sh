#!/usr/bin/env bash
# Proves that the emulator catches what it claims to: each kernel of selftest.cu is run and its message compared.
#   kernels/emulator/selftest.sh [OUT]      OUT defaults to target/emulator-selftest
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$(dirname "$here")
out=$(realpath -m "${1:-$(dirname "$kernels")/target/emulator-selftest}")
export CUDA_HOME=${CUDA_HOME:-$("$kernels/toolkit.sh")}
"$here/build.sh" "$out" "$here/selftest.cu" >/dev/null
program=$out/selftest
if [[ ! $program -nt $here/selftest.cpp || ! $program -nt $out/libcuda.so.1 ]]; then
  "${CXX:-g++}" -std=c++17 -O1 -Wall -Wextra -isystem "$CUDA_HOME/include" -o "$program" "$here/selftest.cpp" "$out/libcuda.so.1"
fi

# The cases count on the defaults.
unset LONAS_EMULATOR_DEVICES LONAS_EMULATOR_ARCH LONAS_EMULATOR_MEMORY
failures=0
# expect CASE PATTERN: what the case prints must match the extended regular expression.
expect() {
  local name=$1 pattern=$2 seed output
  # Other orders of threads must lead to the same verdict.
  for seed in 0 1; do
    output=$(LONAS_EMULATOR_SEED=$seed LD_LIBRARY_PATH=$out "$program" "$name" 2>&1) || true
    if ! grep -qE -- "$pattern" <<<"$(tr '\n' ' ' <<<"$output")"; then
      printf 'FAILED %s (seed %s): expected /%s/, got:\n%s\n' "$name" "$seed" "$pattern" "$output" >&2
      failures=$((failures + 1))
      return
    fi
  done
  printf 'ok     %-28s %s\n' "$name" "$(grep -vE '^$|^  in ' <<<"$output" | tail -1)"
}

# The line of selftest.cu that holds a text.
line() { grep -nF -- "$1" "$here/selftest.cu" | head -1 | cut -d: -f1; }
at='at selftest.cu:[0-9]+'
buffer='an allocation of 256 bytes'

expect correct '^passed'
expect limits 'passed'
expect uninitialised '^wrong result'
expect uninitialised_in_template '^wrong result'
expect missing_barrier_in_template 'a race in static shared memory'
expect missing_barrier "a race in dynamic shared memory, byte [0-9]+: a (read|write) $at and a (read|write) $at by thread"
expect missing_syncwarp "a race in static shared memory: a (read|write) $at and a (read|write) $at by thread"
expect atomic_beside_plain "a race in static shared memory: .*at selftest.cu:$(line '// not atomic').* by thread"
expect write_past_end "illegal write at selftest.cu:$(line '// one too many') of .*, offset 256 of $buffer.*: 0 bytes past its end"
expect write_past_end 'in kernel write_past_end, block \(1,0,0\), thread \(0,0,0\)'
expect read_past_end "illegal read $at of .*$buffer.*past its end.*in kernel read_past_end, block \(0,0,0\), thread"
expect shared_past_end "past the end of the block's 256 bytes of dynamic shared memory.*in kernel shared_past_end"
expect write_before 'a write outside of an allocation, .* bytes before its beginning.*in kernel write_before'
expect write_before_far 'is not device memory'
expect divergent_shuffle "divergent warp collective: .*__shfl_xor_sync $at, but of its mask .*__syncthreads $at"
expect divergent_barrier "divergent barrier: .*$at, but .*$at .*in kernel divergent_barrier, block"
expect barrier_after_return 'divergent barrier: .*but thread \([0-9]+,0,0\) has returned'
expect misaligned "misaligned access $at.*in kernel misaligned"
expect use_after_free 'argument 0 .*is not device memory: .*a freed allocation of 256 bytes'
expect use_after_free_in_table "illegal write $at of .*a freed allocation of 256 bytes.*in kernel write_through_table, block"
expect host_pointer 'is not device memory'
expect tensor_cores '^passed'
race='a race in static shared memory:'
late='of what a cp.async at selftest.cu:[0-9]+ still writes: nobody has waited for it'
expect missing_wait "$race a read at selftest.cu:$(line '// not there yet') $late"
expect weak_wait "$race a read at selftest.cu:$(line '// the second is not') $late"
expect missing_barrier_after_wait "$race .*at selftest.cu:$(line "// the other warp's").* are not ordered by a barrier"
expect missing_barrier_before_copy "$race .*at selftest.cu:$(line '// the other warp may').* are not ordered by a barrier"
expect misaligned_ldmatrix "a misaligned ldmatrix at selftest.cu:$(line '// 8 bytes too far')"
expect ldmatrix_of_device_memory "ldmatrix at selftest.cu:$(line '// never to shared memory') reads what is not .* shared"
expect divergent_mma "divergent warp collective: .* waits in mma $at, but of its mask .*__syncthreads $at"
expect warpgroup '^passed'
expect missing_wgmma_wait '^wrong result'
expect missing_barrier_before_wgmma "a race in dynamic shared memory.* are not ordered by a barrier"
expect misaligned_tile "a tile for wgmma $at begins at a multiple of 1024 bytes"
expect misaligned_copy "a misaligned cp.async $at"
expect copy_past_end "an illegal cp.async at selftest.cu:$(line '// 1024 bytes of 256') of 16 bytes.*$buffer.*past its end"

((failures == 0)) || { echo "$failures of the emulator's own tests failed" >&2; exit 1; }
