#!/usr/bin/env python3
"""Counts heap allocations and allocated bytes per message of a server under `ferry bench`, with a library loaded before
libc's malloc. Prints a table. Needs a C compiler; half a minute.

  tools/allocations.py [--seconds 3]
"""
import argparse
import json
import os
import signal
import subprocess
import tempfile
import time

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FERRY = os.path.join(HOME, "target", "release", "ferry")
PORT = 28183
ENDPOINT = f"127.0.0.1:{PORT}"

# Counters are in a file that everybody may look at while the server runs.
COUNTER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
extern void *__libc_malloc(size_t), *__libc_realloc(void *, size_t), *__libc_calloc(size_t, size_t), *__libc_memalign(size_t, size_t);
static unsigned long none[2], *counts = none;
__attribute__((constructor)) static void begin(void) {
  int f = open(getenv("ALLOCATIONS"), O_RDWR | O_CREAT, 0600);
  if (f < 0 || ftruncate(f, 4096)) return;
  void *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
  if (map != MAP_FAILED) counts = map;
}
static void count(size_t n) { __atomic_fetch_add(counts, 1, 0); __atomic_fetch_add(counts + 1, n, 0); }
void *malloc(size_t n) { count(n); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(n * m); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(n); return __libc_realloc(p, n); }
int posix_memalign(void **p, size_t a, size_t n) { count(n); *p = __libc_memalign(a, n); return *p ? 0 : 12; }
void *aligned_alloc(size_t a, size_t n) { count(n); return __libc_memalign(a, n); }
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", default="3")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="allocations-") as folder:
        at = lambda name: os.path.join(folder, name)
        with open(at("count.c"), "w") as f:
            f.write(COUNTER)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", at("count.so"), at("count.c")], check=True)
        env = dict(os.environ, LD_PRELOAD=at("count.so"), ALLOCATIONS=at("counts"), FERRY_LOG="error")
        server = subprocess.Popen([FERRY, "dev", "--data", at("data"), "--port", str(PORT), "--ready-file", at("ready")],
                                  stdout=subprocess.DEVNULL, env=env)
        while not os.path.exists(at("ready")):
            if server.poll() is not None:
                raise SystemExit("allocations: the server did not start")
            time.sleep(0.01)

        def counts():
            with open(at("counts"), "rb") as f:
                both = f.read(16)
            return [int.from_bytes(both[i:i + 8], "little") for i in (0, 8)]

        try:
            print(f"{'':32} {'allocations':>12} {'bytes':>8}   a message")
            for name, case in [
                ("send, 64 in flight", ["send", "--topic", "one"]),
                ("send, 32 messages a call", ["send", "--topic", "many", "--batch", "32"]),
                ("receive and ack, batches of 32", ["receive", "--topic", "many", "--batch", "32"]),
                ("receive and ack, one by one", ["receive", "--topic", "one", "--batch", "1"]),
            ]:
                before = counts()
                out = subprocess.run([FERRY, "bench", *case, "--endpoint", ENDPOINT, "--duration", args.seconds, "--warm-up", "0",
                                      "-o", "json"], stdout=subprocess.PIPE, text=True, check=True)
                messages = json.loads(out.stdout)["messages"]
                allocations, size = (a - b for a, b in zip(counts(), before))
                print(f"{name:32} {allocations / messages:12.1f} {size / messages:8.0f}", flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(20)


if __name__ == "__main__":
    main()
