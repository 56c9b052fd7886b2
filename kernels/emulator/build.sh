#!/usr/bin/env bash
# Builds the emulated driver, OUT/libcuda.so.1, with every kernel of kernels/*.cu in it.
#   kernels/emulator/build.sh [OUT [SOURCE.cu ...]]     OUT defaults to target/emulator
# CUDA headers come from CUDA_HOME, or from what kernels/toolkit.sh installs. CXX names the compiler.
# Only what changed is compiled: an object is kept while it is newer than every file it was made from.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$(dirname "$here")
root=$(dirname "$kernels")
out=$(realpath -m "${1:-$root/target/emulator}")
shift || true
sources=("$@")
[[ ${#sources[@]} -gt 0 ]] || sources=("$kernels"/*.cu)
cuda=${CUDA_HOME:-$("$kernels/toolkit.sh")}
compiler=${CXX:-g++}
objects=$out/objects
mkdir -p "$objects"
# One build at a time into a folder: tests run side by side.
exec 9>"$out/lock"
flock 9

# Device code casts between pointer types as CUDA allows, hence no strict aliasing. A misaligned vector access faults
# on a GPU and not on a CPU: the sanitizer makes it an illegal instruction, which the driver's fault handler explains.
# g++ guards a static array of bf16 as if it had a constructor to run once; without locks the guard is a byte of the shared
# section, which the poison marks as done. The thread sanitizer calls races.cpp; its runtime is not linked. Without sibling
# calls, return addresses tell the line.
common=(-std=c++17 -O2 -g -fPIC -fvisibility=hidden -DLONAS_EMULATED -I"$here" -isystem "$cuda/include"
  -Wall -Wextra -Wno-unknown-pragmas)
kernel_flags=(-Wno-unused-function -fno-strict-aliasing -fno-threadsafe-statics
  -fsanitize=alignment,thread -fsanitize-undefined-trap-on-error
  -fno-optimize-sibling-calls --param=tsan-instrument-func-entry-exit=0 -I"$kernels")

# compile OBJECT SOURCE SECTION FLAGS...: unless the object is newer than all it depends on and was made by the same
# command. Variables without a value, a kernel's static shared arrays among them, go to SECTION; "-" leaves them.
compile() {
  local object=$1 source=$2 section=$3 dependency fresh=1
  shift 3
  local command="$compiler $* -c $source"
  [[ -f $object && -f $object.d && $(cat "$object.command" 2>/dev/null) == "$command" ]] || fresh=0
  if ((fresh)); then
    while read -r dependency; do
      [[ -e $dependency && ! $dependency -nt $object ]] || { fresh=0; break; }
    done < <(sed -e 's/^[^:]*: *//' -e 's/\\$//' "$object.d" | tr -s ' ' '\n' | grep -v '^$')
  fi
  ((fresh)) && return
  echo "  $(basename "$source")" >&2
  "$compiler" "$@" -MMD -MF "$object.d" -c -o "$object.new" "$source"
  [[ $section == - ]] || objcopy --rename-section ".bss=$section" "$object.new"
  mv "$object.new" "$object"
  printf '%s' "$command" >"$object.command"
}

# list_kernels SOURCE FLAGS...: a line "NAME THREADS" for each kernel, THREADS being what its __launch_bounds__ says.
# It reads the preprocessed text, so that kernels made by macros are found and those that #if leaves out are not.
list_kernels() {
  local source=$1
  shift
  "$compiler" "$@" -DLONAS_LIST_KERNELS -E -P -x c++ "$source" | perl -0777 -ne '
    while (/extern\s*"C"\s*__global__\s+(?:void\s|__launch_bounds__\s*(\((?:[^()]|(?1))*\))|\s)+(\w+)\s*\(/g) {
      my ($bounds, $name) = ($1 // "(1024)", $2);
      $bounds =~ s/\s+/ /g;
      print "$name $bounds\n";
    }'
}

# One translation unit for each source: the source itself and the registration of its kernels. In an unnamed namespace
# everything is the file's own, as it is for nvcc: helpers of the same name in two files stay apart, templates too. So
# system headers that a kernel includes must have been included before.
write_unit() {
  local unit=$1 source=$2 section=$3 list=$4 name bounds
  {
    printf '#include "emulator.h"\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n'
    printf 'extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_%s[], __stop_%s[];\n' "$section" "$section"
    printf 'namespace {\n#include "%s"\n' "$source"
    while read -r name bounds; do
      printf 'const emulator::Registration register_%s(emulator::Signature<&%s>{}, "%s", emulator::first_bound%s, __start_%s, __stop_%s);\n' \
        "$name" "$name" "$name" "$bounds" "$section" "$section"
    done <<<"$list"
    printf '}  // namespace\n'
  } >"$unit.new"
  # An unchanged unit keeps its time, and so its object.
  if cmp -s "$unit.new" "$unit"; then rm "$unit.new"; else mv "$unit.new" "$unit"; fi
}

# build_kernels SOURCE STEM: lists, writes and compiles one source.
build_kernels() {
  local source=$1 stem=$2 section flags unit object list dependency stale=1
  section=lonas_shared_${stem//[^A-Za-z0-9_]/_}
  flags=("${common[@]}" "${kernel_flags[@]}")
  unit=$objects/$stem.kernels.cpp object=$objects/$stem.kernels.o
  # Listing takes as long as preprocessing, so it too is done only when something changed.
  list=$unit.list
  if [[ -f $list && -f $object.d ]]; then
    stale=0
    for dependency in $(sed -e 's/^[^:]*: *//' -e 's/\\$//' "$object.d"); do
      [[ $dependency == "$unit" || (-e $dependency && ! $dependency -nt $list) ]] || stale=1
    done
  fi
  if ((stale)); then list_kernels "$source" "${flags[@]}" >"$list.new" && mv "$list.new" "$list"; fi
  [[ -s $list ]] || { echo "$source has no kernel" >&2; return 1; }
  write_unit "$unit" "$source" "$section" "$(<"$list")"
  compile "$object" "$unit" "$section" "${flags[@]}"
}

# start COMMAND...: in the background, two at a time; the first that fails ends the build.
running=()
start() {
  if ((${#running[@]} == 2)); then
    wait "${running[0]}"
    running=("${running[@]:1}")
  fi
  "$@" &
  running+=($!)
}

link=()
for source in "${sources[@]}"; do
  source=$(realpath "$source")
  stem=$(basename "$source" .cu)
  start build_kernels "$source" "$stem"
  link+=("$objects/$stem.kernels.o")
done
for part in scheduler races tensor memory launch stream driver; do
  start compile "$objects/$part.o" "$here/$part.cpp" - "${common[@]}"
  link+=("$objects/$part.o")
done
for job in "${running[@]}"; do wait "$job"; done

library=$out/libcuda.so.1
stale=0
[[ -f $library && $(cat "$objects/link" 2>/dev/null) == "${link[*]}" ]] || stale=1
for object in "${link[@]}"; do [[ $object -nt $library ]] && stale=1; done
if ((stale)); then
  # Renamed at the end: a process that has the old library open keeps it.
  "$compiler" -shared -Wl,-soname,libcuda.so.1 -Wl,--no-undefined -o "$library.new" "${link[@]}" -lpthread -ldl
  mv "$library.new" "$library"
  printf '%s' "${link[*]}" >"$objects/link"
fi
echo "$library"
