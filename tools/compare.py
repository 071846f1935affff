#!/usr/bin/env python3
"""Compares FerryMQ with Apache RocketMQ 5.5.0 and with the ceiling (a server that only answers), on this machine.

Each round runs every server alone, fresh and warmed up, one after the other, with the same load generator
(`ferry bench`). Writes docs/benchmarks.json (every run), docs/benchmarks.svg and the table in docs/benchmarks.md.
Nothing else should run on the machine meanwhile. About 6 minutes a round on 2 cores.

  tools/compare.py [--rounds 5] [--seconds 6] [--servers apache-async,ferry-async,…] [--smoke]
"""
import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FERRY = os.path.join(HOME, "target", "release", "ferry")
PORT = 28081
SERVERS = ["apache-async", "apache-sync", "ferry-async", "ferry-sync", "ceiling"]
# name, what it is, bench command, arguments, seconds (a factor), on the ceiling too
CASES = [
    ("send64", "send, 4 connections, 64 in flight", "send", ["--topic", "one"], 1, True),
    ("send1", "send, 1 connection, 1 in flight", "send", ["--topic", "one", "--connections", "1", "--in-flight", "1"], 1, True),
    ("send32", "send, 32 messages a call", "send", ["--topic", "many", "--batch", "32"], 1.5, True),
    ("receive32", "receive and ack, batches of 32", "receive", ["--topic", "many", "--batch", "32"], 1, True),
    ("receive1", "receive and ack, one by one", "receive", ["--topic", "one", "--batch", "1"], 1, True),
    ("e2e", "end to end at 500/s", "e2e", ["--topic", "e2e"], 1, False),
]
# With --kinds: what the other kinds of message cost beside normal ones. A transaction is sent, committed and put into its
# queue; a scheduled message is sent and delivered half a second later.
KINDS = [
    ("send64", "normal messages, 64 in flight", "send", ["--topic", "one"], 1, False),
    ("fifo", "FIFO, 1,000 message groups, 64 in flight", "send", ["--topic", "fifo", "--kind", "fifo"], 1, False),
    ("delay", "scheduled and delivered, 64 in flight", "send", ["--topic", "delay", "--kind", "delay", "--ahead", "500"], 1, False),
    ("tx", "transactions sent and committed, 64 in flight", "send", ["--topic", "tx", "--kind", "transaction"], 1, False),
    ("many", "normal messages, 32 a call", "send", ["--topic", "many", "--batch", "32"], 1.5, False),
    ("receive32", "normal messages received and acknowledged in 32s", "receive", ["--topic", "many", "--batch", "32"], 1, False),
    ("receive-fifo", "FIFO received and acknowledged in 32s", "receive",
     ["--topic", "fifo", "--group", "ordered", "--batch", "32"], 1, False),
    ("late", "how late scheduled messages are, 500/s", "e2e", ["--topic", "late", "--kind", "delay", "--ahead", "1500"], 1.5, False),
]
TYPES = {"fifo": "FIFO", "delay": "DELAY", "late": "DELAY", "tx": "TRANSACTION"}
GOALS = {
    "fifo": "≤ 2 times normal", "delay": "≤ 2 times normal", "tx": "≤ 4 times normal", "many": "–", "receive-fifo": "≤ 2 times normal",
    "late": "p99 ≤ 20 ms",
    "send64": "≤ 33 µs async, ≤ 36 sync", "send1": "p50 ≤ 0.18 async, ≤ 0.30 ms sync", "send32": "≤ 5 µs",
    "receive32": "≤ 6 µs async, ≤ 7 sync", "receive1": "≤ 80 µs", "e2e": "p50 ≤ 0.4, p99 ≤ 2 ms; sync p50 ≤ 0.7",
}


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid):
    """Resident memory without mapped files: the page cache is not the process's."""
    values = {}
    with open(f"/proc/{pid}/status") as f:
        for line in f:
            name, _, rest = line.partition(":")
            if name in ("RssAnon", "RssShmem"):
                values[name] = int(rest.split()[0]) / 1024
    return sum(values.values())


