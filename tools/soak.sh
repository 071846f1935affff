#!/usr/bin/env bash
# The longer runs behind the gate's: 200 kills, 200,000 store cases, 2,000 simulated worlds. About 10 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
cargo build --locked --workspace --all-targets
FERRY_KILLS=100 cargo test --locked --workspace --test processes -- crash --nocapture
PROPTEST_CASES=100000 cargo test --locked --workspace --lib -- model_test
FERRY_SIM_SEEDS=2000 cargo test --locked --workspace --test cluster -- simulated
