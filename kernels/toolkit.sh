#!/usr/bin/env bash
# A CUDA 13.0 toolkit (nvcc, headers, cuobjdump) on a machine without GPU or driver, from pip packages: about 110 MB.
#   kernels/toolkit.sh [DEST]     DEST defaults to target/cuda; the only line on stdout is the CUDA_HOME
# A second run finds its own stamp and returns at once. PYTHON names the interpreter whose pip is used.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$(realpath -ms "${1:-$root/target/cuda}")
python=${PYTHON:-python3}

# Pinned, with --no-deps: left alone, nvcc 13.0.88 pulls 13.5 parts, and a 13.0 driver cannot compile newer PTX.
# cuobjdump and nvdisasm have no 13.0 packages; newer ones read older binaries.
packages=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
  nvidia-cuda-cuobjdump==13.2.86
  nvidia-cuda-nvdisasm==13.2.86
)

if [[ -e $home && ! -L $home ]]; then
  echo "$home exists and is not the link that this script makes" >&2
  exit 1
fi
stamp=$home.site/.complete
wanted=$(printf '%s\n' "${packages[@]}")
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" || ! -x $home/bin/nvcc ]]; then
  # Built aside and renamed at the end, so that an interrupted run leaves nothing that looks complete.
  fresh=$home.site.new.$$
  trap 'rm -rf "$fresh"' EXIT
  mkdir -p "$fresh"
  "$python" -m pip install -q --root-user-action=ignore --disable-pip-version-check --no-deps --no-compile \
    --only-binary=:all: --target "$fresh" "${packages[@]}" >&2
  # Every package unpacks into one tree, and that tree is a CUDA_HOME; only linkers want the name lib64.
  ln -sfn lib "$fresh/nvidia/cu13/lib64"
  "$fresh/nvidia/cu13/bin/nvcc" --version >&2
  printf '%s\n' "$wanted" >"$fresh/.complete"
  rm -rf "$home.site"
  mv "$fresh" "$home.site"
  rm -f "$home"
  ln -s "$(basename "$home").site/nvidia/cu13" "$home"
fi
printf '%s\n' "$home"
