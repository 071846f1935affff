// The Node.js client as a test: suite.mjs ENDPOINT PREFIX MODE (see ../README.md).
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

// FERRY_NODE_MODULES: where tools/clients.sh installed the client.
const require = createRequire(`${process.env.FERRY_NODE_MODULES}/`);
const { ConsumeResult, FilterExpression, Producer, PushConsumer, SimpleConsumer } = require('rocketmq-client-nodejs');
// TransactionResolution, which this client does not export.
const [UNKNOWN, COMMIT] = [0, 1];

const [endpoints, prefix, mode] = process.argv.slice(2);
const quiet = { debug() {}, info() {}, warn() {}, error() {} };
const common = { endpoints, namespace: '', sslEnabled: process.env.TLS === '1', logger: quiet };
const sleep = ms => new Promise(done => setTimeout(done, ms));

async function producer(...topics) {
  const p = new Producer({ ...common, topics });
  await p.startup();
  return p;
}

const message = (topic, body, tag) => ({
  topic, tag, keys: [`key-${body}`], body: Buffer.from(body), properties: new Map([['language', 'node']]),
});

async function simple(topic, group, tags = '*') {
  const subscriptions = new Map([[topic, new FilterExpression(tags)]]);
  const c = new SimpleConsumer({ ...common, consumerGroup: group, subscriptions, awaitDuration: 5000 });
  await c.startup();
  return c;
}

// Receives and acknowledges until everything wanted is there.
async function receive(consumer, want, seconds = 30, invisible = 30_000) {
  const got = new Map();
  const until = Date.now() + seconds * 1000;
  while (!want.every(b => got.has(b)) && Date.now() < until) {
    for (const m of await consumer.receive(16, invisible)) {
      got.set(m.body.toString(), m);
      await consumer.ack(m);
    }
  }
  return got;
}

async function basic() {
  const topics = ['simple', 'tag', 'dlq', 'push'].map(name => `${prefix}-${name}`);
  // One topic each: with several, startup of this client can hang if the settings come before the last route.
  const producers = [];
  for (const topic of topics) producers.push(await producer(topic));
  const send = (i, body, tag) => producers[i].send(message(topics[i], body, tag));

  const bodies = [...Array(8).keys()].map(i => `m${i}`);
  for (const body of bodies) assert.ok((await send(0, body)).messageId);
  const consumer = await simple(topics[0], `${prefix}-simple`);
  let got = await receive(consumer, bodies);
  assert.deepEqual([...got.keys()].sort(), bodies);
  for (const [body, m] of got) {
    assert.equal(m.deliveryAttempt, 1);
    assert.deepEqual(m.keys, [`key-${body}`]);
    assert.equal(m.properties.get('language'), 'node');
  }
  console.log('ok simple');

  for (let i = 0; i < 8; i++) await send(1, `t${i}`, 'ab'[i % 2]);
  const tagged = await simple(topics[1], `${prefix}-tag`, 'a');
  got = await receive(tagged, ['t0', 't2', 't4', 't6']);
  assert.deepEqual([...got.keys()].sort(), ['t0', 't2', 't4', 't6']);
  console.log('ok tag');

  await send(2, 'fails');
  const failing = await simple(topics[2], `${prefix}-dlq`);
  const attempts = [];
  const until = Date.now() + 26_000;
  while (Date.now() < until) {
    for (const m of await failing.receive(16, 10_000)) attempts.push(m.deliveryAttempt);
  }
  assert.deepEqual(attempts, [1, 2]);
  console.log('ok dlq');

  const seen = new Map();
  const push = new PushConsumer({
    ...common,
    consumerGroup: `${prefix}-push`,
    subscriptions: new Map([[topics[3], '*']]),
    messageListener: {
      async consume(m) {
        const body = m.body.toString();
        seen.set(body, m.deliveryAttempt);
        return body === 'p0' && m.deliveryAttempt === 1 ? ConsumeResult.FAILURE : ConsumeResult.SUCCESS;
      },
    },
  });
  await push.startup();
  for (let i = 0; i < 8; i++) await send(3, `p${i}`);
  for (let i = 0; i < 300 && !(seen.size === 8 && seen.get('p0') === 2); i++) await sleep(100);
  assert.equal(seen.size, 8);
  assert.equal(seen.get('p0'), 2);
  console.log('ok push');
}

