#!/usr/bin/env bash
# README command two: builds and passes the whole test suite, official clients included.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
for tool in python3 node npm java javac mvn go; do
  command -v "$tool" >/dev/null || { echo "test: $tool is missing; the official clients need Python 3, Node.js, Java 17 with Maven, and Go" >&2; exit 1; }
done
tools/clients.sh
tools/apache.sh fetch
export RUST_BACKTRACE=${RUST_BACKTRACE:-0}
# Always the whole workspace: another selection of packages has other features, and builds the dependencies again.
cargo build --locked --workspace --all-targets
cargo test --locked --workspace --lib --bins
cargo test --locked --workspace --test cluster --test processes --test protocol
cargo test --locked --workspace --test apache
# The client suites mostly wait, so that more of them than cores run side by side.
cargo test --locked --workspace --test clients -- --test-threads=6
# The comparison itself is run by hand; here only that it runs.
tools/compare.py --smoke
