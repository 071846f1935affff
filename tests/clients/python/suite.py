"""The Python client as a test: suite.py ENDPOINT PREFIX MODE (see ../README.md)."""
import os
import sys
import threading
import time

from rocketmq import (ClientConfiguration, ConsumeResult, Credentials, FilterExpression, Message, MessageListener,
                      Producer, PushConsumer, SimpleConsumer, TransactionChecker, TransactionResolution)

ENDPOINT, PREFIX, MODE = sys.argv[1:4]
CONFIG = ClientConfiguration(ENDPOINT, Credentials())


def message(topic, body, tag=None):
    m = Message()
    m.topic = topic
    m.body = body.encode()
    if tag:
        m.tag = tag
    m.keys = f"key-{body}"
    m.add_property("language", "python")
    return m


def simple(topic, group, tags="*"):
    consumer = SimpleConsumer(CONFIG, group, {topic: FilterExpression(tags)}, await_duration=5)
    consumer.startup()
    return consumer


def producer(*topics):
    p = Producer(CONFIG, topics)
    p.startup()
    return p


def receive(consumer, want, seconds=30, invisible=30):
    """Receives and acknowledges until everything wanted is there."""
    got, until = {}, time.time() + seconds
    while set(got) < set(want) and time.time() < until:
        for m in consumer.receive(16, invisible) or []:
            got[m.body.decode()] = m
            consumer.ack(m)
    return got


def basic():
    topics = [f"{PREFIX}-{name}" for name in ("simple", "tag", "dlq", "push")]
    p = producer(*topics)

    bodies = [f"m{i}" for i in range(8)]
    for body in bodies:
        assert p.send(message(topics[0], body)).message_id
    consumer = simple(topics[0], f"{PREFIX}-simple")
    got = receive(consumer, bodies)
    assert sorted(got) == bodies, got
    for body, m in got.items():
        assert m.delivery_attempt == 1 and f"key-{body}" in m.keys and m.properties["language"] == "python"
    print("ok simple", flush=True)

    for i in range(8):
        p.send(message(topics[1], f"t{i}", "ab"[i % 2]))
    tagged = simple(topics[1], f"{PREFIX}-tag", "a")
    got = receive(tagged, ["t0", "t2", "t4", "t6"])
    assert sorted(got) == ["t0", "t2", "t4", "t6"] and all(m.tag == "a" for m in got.values()), got
    print("ok tag", flush=True)

    p.send(message(topics[2], "fails"))
    failing, attempts, until = simple(topics[2], f"{PREFIX}-dlq"), [], time.time() + 26
    while time.time() < until:
        attempts += [m.delivery_attempt for m in failing.receive(16, 10) or []]
    assert attempts == [1, 2], attempts
    print("ok dlq", flush=True)

    seen, done = {}, threading.Event()

    class Listener(MessageListener):
        def consume(self, m):
            body = m.body.decode()
            seen[body] = m.delivery_attempt
            if body == "p0" and m.delivery_attempt == 1:
                return ConsumeResult.FAILURE
            if len(seen) == 8 and seen["p0"] == 2:
                done.set()
            return ConsumeResult.SUCCESS

    push = PushConsumer(CONFIG, f"{PREFIX}-push", Listener(), {topics[3]: FilterExpression("*")})
    push.startup()
    for i in range(8):
        p.send(message(topics[3], f"p{i}"))
    assert done.wait(30), seen
    print("ok push", flush=True)
    for c in (consumer, tagged, failing, push, p):
        c.shutdown()


def steady():
    topic = f"{PREFIX}-steady"
    p, consumer = producer(topic), simple(topic, f"{PREFIX}-steady")
    before = [f"b{i}" for i in range(5)]
    for body in before:
        p.send(message(topic, body))
    assert sorted(receive(consumer, before[:0], seconds=0)) == []
    print("READY", flush=True)
    sys.stdin.readline()
    after, until = [f"a{i}" for i in range(5)], time.time() + 60
    got = {}
    for body in after:
        while True:
            try:
                p.send(message(topic, body))
                break
            except Exception:
                assert time.time() < until, "cannot send"
                time.sleep(0.5)
    while set(got) < set(before + after):
        assert time.time() < until, f"lost: {set(before + after) - set(got)}"
        try:
            got.update(receive(consumer, before + after, seconds=5))
        except Exception:
            time.sleep(0.5)
    print("DONE", flush=True)


def until_it_works(call):
    """The server is away for a moment."""
    until = time.time() + 60
    while True:
        try:
            return call()
        except Exception:
            assert time.time() < until, "the server does not come back"
            time.sleep(0.5)


def kinds():
    fifo, delay, tx = (f"{PREFIX}-{name}" for name in ("fifo", "delay", "tx"))

    class Checker(TransactionChecker):
        def check(self, m):
            orphan = m.body.decode() == "orphan"
            return TransactionResolution.COMMIT if orphan else TransactionResolution.TRANSACTION_RESOLUTION_UNSPECIFIED

    def transactional(*topics):
        producer = Producer(CONFIG, topics, Checker())
        producer.startup()
        return producer

    p = transactional(fifo, delay, tx)
    for i in range(6):
        for group in "ab":
            m = message(fifo, f"{group}{i}")
            m.message_group = group
            p.send(m)
    due = int(time.time()) + 6
    receipts = {}
    for body in ("later", "recalled"):
        m = message(delay, body)
        m.delivery_timestamp = due
        receipts[body] = p.send(m)
    transactions = {}
    for body in ("committed", "rolled back", "orphan"):
        transactions[body] = p.begin_transaction()
        p.send(message(tx, body), transactions[body])
    print("READY", flush=True)
    sys.stdin.readline()

    until_it_works(lambda: p.recall_message(delay, receipts["recalled"].recall_handle))
    until_it_works(transactions["committed"].commit)
    until_it_works(transactions["rolled back"].rollback)

    order, failed, done, lock = [], set(), threading.Event(), threading.Lock()

    class Listener(MessageListener):
        def consume(self, m):
            body = m.body.decode()
            with lock:
                if body == "a2" and body not in failed:
                    failed.add(body)
                    return ConsumeResult.FAILURE
                order.append(body)
                if len(order) == 12:
                    done.set()
            return ConsumeResult.SUCCESS

    push = PushConsumer(CONFIG, fifo, Listener(), {fifo: FilterExpression("*")})
    push.startup()
    assert done.wait(60), order
    for group in "ab":
        assert [b for b in order if b[0] == group] == [f"{group}{i}" for i in range(6)], order
    print("ok fifo", flush=True)

    timed, at, until = simple(delay, delay), {}, time.time() + 30
    while "later" not in at and time.time() < until:
        for m in timed.receive(16, 30) or []:
            at[m.body.decode()] = time.time()
            timed.ack(m)
    assert list(at) == ["later"] and at["later"] >= due, (at, due)
    print("ok delay", flush=True)

    # After a break this client says only minutes later what it produces; any other producer can be asked instead.
    other = transactional(tx)
    got = receive(simple(tx, tx), ["committed", "orphan"], seconds=40)
    other.shutdown()
    assert sorted(got) == ["committed", "orphan"], got
    print("DONE", flush=True)


{"basic": basic, "steady": steady, "kinds": kinds}[MODE]()
# The client leaves threads behind that would keep the process.
os._exit(0)
