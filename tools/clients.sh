#!/usr/bin/env bash
# Installs the official clients and builds their suites into a cache outside the clone. Safe to run again:
# each language is built once for each content of its folder.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${FERRYMQ_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ferrymq}/clients
mkdir -p "$cache"

# once NAME FOLDER COMMAND...: runs the command unless it has succeeded for this content of the folder
once() {
  local name=$1 folder=$2 key
  shift 2
  key=$(find "tests/clients/$folder" -type f -not -path '*/node_modules/*' -not -path '*/target/*' -print0 | sort -z |
    xargs -0 sha256sum "$PWD/tools/clients.sh" | sed "s|$PWD||" | sha256sum | cut -c1-16)
  [ "$(cat "$cache/$name.done" 2>/dev/null)" = "$key" ] && return
  echo "clients: $name"
  "$@" >"$cache/$name.log" 2>&1 || { tail -30 "$cache/$name.log" >&2; echo "clients: $name failed; the whole log is $cache/$name.log" >&2; exit 1; }
  echo "$key" >"$cache/$name.done"
}

python() {
  python3 -m venv --clear "$cache/python"
  "$cache/python/bin/pip" install -q -r tests/clients/python/requirements.txt
}
node() {
  rm -rf "$cache/node" && mkdir -p "$cache/node"
  cp tests/clients/node/package.json tests/clients/node/package-lock.json "$cache/node/"
  (cd "$cache/node" && npm ci --no-audit --no-fund --ignore-scripts)
}
go_() { (cd tests/clients/go && go build -o "$cache/go-suite" .); }
java_() {
  rm -rf "$cache/java-$1" && mkdir -p "$cache/java-$1"
  (cd tests/clients/java && mvn -q -B "-Dclient.version=$1" dependency:copy-dependencies "-DoutputDirectory=$cache/java-$1")
  javac -cp "$cache/java-$1/*" -d "$cache/java-$1" tests/clients/java/Suite.java
}
rust() { (cd tests/clients/rust && CARGO_TARGET_DIR="$cache/rust-target" cargo build --locked); }

once python python python
once node node node
once go go go_
once java-5.2.0 java java_ 5.2.0
once java-5.0.7 java java_ 5.0.7
once rust rust rust
