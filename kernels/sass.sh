#!/usr/bin/env bash
# A table of what each kernel in a fatbin or cubin needs, by architecture; fails when one spills registers or keeps
# local arrays in memory, either of which makes a kernel many times slower without making it wrong.
#   kernels/sass.sh FATBIN        cuobjdump comes from CUDA_HOME, or from what kernels/toolkit.sh installs
set -euo pipefail

[[ $# -eq 1 && -r $1 ]] || { echo "usage: $0 FATBIN" >&2; exit 2; }
kernels=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cuda=${CUDA_HOME:-$("$kernels/toolkit.sh")}

# A spill lies in the stack frame that cuobjdump calls STACK; LOCAL is local memory outside of it.
PATH=$cuda/bin:$PATH "$cuda/bin/cuobjdump" --dump-resource-usage "$1" | awk '
  function field(name) {
    if (!match($0, name ":[0-9]+")) return 0
    return substr($0, RSTART + length(name) + 1, RLENGTH - length(name) - 1) + 0
  }
  /arch = / { arch = $NF }
  /Fatbin elf code/ { arch = "?" }
  /Function / { kernel = $2; sub(/:$/, "", kernel) }
  /REG:/ {
    if (!rows++) printf "%-40s %-8s %9s %12s %6s %6s\n", "kernel", "arch", "registers", "shared bytes", "stack", "local"
    printf "%-40s %-8s %9d %12d %6d %6d\n", kernel, arch, field("REG"), field("SHARED"), field("STACK"), field("LOCAL")
    if (field("STACK") + field("LOCAL") > 0)
      bad = bad sprintf("%s for %s: %d bytes of stack, %d of local memory\n", kernel, arch, field("STACK"), field("LOCAL"))
  }
  END {
    if (!rows) { print "no kernel with device code in it" > "/dev/stderr"; exit 1 }
    if (bad) { printf "kernels that spill or keep arrays in local memory:\n%s", bad > "/dev/stderr"; exit 1 }
  }'
