#!/usr/bin/env bash
# What each step beyond LoNAS's recipe brings, at equal tokens: trains the default base once for each recipe and scores what came out.
#   benches/ablation.sh DATA DIR [lonas train's arguments, for all of them]
# DATA has train/ and test/ with ARC-Easy.json, ARC-Challenge.json and openbookqa.json; DIR gets a model folder NAME, NAME.train.txt and
# NAME.eval.json for each recipe, all as soon as they are there, and what is there already is left out, so the script can be run again.
# LONAS names the program, TOKENS how many each recipe may pass forward and back (1000000), RECIPES which ones (all), AT_ONCE how many
# train side by side (1; on a GPU several, with NVIDIA's MPS where it is), EVAL what to evaluate with (LONAS; another build may be faster).
set -uo pipefail

[[ $# -ge 2 ]] || { echo "usage: $0 DATA DIR [lonas train's arguments]" >&2; exit 2; }
data=$1 out=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lonas=${LONAS:-$root/target/release/lonas}
space=$root/models/smollm2-135m-space.json
students=(--sampling sandwich --distill)

# What a recipe is, as `lonas train` is told.
arguments() {
  case $1 in
    faithful) echo --space "$space" ;;
    reorder) echo --space "$space" --reorder ;;
    sandwich) echo --space "$space" "${students[@]}" ;;
    both) echo --space "$space" --reorder "${students[@]}" ;;
    undistilled) echo --space "$space" --reorder --sampling sandwich ;;
    lora) echo --space "$space" --reorder --sampling maximal ;;
    wide) echo --space "$root/models/smollm2-135m-wide-space.json" --reorder "${students[@]}" ;;
    *) echo "no recipe $1" >&2; return 1 ;;
  esac
}

one() {
  local name=$1 words
  shift
  words=$(arguments "$name") || return 1
  if [[ ! -e $out/$name/supernet.json || -e $out/$name/checkpoint.safetensors ]]; then
    # Paths of this repository have no spaces that would fall apart here; the arguments of the caller stay whole.
    # shellcheck disable=SC2086
    "$lonas" train --data "$data"/train/{ARC-Easy,ARC-Challenge,openbookqa}.json --out "$out/$name" --max-tokens "${TOKENS:-1000000}" \
      --accumulation 2 $words "$@" >"$out/$name.train.txt" 2>&1 || { echo "$name: $(tail -1 "$out/$name.train.txt")"; return 1; }
  fi
  echo "$name: $(grep -o 'validation loss.*' "$out/$name.train.txt" | tail -1)"
  [[ -s $out/$name.eval.json ]] && return
  if "${EVAL:-$lonas}" eval "$out/$name" --task arc-easy="$data/test/ARC-Easy.json" --json >"$out/$name.eval.json.part" 2>"$out/$name.eval.txt"; then
    mv "$out/$name.eval.json.part" "$out/$name.eval.json"
  else
    echo "$name: $(tail -1 "$out/$name.eval.txt")"
    return 1
  fi
}

mkdir -p "$out"
failed=0
for name in ${RECIPES:-both faithful reorder sandwich lora undistilled wide}; do
  while (($(jobs -rp | wc -l) >= ${AT_ONCE:-1})); do wait -n || failed=1; done
  one "$name" "$@" &
done
while [[ -n $(jobs -rp) ]]; do wait -n || failed=1; done
exit $failed
