#!/usr/bin/env python3
"""Does a message cost the same when there are many? Fills one server and prints, as JSON lines, server CPU per message,
memory and the time to be ready again after kill -9 and after a clean stop. Needs about 1.4 KB of disk a message.

  tools/growth.py [--messages 10000000] [--topics 1,100,2000] [--folder DIR]
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
PORT = 28181
ENDPOINT = f"127.0.0.1:{PORT}"


def status(pid):
    with open(f"/proc/{pid}/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    mib = lambda name: int(fields[name].split()[0]) / 1024
    return {"anonymous_mib": round(mib("RssAnon"), 1), "threads": int(fields["Threads"]),
            "files": len(os.listdir(f"/proc/{pid}/fd"))}


def start(folder):
    ready = os.path.join(folder, "ready")
    if os.path.exists(ready):
        os.unlink(ready)
    began = time.monotonic()
    server = subprocess.Popen([FERRY, "dev", "--data", os.path.join(folder, "data"), "--port", str(PORT), "--ready-file", ready],
                              stdout=subprocess.DEVNULL, env=dict(os.environ, FERRY_LOG="error"))
    while not os.path.exists(ready):
        time.sleep(0.001)
    return server, round((time.monotonic() - began) * 1000)


def bench(server, *args):
    out = subprocess.run([FERRY, "bench", *args, "--endpoint", ENDPOINT, "--pid", str(server.pid), "-o", "json"],
                         stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout)


def store_state():
    out = subprocess.run([FERRY, "store", "usage", "--endpoint", ENDPOINT, "-o", "json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout)[0]


def say(**fields):
    print(json.dumps(fields), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--messages", type=int, default=10_000_000)
    p.add_argument("--topics", default="1,100,2000")
    p.add_argument("--folder", default=None)
    args = p.parse_args()
    folder = tempfile.mkdtemp(prefix="growth-", dir=args.folder)
    server, ready_ms = start(folder)
    try:
        say(step="started", ready_ms=ready_ms, **status(server.pid))
        for topics in map(int, args.topics.split(",")):
            got = bench(server, "send", "--topic", f"of{topics}", "--topics", str(topics), "--duration", "6", "--warm-up", "2")
            say(step="topics", topics=topics, cpu_us=got["server_cpu_us_per_message"], per_second=got["per_second"],
                errors=got["errors"], **status(server.pid))
        stored, probe = 0, 0
        while stored < args.messages:
            if stored >= probe:
                got = bench(server, "send", "--topic", "many", "--duration", "5", "--warm-up", "1")
                say(step="unary", stored=stored, cpu_us=got["server_cpu_us_per_message"], **status(server.pid))
                probe = max(stored * 3, 100_000)
            got = bench(server, "send", "--topic", "many", "--batch", "32", "--duration", "6", "--warm-up", "0")
            stored += got["messages"]
            say(step="batch", stored=stored, cpu_us=got["server_cpu_us_per_message"], per_second=got["per_second"], **status(server.pid))
        got = bench(server, "send", "--topic", "many", "--duration", "5", "--warm-up", "1")
        state = store_state()
        say(step="full", stored=stored, cpu_us=got["server_cpu_us_per_message"], log_bytes=state["log_bytes"], **status(server.pid))
        server.send_signal(signal.SIGKILL)
        server.wait()
        server, ready_ms = start(folder)
        killed = time.monotonic()
        say(step="after kill -9", ready_ms=ready_ms, keys_behind=store_state()["keys_behind"], **status(server.pid))
        while store_state()["keys_behind"] > 0:
            time.sleep(0.1)
        say(step="keys indexed again", seconds=round(time.monotonic() - killed, 1), **status(server.pid))
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait()
        stopped = round((time.monotonic() - began) * 1000)
        server, ready_ms = start(folder)
        say(step="after a clean stop", stop_ms=stopped, ready_ms=ready_ms, **status(server.pid))
        found = subprocess.run([FERRY, "message", "find", "many", "--key", "k100", "-n", "1", "--endpoint", ENDPOINT, "-o", "json"],
                               stdout=subprocess.PIPE, text=True, check=True)
        say(step="query by key", found=len(found.stdout.splitlines()))
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
