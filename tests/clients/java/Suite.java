import java.lang.reflect.Method;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicBoolean;
import org.apache.rocketmq.client.apis.ClientConfiguration;
import org.apache.rocketmq.client.apis.ClientServiceProvider;
import org.apache.rocketmq.client.apis.consumer.ConsumeResult;
import org.apache.rocketmq.client.apis.consumer.FilterExpression;
import org.apache.rocketmq.client.apis.consumer.SimpleConsumer;
import org.apache.rocketmq.client.apis.message.Message;
import org.apache.rocketmq.client.apis.message.MessageBuilder;
import org.apache.rocketmq.client.apis.message.MessageView;
import org.apache.rocketmq.client.apis.producer.Producer;
import org.apache.rocketmq.client.apis.producer.SendReceipt;
import org.apache.rocketmq.client.apis.producer.Transaction;
import org.apache.rocketmq.client.apis.producer.TransactionResolution;

/** The Java client as a test: Suite ENDPOINT PREFIX MODE (see ../README.md). TLS as by default, unless TLS=0. */
public class Suite {
    static final ClientServiceProvider provider = ClientServiceProvider.loadService();
    static ClientConfiguration configuration;
    static String prefix;

    static void check(boolean ok, Object what) {
        if (!ok) throw new AssertionError(String.valueOf(what));
    }

    static Producer producer(String... topics) throws Exception {
        return provider.newProducerBuilder().setClientConfiguration(configuration).setTopics(topics).build();
    }

    static SimpleConsumer simple(String topic, String group, String tags) throws Exception {
        return provider.newSimpleConsumerBuilder().setClientConfiguration(configuration).setConsumerGroup(group)
            .setAwaitDuration(Duration.ofSeconds(5))
            .setSubscriptionExpressions(Map.of(topic, new FilterExpression(tags))).build();
    }

    static void send(Producer p, String topic, String body, String tag) throws Exception {
        Message m = provider.newMessageBuilder().setTopic(topic).setBody(body.getBytes(StandardCharsets.UTF_8))
            .setTag(tag).setKeys("key-" + body).addProperty("language", "java").build();
        p.send(m);
    }

    static String body(MessageView m) {
        ByteBuffer b = m.getBody();
        byte[] bytes = new byte[b.remaining()];
        b.get(bytes);
        return new String(bytes, StandardCharsets.UTF_8);
    }

    /** Receives and acknowledges until everything wanted is there. */
    static Map<String, MessageView> receive(SimpleConsumer c, List<String> want, int seconds) throws Exception {
        Map<String, MessageView> got = new TreeMap<>();
        long until = System.currentTimeMillis() + seconds * 1000L;
        while (!got.keySet().containsAll(want) && System.currentTimeMillis() < until) {
            for (MessageView m : c.receive(16, Duration.ofSeconds(30))) {
                c.ack(m);
                got.put(body(m), m);
            }
        }
        return got;
    }

    static List<String> numbered(String prefix, int n) {
        List<String> out = new ArrayList<>();
        for (int i = 0; i < n; i++) out.add(prefix + i);
        return out;
    }

    static void basic() throws Exception {
        String[] topics = {prefix + "-simple", prefix + "-tag", prefix + "-dlq", prefix + "-push"};
        Producer p = producer(topics);

        List<String> bodies = numbered("m", 8);
        for (String b : bodies) send(p, topics[0], b, "x");
        Map<String, MessageView> got = receive(simple(topics[0], prefix + "-simple", "*"), bodies, 30);
        check(new ArrayList<>(got.keySet()).equals(bodies), got);
        for (Map.Entry<String, MessageView> e : got.entrySet()) {
            MessageView m = e.getValue();
            check(m.getDeliveryAttempt() == 1 && m.getKeys().contains("key-" + e.getKey()), m);
            check("java".equals(m.getProperties().get("language")), m);
        }
        System.out.println("ok simple");

        List<String> mixed = numbered("t", 8);
        for (int i = 0; i < 8; i++) send(p, topics[1], mixed.get(i), i % 2 == 0 ? "a" : "b");
        List<String> want = List.of("t0", "t2", "t4", "t6");
        got = receive(simple(topics[1], prefix + "-tag", "a"), want, 30);
        check(new ArrayList<>(got.keySet()).equals(want), got);
        System.out.println("ok tag");

        send(p, topics[2], "fails", "x");
        SimpleConsumer failing = simple(topics[2], prefix + "-dlq", "*");
        List<Integer> attempts = new ArrayList<>();
        long until = System.currentTimeMillis() + 26_000;
        while (System.currentTimeMillis() < until) {
            for (MessageView m : failing.receive(16, Duration.ofSeconds(10))) attempts.add(m.getDeliveryAttempt());
        }
        check(attempts.equals(List.of(1, 2)), attempts);
        System.out.println("ok dlq");

        Map<String, Integer> seen = new ConcurrentHashMap<>();
        provider.newPushConsumerBuilder().setClientConfiguration(configuration).setConsumerGroup(prefix + "-push")
            .setSubscriptionExpressions(Map.of(topics[3], new FilterExpression("*")))
            .setMessageListener(m -> {
                seen.put(body(m), m.getDeliveryAttempt());
                boolean fail = body(m).equals("p0") && m.getDeliveryAttempt() == 1;
                return fail ? ConsumeResult.FAILURE : ConsumeResult.SUCCESS;
            }).build();
        for (String b : numbered("p", 8)) send(p, topics[3], b, "x");
        for (int i = 0; i < 300 && !(seen.size() == 8 && seen.get("p0") == 2); i++) Thread.sleep(100);
        check(seen.size() == 8 && seen.get("p0") == 2, seen);
        System.out.println("ok push");
    }

