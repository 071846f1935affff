#!/usr/bin/env bash
# The longer runs behind the gate's: 200 kills, 200,000 store cases, 20,000 of every kind of
# message, 2,000 simulated worlds (about 15 minutes), and half
# an hour (SOAK_SECONDS) of mixed load on four processes with random kills; its samples go to soak.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
cargo build --locked --workspace --all-targets
FERRY_KILLS=100 cargo test --locked --workspace --test processes -- crash --nocapture
PROPTEST_CASES=100000 cargo test --locked --workspace --lib -- model_test
KINDS_SEEDS=20000 cargo test --locked --workspace --lib -- kinds_test
FERRY_SIM_SEEDS=2000 cargo test --locked --workspace --test cluster -- simulated
export SOAK_SECONDS=${SOAK_SECONDS:-1800}
cargo test --locked --workspace --test processes -- soak --nocapture | tee soak.jsonl | grep -v '"sent":.*"under_way"'