async function steady() {
  const topic = `${prefix}-steady`;
  const p = await producer(topic);
  const consumer = await simple(topic, `${prefix}-steady`);
  const before = [...Array(5).keys()].map(i => `b${i}`);
  for (const body of before) await p.send(message(topic, body));
  console.log('READY');
  await new Promise(done => createInterface({ input: process.stdin }).once('line', done));
  const until = Date.now() + 60_000;
  const after = [...Array(5).keys()].map(i => `a${i}`);
  for (const body of after) {
    for (;;) {
      try {
        await p.send(message(topic, body));
        break;
      } catch (e) {
        assert.ok(Date.now() < until, `cannot send: ${e}`);
        await sleep(500);
      }
    }
  }
  const all = [...before, ...after];
  const got = new Map();
  while (!all.every(b => got.has(b))) {
    assert.ok(Date.now() < until, `lost: ${all.filter(b => !got.has(b))}`);
    try {
      for (const [body, m] of await receive(consumer, all, 5)) got.set(body, m);
    } catch {
      await sleep(500);
    }
  }
  console.log('DONE');
}

// The server is away for a moment.
async function untilItWorks(call) {
  const until = Date.now() + 60_000;
  for (;;) {
    try {
      return await call();
    } catch (e) {
      assert.ok(Date.now() < until, `the server does not come back: ${e}`);
      await sleep(500);
    }
  }
}

async function kinds() {
  const [fifo, delay, tx] = ['fifo', 'delay', 'tx'].map(name => `${prefix}-${name}`);
  const ordered = await producer(fifo);
  for (let i = 0; i < 6; i++) {
    for (const group of 'ab') await ordered.send({ ...message(fifo, `${group}${i}`), messageGroup: group });
  }
  const timer = await producer(delay);
  const due = Date.now() + 6000;
  await timer.send({ ...message(delay, 'later'), deliveryTimestamp: new Date(due) });
  const recalled = await timer.send({ ...message(delay, 'recalled'), deliveryTimestamp: new Date(due) });
  const checker = {
    async check(m) {
      return m.body.toString() === 'orphan' ? COMMIT : UNKNOWN;
    },
  };
  const transactional = new Producer({ ...common, topics: [tx], checker });
  await transactional.startup();
  const transactions = {};
  for (const body of ['committed', 'rolled back', 'orphan']) {
    transactions[body] = transactional.beginTransaction();
    await transactional.send(message(tx, body), transactions[body]);
  }
  console.log('READY');
  await new Promise(done => createInterface({ input: process.stdin }).once('line', done));

  await untilItWorks(() => timer.recallMessage(delay, recalled.recallHandle));
  await untilItWorks(() => transactions.committed.commit());
  await untilItWorks(() => transactions['rolled back'].rollback());

  const order = [];
  let failed = false;
  const push = new PushConsumer({
    ...common,
    consumerGroup: fifo,
    subscriptions: new Map([[fifo, '*']]),
    messageListener: {
      async consume(m) {
        const body = m.body.toString();
        if (body === 'a2' && !failed) {
          failed = true;
          return ConsumeResult.FAILURE;
        }
        order.push(body);
        return ConsumeResult.SUCCESS;
      },
    },
  });
  await push.startup();
  for (let i = 0; i < 600 && order.length < 12; i++) await sleep(100);
  for (const group of 'ab') {
    assert.deepEqual(order.filter(b => b[0] === group), [...Array(6).keys()].map(i => `${group}${i}`));
  }
  console.log('ok fifo');

  const timed = await simple(delay, delay);
  const got = await receive(timed, ['later']);
  assert.deepEqual([...got.keys()], ['later']);
  assert.ok(Date.now() >= due);
  console.log('ok delay');

  const decided = await receive(await simple(tx, tx), ['committed', 'orphan'], 40);
  assert.deepEqual([...decided.keys()].sort(), ['committed', 'orphan']);
  console.log('DONE');
}

await { basic, steady, kinds }[mode]();
process.exit(0);