    static void steady() throws Exception {
        String topic = prefix + "-steady";
        Producer p = producer(topic);
        SimpleConsumer c = simple(topic, prefix + "-steady", "*");
        List<String> all = numbered("b", 5);
        for (String b : all) send(p, topic, b, "x");
        System.out.println("READY");
        System.in.read();
        long until = System.currentTimeMillis() + 60_000;
        for (String b : numbered("a", 5)) {
            all.add(b);
            while (true) {
                try {
                    send(p, topic, b, "x");
                    break;
                } catch (Exception e) {
                    check(System.currentTimeMillis() < until, "cannot send: " + e);
                    Thread.sleep(500);
                }
            }
        }
        TreeSet<String> got = new TreeSet<>();
        while (!got.containsAll(all)) {
            check(System.currentTimeMillis() < until, "lost: have only " + got);
            try {
                got.addAll(receive(c, all, 5).keySet());
            } catch (Exception e) {
                Thread.sleep(500);
            }
        }
        System.out.println("DONE");
    }

    interface Call {
        void run() throws Exception;
    }

    /** The server is away for a moment. */
    static void untilItWorks(Call call) throws Exception {
        long until = System.currentTimeMillis() + 60_000;
        while (true) {
            try {
                call.run();
                return;
            } catch (Exception e) {
                check(System.currentTimeMillis() < until, "the server does not come back: " + e);
                Thread.sleep(500);
            }
        }
    }

    static MessageBuilder builder(String topic, String body) {
        return provider.newMessageBuilder().setTopic(topic).setBody(body.getBytes(StandardCharsets.UTF_8));
    }

    static void kinds() throws Exception {
        String fifo = prefix + "-fifo", delay = prefix + "-delay", tx = prefix + "-tx";
        Producer p = producer(fifo, delay);
        for (int i = 0; i < 6; i++) {
            for (String group : List.of("a", "b")) p.send(builder(fifo, group + i).setMessageGroup(group).build());
        }
        long due = System.currentTimeMillis() + 6000;
        p.send(builder(delay, "later").setDeliveryTimestamp(due).build());
        // The older of the two clients cannot recall.
        Method recall = null;
        for (Method m : Producer.class.getMethods()) if (m.getName().equals("recallMessage")) recall = m;
        Object handle = null;
        if (recall != null) {
            SendReceipt receipt = p.send(builder(delay, "recalled").setDeliveryTimestamp(due).build());
            handle = SendReceipt.class.getMethod("getRecallHandle").invoke(receipt);
        }
        Producer transactional = provider.newProducerBuilder().setClientConfiguration(configuration).setTopics(tx)
            .setTransactionChecker(m ->
                body(m).equals("orphan") ? TransactionResolution.COMMIT : TransactionResolution.UNKNOWN).build();
        Map<String, Transaction> transactions = new TreeMap<>();
        for (String b : List.of("committed", "rolled back", "orphan")) {
            Transaction t = transactional.beginTransaction();
            transactional.send(builder(tx, b).build(), t);
            transactions.put(b, t);
        }
        System.out.println("READY");
        System.in.read();

        if (recall != null) {
            Method method = recall;
            Object argument = handle;
            untilItWorks(() -> method.invoke(p, delay, argument));
        }
        untilItWorks(transactions.get("committed")::commit);
        untilItWorks(transactions.get("rolled back")::rollback);

        List<String> order = Collections.synchronizedList(new ArrayList<>());
        AtomicBoolean failed = new AtomicBoolean();
        provider.newPushConsumerBuilder().setClientConfiguration(configuration).setConsumerGroup(fifo)
            .setSubscriptionExpressions(Map.of(fifo, new FilterExpression("*")))
            .setMessageListener(m -> {
                if (body(m).equals("a2") && failed.compareAndSet(false, true)) return ConsumeResult.FAILURE;
                order.add(body(m));
                return ConsumeResult.SUCCESS;
            }).build();
        for (int i = 0; i < 600 && order.size() < 12; i++) Thread.sleep(100);
        for (String group : List.of("a", "b")) {
            List<String> got = new ArrayList<>(order);
            got.removeIf(b -> !b.startsWith(group));
            check(got.equals(numbered(group, 6)), order);
        }
        System.out.println("ok fifo");

        Map<String, MessageView> got = receive(simple(delay, delay, "*"), List.of("later"), 30);
        check(new ArrayList<>(got.keySet()).equals(List.of("later")), got);
        check(System.currentTimeMillis() >= due, "early");
        System.out.println("ok delay");

        List<String> want = List.of("committed", "orphan");
        got = receive(simple(tx, tx, "*"), want, 40);
        check(new ArrayList<>(got.keySet()).equals(want), got);
        System.out.println("DONE");
    }

    public static void main(String[] args) throws Exception {
        prefix = args[1];
        var builder = ClientConfiguration.newBuilder().setEndpoints(args[0]).setRequestTimeout(Duration.ofSeconds(3));
        if ("0".equals(System.getenv("TLS"))) builder.enableSsl(false);
        configuration = builder.build();
        try {
            switch (args[2]) {
                case "basic" -> basic();
                case "kinds" -> kinds();
                default -> steady();
            }
            System.exit(0);
        } catch (Throwable e) {
            e.printStackTrace();
            System.exit(1);
        }
    }
}
