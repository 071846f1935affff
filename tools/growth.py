#!/usr/bin/env python3
"""Does a message cost the same when there are many? Fills one server and prints, as JSON lines, server CPU per message,
memory, and the time to be ready again after kill -9 and after a clean stop. Needs about 1.4 KB of disk a message, and
root to empty the page cache before cold reads. 10 million messages take about 10 minutes on 2 cores.

  tools/growth.py [--messages 10000000] [--topics 100,1500,10000] [--groups 1000] [--idle 5000] [--folder DIR]
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


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(folder):
    ready = os.path.join(folder, "ready")
    if os.path.exists(ready):
        os.unlink(ready)
    began = time.monotonic()
    server = subprocess.Popen([FERRY, "dev", "--data", os.path.join(folder, "data"), "--port", str(PORT), "--ready-file", ready],
                              stdout=subprocess.DEVNULL, env=dict(os.environ, FERRY_LOG="error"))
    while not os.path.exists(ready):
        if server.poll() is not None:
            raise SystemExit("growth: the server did not start")
        time.sleep(0.001)
    return server, round((time.monotonic() - began) * 1000)


def begin_bench(server, *args):
    return subprocess.Popen([FERRY, "bench", *args, "--endpoint", ENDPOINT, "--pid", str(server.pid), "-o", "json"],
                            stdout=subprocess.PIPE, text=True)


def bench(server, *args):
    running = begin_bench(server, *args)
    out = running.communicate()[0]
    if running.returncode != 0:
        raise SystemExit(f"growth: bench {args} failed")
    return json.loads(out)


def store_state():
    out = subprocess.run([FERRY, "store", "usage", "--endpoint", ENDPOINT, "-o", "json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout)[0]


def say(**fields):
    print(json.dumps(fields), flush=True)


def unary(server, topic, topics=1, seconds=6):
    got = bench(server, "send", "--topic", topic, "--topics", str(topics), "--duration", str(seconds), "--warm-up", "2")
    return got["server_cpu_us_per_message"], got["errors"]


def many_topics(server, counts):
    for topics in counts:
        # The first run makes topics and queues; then one topic and many take turns, for the machine's moods.
        fresh, errors = unary(server, f"of{topics}", topics)
        one, many = [], []
        for _ in range(3):
            one.append(unary(server, "of1")[0])
            many.append(unary(server, f"of{topics}", topics)[0])
        say(step="topics", topics=topics, cpu_us_first=fresh, cpu_us=sorted(many)[1], cpu_us_one_topic=sorted(one)[1],
            errors=errors, **status(server.pid))


def many_groups(server, groups):
    bench(server, "send", "--topic", "grouped", "--batch", "32", "--duration", "3", "--warm-up", "0")
    common = ["receive", "--topic", "grouped", "--batch", "32", "--duration", "5", "--warm-up", "1"]
    one = bench(server, *common, "--group", "single")
    many = bench(server, *common, "--group", "many", "--groups", str(groups), "--in-flight", str(groups))
    say(step="groups", groups=groups, cpu_us=many["server_cpu_us_per_message"], cpu_us_one_group=one["server_cpu_us_per_message"],
        **status(server.pid))
    send = bench(server, "send", "--topic", "grouped", "--duration", "5", "--warm-up", "1")
    say(step="send to a topic of many groups", groups=groups, cpu_us=send["server_cpu_us_per_message"])


def idle(server, consumers):
    before = status(server.pid)
    clients = begin_bench(server, "receive", "--topic", "silent", "--connections", str(consumers), "--in-flight", str(consumers),
                          "--poll", "20", "--duration", "45", "--warm-up", "0")
    time.sleep(22)
    used, began = cpu_seconds(server.pid), time.monotonic()
    time.sleep(20)
    percent = 100 * (cpu_seconds(server.pid) - used) / (time.monotonic() - began)
    say(step="idle consumers", consumers=consumers, cpu_percent_of_a_core=round(percent, 2),
        anonymous_mib_before=before["anonymous_mib"], **status(server.pid))
    clients.wait()


def catch_up(server):
    sender = ["send", "--topic", "hot", "--connections", "1", "--in-flight", "4", "--duration", "8", "--warm-up", "1"]
    alone = bench(server, *sender)["per_second"]
    # A topic of its own, not so long that a new group would begin at its end.
    bench(server, "send", "--topic", "old", "--batch", "32", "--duration", "12", "--warm-up", "0")
    result = {}
    for how in ("warm", "cold"):
        if how == "cold":
            subprocess.run(["sync"], check=True)
            with open("/proc/sys/vm/drop_caches", "w") as f:
                f.write("1")
        reader = begin_bench(server, "receive", "--topic", "old", "--group", f"late-{how}", "--batch", "32", "--connections", "1",
                             "--in-flight", "2", "--duration", "10", "--warm-up", "0")
        result[how] = bench(server, *sender)["per_second"]
        result[how + "_read_per_second"] = json.loads(reader.communicate()[0])["per_second"]
    say(step="catch-up beside a sender", sends_alone=alone, **result)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--messages", type=int, default=10_000_000)
    p.add_argument("--topics", default="100,1500,10000")
    p.add_argument("--groups", type=int, default=1000)
    p.add_argument("--idle", type=int, default=5000)
    p.add_argument("--folder", default=None)
    args = p.parse_args()
    folder = tempfile.mkdtemp(prefix="growth-", dir=args.folder)
    server, ready_ms = start(folder)
    try:
        say(step="started", ready_ms=ready_ms, **status(server.pid))
        if args.idle:
            idle(server, args.idle)
        if args.topics:
            many_topics(server, map(int, args.topics.split(",")))
        stored, probe = 0, 0
        while stored < args.messages:
            if stored >= probe:
                say(step="unary", stored=stored, cpu_us=unary(server, "many")[0], **status(server.pid))
                probe = max(stored * 3, 100_000)
            got = bench(server, "send", "--topic", "many", "--batch", "32", "--duration", "6", "--warm-up", "0")
            stored += got["messages"]
            say(step="batch", stored=stored, cpu_us=got["server_cpu_us_per_message"], per_second=got["per_second"], **status(server.pid))
        cost = unary(server, "many")[0]
        say(step="full", stored=stored, cpu_us=cost, log_bytes=store_state()["log_bytes"], **status(server.pid))
        if args.groups:
            many_groups(server, args.groups)
        catch_up(server)
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
