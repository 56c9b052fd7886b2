#!/usr/bin/env bash
# A table of what each kernel in a fatbin or cubin needs, by architecture; fails when one spills registers or keeps
# local arrays in memory, either of which makes a kernel many times slower without making it wrong. So does a kernel that is
# meant for tensor cores, of which "_many" or "_few" in the name tells, and whose code lacks their instructions; "_wgmma" are for
# sm_90a alone.
#   kernels/sass.sh FATBIN        cuobjdump comes from CUDA_HOME, or from what kernels/toolkit.sh installs
set -euo pipefail

[[ $# -eq 1 && -r $1 ]] || { echo "usage: $0 FATBIN" >&2; exit 2; }
kernels=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cuda=${CUDA_HOME:-$("$kernels/toolkit.sh")}
export PATH=$cuda/bin:$PATH

# A spill lies in the stack frame that cuobjdump calls STACK; LOCAL is local memory outside of it. HMMA is a product by tensor
# cores, HGMMA one by those of four warps from shared memory, LDSM what loads HMMA's operands from there, LDGSTS a copy to there
# that no register takes part in.
{
  cuobjdump --dump-resource-usage "$1"
  echo "=== code"
  cuobjdump --dump-sass "$1"
} | awk '
  function field(name) {
    if (!match($0, name ":[0-9]+")) return 0
    return substr($0, RSTART + length(name) + 1, RLENGTH - length(name) - 1) + 0
  }
  function needs(key) {
    if (key ~ /_wgmma/) return key ~ /sm_90a/ ? "HGMMA LDGSTS" : ""
    return key ~ /_few|_many/ ? "HMMA LDSM LDGSTS" : ""
  }
  /^=== code/ { code = 1 }
  /arch = / { arch = $NF }
  /Fatbin elf code/ { arch = "?" }
  /Function / { kernel = $NF; if (!code) kernel = $2; sub(/:$/, "", kernel) }
  code && /Function :/ { key = kernel " " arch }
  code && /HG?MMA|LDSM|LDGSTS/ {
    count[key, "HMMA"] += /HMMA/; count[key, "HGMMA"] += /HGMMA/
    count[key, "LDSM"] += /LDSM/; count[key, "LDGSTS"] += /LDGSTS/
  }
  !code && /REG:/ {
    line[++rows] = sprintf("%-40s %-8s %9d %12d %6d %6d", kernel, arch, field("REG"), field("SHARED"), field("STACK"), field("LOCAL"))
    name[rows] = kernel " " arch
    if (field("STACK") + field("LOCAL") > 0)
      bad = bad sprintf("%s for %s: %d bytes of stack, %d of local memory\n", kernel, arch, field("STACK"), field("LOCAL"))
  }
  END {
    if (!rows) { print "no kernel with device code in it" > "/dev/stderr"; exit 1 }
    printf "%-40s %-8s %9s %12s %6s %6s %5s %5s %5s %6s\n", "kernel", "arch", "registers", "shared bytes", "stack", "local", "HMMA", "HGMMA", "LDSM", "LDGSTS"
    for (row = 1; row <= rows; row++) {
      key = name[row]
      printf "%s %5d %5d %5d %6d\n", line[row], count[key, "HMMA"], count[key, "HGMMA"], count[key, "LDSM"], count[key, "LDGSTS"]
      wanted = split(needs(key), instructions)
      for (i = 1; i <= wanted; i++)
        if (!count[key, instructions[i]]) lacking = lacking sprintf("%s: no %s\n", key, instructions[i])
    }
    if (bad) printf "kernels that spill or keep arrays in local memory:\n%s", bad > "/dev/stderr"
    if (lacking) printf "kernels for tensor cores that do not use them:\n%s", lacking > "/dev/stderr"
    if (bad || lacking) exit 1
  }'
