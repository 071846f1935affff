#!/usr/bin/env bash
# README command one: builds what is missing and runs `ferry dev`. Arguments go to `ferry dev`.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
"$here/tools/setup.sh"
(cd "$here" && cargo build --locked --workspace --bin ferry)
exec "$here/target/debug/ferry" dev "$@"
