#!/usr/bin/env bash
# Runs every fuzz target for some seconds (10), from the corpus in the repository. Needs a nightly toolchain.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-10}
cache=${FERRYMQ_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ferrymq}
rustup run nightly rustc --version >/dev/null 2>&1 ||
  { echo "fuzz: a nightly toolchain is missing; install it with: rustup toolchain install nightly" >&2; exit 1; }
if [ ! -x "$cache/fuzz/bin/cargo-fuzz" ]; then
  echo "fuzz: installing cargo-fuzz once for this machine"
  cargo install --quiet --locked --root "$cache/fuzz" cargo-fuzz
fi
export PATH="$cache/fuzz/bin:$PATH" CARGO_TARGET_DIR="$cache/fuzz/target"
for target in record queue_entry index change handle properties; do
  # What is found goes to a scratch folder; the corpus in the repository grows by hand.
  found=$(mktemp -d)
  log=$found.log
  cargo +nightly fuzz run "$target" "$found" "fuzz/corpus/$target" -- "-max_total_time=$seconds" -print_final_stats=1 >"$log" 2>&1 ||
    { grep -v "^\"" "$log" | tail -40 >&2; echo "fuzz: $target failed; the whole log is $log" >&2; exit 1; }
  echo "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") runs in $seconds s"
  rm -rf "$found" "$log"
done
