#!/usr/bin/env bash
# Compiles RocksDB once per machine into a cache outside the clone and links it here as `.rocksdb`,
# where .cargo/config.toml points the `rocksdb` crate. Called by tools/setup.sh; safe to run again.
#
# Why: the crate's own build script compiles 343 files in 16 minutes, and does so again for every
# change of package selection. The same sources as two large translation units take 3 to 4 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v g++ >/dev/null || { echo "rocksdb: g++ is missing; install it (Debian: apt-get install g++)" >&2; exit 1; }
cargo fetch --quiet --locked 2>/dev/null || cargo fetch --quiet
src=$(cargo metadata --format-version 1 --all-features 2>/dev/null |
  grep -o '"manifest_path":"[^"]*/librocksdb-sys-[^"]*/Cargo.toml"' | head -1 | cut -d'"' -f4)
src=${src%/Cargo.toml}
lz4=$(cargo metadata --format-version 1 --all-features 2>/dev/null |
  grep -o '"manifest_path":"[^"]*/lz4-sys-[^"]*/Cargo.toml"' | head -1 | cut -d'"' -f4)
lz4=${lz4%/Cargo.toml}/liblz4
[ -d "$src/rocksdb" ] || { echo "rocksdb: the librocksdb-sys sources are not in the cargo registry" >&2; exit 1; }

flags=(-std=c++20 -O2 -g0 -fPIC -include cstdint -w
  -DNDEBUG -DHAVE_ALIGNED_NEW -DHAVE_UINT128_EXTENSION -DLZ4=1
  -DOS_LINUX -DROCKSDB_PLATFORM_POSIX -DROCKSDB_LIB_IO_POSIX -DROCKSDB_SCHED_GETCPU_PRESENT
  -DROCKSDB_AUXV_GETAUXVAL_PRESENT -DROCKSDB_FALLOCATE_PRESENT -DROCKSDB_RANGESYNC_PRESENT)
[ "$(uname -m)" = x86_64 ] && flags+=(-msse4.2 -mpclmul)

key=$( { basename "$src"; basename "$(dirname "$lz4")"; g++ --version | head -1; uname -m; echo "${flags[@]}"; cat "$0"; } | sha256sum | cut -c1-16)
cache=${FERRYMQ_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ferrymq}/rocksdb-$key
if [ ! -f "$cache/librocksdb.a" ]; then
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/build.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  list=$(grep -v '^util/build_version.cc$' "$src/rocksdb_lib_sources.txt")
  half=$(( ($(wc -l <<<"$list") + 1) / 2 ))
  { head -n "$half" <<<"$list" | sed "s|.*|#include \"&\"|"; } >"$work/one.cc"
  { tail -n "+$((half + 1))" <<<"$list" | sed "s|.*|#include \"&\"|"; } >"$work/two.cc"
  inc=(-I"$src/rocksdb/include" -I"$src/rocksdb" -I"$src" -I"$lz4" -I"$lz4/lib")
  echo "rocksdb: compiling $(basename "$src") once for this machine (about 4 minutes on 2 cores) into $cache"
  pids=()
  for unit in one two; do
    g++ "${flags[@]}" "${inc[@]}" -c "$work/$unit.cc" -o "$work/$unit.o" 2>"$work/$unit.log" & pids+=($!)
  done
  g++ "${flags[@]}" "${inc[@]}" -c "$src/build_version.cc" -o "$work/version.o"
  start=$SECONDS
  while kill -0 "${pids[0]}" 2>/dev/null || kill -0 "${pids[1]}" 2>/dev/null; do
    sleep 2
    if [ -t 1 ]; then printf '\rrocksdb: %ds ' $((SECONDS - start)); elif (( (SECONDS - start) % 30 < 2 )); then echo "rocksdb: $((SECONDS - start))s"; fi
  done
  for i in 0 1; do wait "${pids[$i]}" || { cat "$work"/*.log >&2; echo "rocksdb: the compiler failed (it needs about 4 GiB of memory)" >&2; exit 1; }; done
  ar crs "$work/librocksdb.a" "$work/one.o" "$work/two.o" "$work/version.o"
  mv "$work/librocksdb.a" "$cache/librocksdb.a" # atomic: a half-built archive is never seen
  echo "rocksdb: built in $((SECONDS - start))s"
fi
ln -sfn "$cache" .rocksdb
