#!/usr/bin/env bash
# What `cargo build --features cuda-train` needs, on a machine without a GPU: the toolkit, and archives that let the
# program start where there is no CUDA (see lazy.py).
#   eval "$(kernels/candle.sh)"                          exports CUDA_HOME, PATH, CUDA_COMPUTE_CAP
#   cargo build --release --locked --features cuda-train compiles candle's kernels: ten minutes on two cores, once
# CUDA_COMPUTE_CAP is the architecture that they are compiled for: 80 (A100 and everything later, which compiles them
# once more when it starts) unless it is set: 90 for H100 and H200. To run, the program looks for NVIDIA's driver, and for
# libcublas.so.13, libcurand.so.10 and libnvrtc.so.13 where the dynamic linker does (LD_LIBRARY_PATH).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$("$root/kernels/toolkit.sh" "$@")

# The folder of the crate cudarc, as cargo has unpacked it.
cudarc=$(cd "$root" && cargo metadata --locked --format-version 1 --features cuda-train | python3 -c '
import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(next(os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "cudarc"))')

# Linkers take a shared library before an archive of the same name, so there must be none here.
lazy=$home/lib/stubs
python3 "$root/kernels/lazy.py" "$lazy" "$cudarc"
ln -sf ../libcudart_static.a "$lazy/libcudart.a"

printf 'export CUDA_HOME=%q PATH=%q:"$PATH" CUDA_COMPUTE_CAP=%q\n' "$home" "$home/bin" "${CUDA_COMPUTE_CAP:-80}"