class Server:
    """One server, started on an empty folder."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        flush = kind.rpartition("-")[2]
        ready = os.path.join(folder, "ready")
        began = time.monotonic()
        if kind.startswith("apache"):
            command = [os.path.join(HOME, "tools", "apache.sh"), folder, str(PORT), f"flushDiskType={flush.upper()}_FLUSH"]
            env = dict(os.environ, HEAP="4g", HEAP_TOUCH="1")
        elif kind == "ceiling":
            command, env = [FERRY, "bench", "ceiling", "--port", str(PORT)], dict(os.environ)
        else:
            command = [FERRY, "dev", "--data", os.path.join(folder, "data"), "--port", str(PORT), "--flush", flush,
                       "--ready-file", ready]
            env = dict(os.environ, FERRY_LOG="error")
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        if kind == "ceiling":
            time.sleep(0.3)
        while kind != "ceiling" and not os.path.exists(ready):
            if self.process.poll() is not None:
                sys.exit(f"compare: {kind} did not start")
            time.sleep(0.002)
        self.ready_ms = (time.monotonic() - began) * 1000
        self.pid = int(open(ready).read()) if kind.startswith("apache") else self.process.pid

    def admin(self, *args, want=""):
        """Again until it says what is wanted: the broker registers with its name server a while after it is ready."""
        for _ in range(20):
            out = subprocess.run([os.path.join(HOME, "tools", "apache.sh"), "admin", str(PORT), *args],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            if want in out.stdout:
                return
        sys.exit(f"compare: {args}: {out.stdout}")

    def prepare(self):
        if self.kind.startswith("apache"):
            for topic in ("one", "many", "e2e", *TYPES):
                self.admin("updateTopic", "-c", "DefaultCluster", "-t", topic, "-r", "8", "-w", "8", "-a",
                           f"+message.type={TYPES.get(topic, 'NORMAL')}", want="success")
            self.admin("updateSubGroup", "-c", "DefaultCluster", "-g", "ordered", "-s", "true", "-o", "true", want="success")
            self.admin("updateSubGroup", "-c", "DefaultCluster", "-g", "bench", "-s", "true", want="success")
            for topic in ("one", "many", "e2e"):
                self.await_route(topic)
        elif self.kind != "ceiling":
            subprocess.run([FERRY, "group", "create", "ordered", "--order", "fifo", "--endpoint", f"127.0.0.1:{PORT}"],
                           stdout=subprocess.DEVNULL, check=True)

    def await_route(self, topic):
        """The proxy learns of a new topic from the name server after a while."""
        for _ in range(120):
            out = subprocess.run([FERRY, "send", topic, "x", "--endpoint", f"127.0.0.1:{PORT}"], capture_output=True)
            if out.returncode == 0:
                return
            time.sleep(0.5)
        sys.exit(f"compare: {self.kind} does not find the route of {topic}")

    def admin_ms(self):
        began = time.monotonic()
        if self.kind.startswith("apache"):
            self.admin("topicList")
        else:
            subprocess.run([FERRY, "topic", "list", "--endpoint", f"127.0.0.1:{PORT}"], stdout=subprocess.DEVNULL, check=True)
        return (time.monotonic() - began) * 1000

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def bench(server, command, args, seconds, warm_up):
    out = subprocess.run(
        [FERRY, "bench", command, *args, "--endpoint", f"127.0.0.1:{PORT}", "--pid", str(server.pid),
         "--duration", str(seconds), "--warm-up", str(warm_up), "-o", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if out.returncode != 0:
        sys.exit(f"compare: bench {command} against {server.kind}: {out.stderr}")
    return json.loads(out.stdout)


def one_round(kind, args):
    folder = tempfile.mkdtemp(prefix="compare-", dir=args.folder)
    server = Server(kind, folder)
    result = {}
    try:
        result["ready_ms"] = server.ready_ms
        server.prepare()
        if kind.startswith("apache"):
            # A cold JVM is three times slower.
            bench(server, "send", ["--topic", "one"], args.warm, 1)
            bench(server, "send", ["--topic", "many", "--batch", "32"], max(args.warm // 3, 1), 1)
        result["idle_mib"] = memory_mib(server.pid)
        for name, _, command, more, factor, on_ceiling in args.cases:
            if kind == "ceiling" and not on_ceiling:
                continue
            result[name] = bench(server, command, more, max(int(args.seconds * factor), 1), 1)
            print(f"  {kind:13} {name:10} {result[name]['per_second']:>9.0f}/s  cpu {result[name]['server_cpu_us_per_message']} µs"
                  f"  p50 {result[name]['p50_ms']} p99 {result[name]['p99_ms']} ms  errors {result[name]['errors']}", flush=True)
        result["mib"] = memory_mib(server.pid)
        if kind != "ceiling":
            result["admin_ms"] = server.admin_ms()
        time.sleep(1)
        before, began = cpu_seconds(server.pid), time.monotonic()
        time.sleep(args.idle)
        result["idle_percent"] = 100 * (cpu_seconds(server.pid) - before) / (time.monotonic() - began)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return result


def spread(values):
    values = [v for v in values if v is not None]
    if not values:
        return None
    return statistics.median(values), min(values), max(values)


def short(value):
    if value >= 1000:
        return f"{value / 1000:.1f}k" if value < 100_000 else f"{value / 1000:.0f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cell(runs, name, key):
    got = spread([r[name][key] for r in runs if name in r])
    if got is None:
        return "–"
    return short(got[0]) if len(runs) == 1 else f"{short(got[0])} ({short(got[1])}–{short(got[2])})"


def table(results, kinds, cases):
    lines = []
    for name, what, *_ in cases:
        lines += [f"**{what}** (goal: {GOALS[name]})", "",
                  "| server | messages/s | server CPU µs a message | p50 ms | p99 ms | p99.9 ms |", "|---|---|---|---|---|---|"]
        for kind in kinds:
            if any(name in r for r in results[kind]):
                cells = [cell(results[kind], name, k) for k in
                         ("per_second", "server_cpu_us_per_message", "p50_ms", "p99_ms", "p999_ms")]
                lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["**beside the load**", "",
              "| server | ready ms | memory before MiB | memory after MiB | idle CPU % of a core | one admin command ms |",
              "|---|---|---|---|---|---|"]
    for kind in kinds:
        cells = []
        for key in ("ready_ms", "idle_mib", "mib", "idle_percent", "admin_ms"):
            got = spread([r.get(key) for r in results[kind]])
            cells.append("–" if got is None else short(got[0]))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def picture(results, kinds, cases):
    """Server CPU per message, one bar a server, each case on its own scale."""
    colours = {"apache-async": "#c0504d", "apache-sync": "#e0a09e", "ferry-async": "#1f6f8b", "ferry-sync": "#7fb3c4", "ceiling": "#999999"}
    width, row, gap, left, top = 760, 18, 26, 130, 54
    out, y = [], top
    for name, what, *_ in cases:
        bars = [(k, statistics.median([r[name]["server_cpu_us_per_message"] for r in results[k] if name in r]))
                for k in kinds if any(name in r for r in results[k])]
        if not bars:
            continue
        largest = max(v for _, v in bars) or 1
        out.append(f'<text x="{left}" y="{y - 6}" font-weight="bold">{what}</text>')
        for kind, value in bars:
            length = (width - left - 90) * value / largest
            out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{kind}</text>'
                       f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 4}" fill="{colours[kind]}"/>'
                       f'<text x="{left + length + 6:.1f}" y="{y + 13}">{short(value)} µs</text>')
            y += row
        y += gap
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
            'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
            f'<text x="12" y="22" font-size="15" font-weight="bold">Server CPU per message (median; shorter is better)</text>')
    return head + "".join(out) + "</svg>\n"


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemTotal")) / (1 << 20)
    return f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}"


def write(results, kinds, args, commit):
    """What is measured so far: table, picture, and every run."""
    rounds = len(results[kinds[-1]])
    about = {"commit": commit, "machine": machine(), "date": time.strftime("%Y-%m-%d"), "rounds": rounds, "seconds": args.seconds}
    docs = os.path.join(HOME, "docs")
    name, what = ("benchmarks-kinds", "kinds") if args.kinds else ("benchmarks", "compare")
    with open(os.path.join(docs, f"{name}.json"), "w") as f:
        json.dump({"about": about, "runs": results}, f, indent=1)
    with open(os.path.join(docs, f"{name}.svg"), "w") as f:
        f.write(picture(results, kinds, args.cases))
    path = os.path.join(docs, "benchmarks.md")
    text = open(path).read()
    begin, end = f"<!-- {what}: begin -->\n", f"<!-- {what}: end -->"
    intro = (f"`tools/compare.py{' --kinds' if args.kinds else ''} --rounds {rounds} --seconds {args.seconds}`, commit {commit}, {about['date']}, {about['machine']}. "
             "Median (least–most) of the rounds.\n\n")
    new = begin + intro + "\n".join(table(results, kinds, args.cases)) + f"\n\n![Server CPU per message]({name}.svg)\n\n" + end
    text = text[:text.index(begin)] + new + text[text.index(end) + len(end):]
    open(path, "w").write(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=int, default=6, help="measured time of a case")
    p.add_argument("--warm", type=int, default=30, help="warm-up of a JVM, seconds")
    p.add_argument("--idle", type=int, default=5, help="seconds of idling that are measured")
    p.add_argument("--servers", default=None, help=",".join(SERVERS))
    p.add_argument("--folder", default=None, help="where servers keep their data")
    p.add_argument("--kinds", action="store_true", help="FIFO, scheduled messages and transactions beside normal ones")
    p.add_argument("--smoke", action="store_true", help="one short round without Apache; writes nothing")
    args = p.parse_args()
    args.cases = KINDS if args.kinds else CASES
    kinds = args.servers.split(",") if args.servers else ["apache-async", "ferry-async"] if args.kinds else SERVERS
    if args.smoke:
        args.rounds, args.seconds, args.idle, kinds = 1, 1, 1, ["ferry-async", "ceiling"]
        if not os.path.exists(FERRY):
            globals()["FERRY"] = FERRY.replace("release", "debug")
    else:
        subprocess.run(["cargo", "build", "--release", "--locked", "--workspace", "--bin", "ferry"], cwd=HOME, check=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True).stdout.strip()
    results = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in kinds:
            print(f"round {number + 1} of {args.rounds}: {kind}", flush=True)
            results[kind].append(one_round(kind, args))
        if args.smoke:
            print("\n".join(table(results, kinds, args.cases)))
        else:
            write(results, kinds, args, commit)
            print(f"round {number + 1} is in docs/benchmarks.md, .svg and .json", flush=True)


if __name__ == "__main__":
    main()
