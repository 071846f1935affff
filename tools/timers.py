#!/usr/bin/env python3
"""Many scheduled messages: how late they are while sends go on, and what they cost in memory. Prints JSON lines.

  tools/timers.py [--pending 1000000] [--spread 100] [--held 10000000] [--folder DIR]

First `--pending` messages due over `--spread` seconds, all waiting before the first is due, are received while others are
sent; then `--held` more that are due in 30 days, after which the server is killed with -9 and started again. About 0.4 KB
of disk a message, and 5 minutes on 2 cores.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FERRY = os.path.join(HOME, "target", "release", "ferry")
PORT = 28183
ENDPOINT = f"127.0.0.1:{PORT}"


def start(folder):
    ready = os.path.join(folder, "ready")
    if os.path.exists(ready):
        os.unlink(ready)
    began = time.monotonic()
    server = subprocess.Popen([FERRY, "dev", "--data", os.path.join(folder, "data"), "--port", str(PORT), "--ready-file", ready],
                              stdout=subprocess.DEVNULL, env=dict(os.environ, FERRY_LOG="error"))
    while not os.path.exists(ready):
        if server.poll() is not None:
            raise SystemExit("timers: the server did not start")
        time.sleep(0.001)
    return server, round((time.monotonic() - began) * 1000)


def memory_mib(pid):
    with open(f"/proc/{pid}/status") as f:
        return round(next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) / 1024, 1)


def begin(server, *args):
    return subprocess.Popen([FERRY, "bench", *args, "--endpoint", ENDPOINT, "--pid", str(server.pid), "-o", "json"],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def end(running):
    return json.loads(running.communicate()[0])


def pending():
    out = subprocess.run([FERRY, "schedule", "list", "-n", "1", "--endpoint", ENDPOINT], stdout=subprocess.PIPE, text=True, check=True)
    return int(out.stdout.splitlines()[-1].split()[2])


def load(server, topic, count, ahead_ms, spread_ms):
    """In steps, so that the number is met nearly."""
    began = time.monotonic()
    while (missing := count - pending()) > 0:
        now_ahead = max(ahead_ms - int((time.monotonic() - began) * 1000), 0)
        end(begin(server, "send", "--topic", topic, "--kind", "delay", "--ahead", str(now_ahead), "--spread", str(spread_ms), "--size", "100",
                  "--batch", "32", "--count", str(missing), "--duration", "600", "--warm-up", "0"))
    return time.monotonic() - began


def say(**fields):
    print(json.dumps(fields), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pending", type=int, default=1_000_000)
    p.add_argument("--spread", type=int, default=100)
    p.add_argument("--held", type=int, default=10_000_000)
    p.add_argument("--folder", default=None)
    args = p.parse_args()
    folder = tempfile.mkdtemp(prefix="timers-", dir=args.folder)
    server, _ = start(folder)
    try:
        if args.pending:
            # As long as the loading takes, and some more.
            ahead = 15 + args.pending // 40_000
            took = load(server, "timed", args.pending, ahead * 1000, args.spread * 1000)
            say(step="scheduled", messages=pending(), seconds=round(took, 1), memory_mib=memory_mib(server.pid))
            time.sleep(max(ahead - took - 2, 0))
            seconds = str(args.spread + 8)
            receiving = begin(server, "receive", "--topic", "timed", "--group", "timed", "--kind", "delay", "--batch", "32",
                              "--in-flight", "16", "--duration", seconds, "--warm-up", "0")
            sending = begin(server, "send", "--topic", "others", "--in-flight", "4", "--connections", "1", "--duration",
                            str(args.spread), "--warm-up", "0")
            sent, late = end(sending), end(receiving)
            say(step="delivered", messages=late["messages"], late_p50_ms=late["p50_ms"], late_p99_ms=late["p99_ms"],
                late_p999_ms=late["p999_ms"], late_max_ms=late["max_ms"], errors=late["errors"],
                sent_beside_per_second=sent["per_second"], memory_mib=memory_mib(server.pid), left=pending())
        if args.held:
            took = load(server, "held", args.held, 30 * 24 * 3_600_000, 3_600_000)
            say(step="held", messages=pending(), seconds=round(took, 1), memory_mib=memory_mib(server.pid))
            time.sleep(12)
            server.send_signal(signal.SIGKILL)
            server.wait()
            server, ready_ms = start(folder)
            say(step="after kill -9", ready_ms=ready_ms, messages=pending(), memory_mib=memory_mib(server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
