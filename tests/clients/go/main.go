// The Go client as a test: suite ENDPOINT PREFIX MODE (see ../README.md).
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"reflect"
	"sort"
	"sync"
	"time"

	rmq "github.com/apache/rocketmq-clients/golang/v5"
	"github.com/apache/rocketmq-clients/golang/v5/credentials"
)

var endpoint, prefix string

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func config(group string) *rmq.Config {
	return &rmq.Config{Endpoint: endpoint, ConsumerGroup: group, Credentials: &credentials.SessionCredentials{}}
}

func producer(topics ...string) rmq.Producer {
	p, err := rmq.NewProducer(config(""), rmq.WithTopics(topics...))
	must(err)
	must(p.Start())
	return p
}

func simple(topic, group, tags string) rmq.SimpleConsumer {
	c, err := rmq.NewSimpleConsumer(config(group), rmq.WithSimpleAwaitDuration(5*time.Second),
		rmq.WithSimpleSubscriptionExpressions(map[string]*rmq.FilterExpression{topic: rmq.NewFilterExpression(tags)}))
	must(err)
	must(c.Start())
	return c
}

func send(p rmq.Producer, topic, body, tag string) error {
	m := &rmq.Message{Topic: topic, Body: []byte(body)}
	m.SetTag(tag)
	m.SetKeys("key-" + body)
	m.AddProperty("language", "go")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := p.Send(ctx, m)
	return err
}

// receive receives and acknowledges until everything wanted is there.
func receive(c rmq.SimpleConsumer, want []string, wait time.Duration) map[string]*rmq.MessageView {
	got := map[string]*rmq.MessageView{}
	for until := time.Now().Add(wait); !all(got, want) && time.Now().Before(until); {
		ms, err := c.Receive(context.Background(), 16, 30*time.Second)
		if err != nil {
			continue // "no new message" is an error in this client
		}
		for _, m := range ms {
			if c.Ack(context.Background(), m) == nil {
				got[string(m.GetBody())] = m
			}
		}
	}
	return got
}

func all(got map[string]*rmq.MessageView, want []string) bool {
	for _, b := range want {
		if got[b] == nil {
			return false
		}
	}
	return true
}

func keys(got map[string]*rmq.MessageView) []string {
	out := []string{}
	for b := range got {
		out = append(out, b)
	}
	sort.Strings(out)
	return out
}

func equal(got, want any) {
	if !reflect.DeepEqual(got, want) {
		panic(fmt.Sprintf("got %v, want %v", got, want))
	}
}

func numbered(prefix string, n int) []string {
	out := []string{}
	for i := 0; i < n; i++ {
		out = append(out, fmt.Sprintf("%s%d", prefix, i))
	}
	return out
}

func basic() {
	topics := []string{prefix + "-simple", prefix + "-tag", prefix + "-dlq", prefix + "-push"}
	p := producer(topics...)

	bodies := numbered("m", 8)
	for _, b := range bodies {
		must(send(p, topics[0], b, "x"))
	}
	got := receive(simple(topics[0], prefix+"-simple", "*"), bodies, 30*time.Second)
	equal(keys(got), bodies)
	for b, m := range got {
		equal(m.GetDeliveryAttempt(), int32(1))
		equal(m.GetKeys(), []string{"key-" + b})
		equal(m.GetProperties()["language"], "go")
	}
	fmt.Println("ok simple")

	for i, b := range numbered("t", 8) {
		must(send(p, topics[1], b, []string{"a", "b"}[i%2]))
	}
	want := []string{"t0", "t2", "t4", "t6"}
	equal(keys(receive(simple(topics[1], prefix+"-tag", "a"), want, 30*time.Second)), want)
	fmt.Println("ok tag")

	must(send(p, topics[2], "fails", "x"))
	failing, attempts := simple(topics[2], prefix+"-dlq", "*"), []int32{}
	for until := time.Now().Add(26 * time.Second); time.Now().Before(until); {
		ms, _ := failing.Receive(context.Background(), 16, 10*time.Second)
		for _, m := range ms {
			attempts = append(attempts, m.GetDeliveryAttempt())
		}
	}
	equal(attempts, []int32{1, 2})
	fmt.Println("ok dlq")

	var lock sync.Mutex
	seen := map[string]int32{}
	listener := &rmq.FuncMessageListener{Consume: func(m *rmq.MessageView) rmq.ConsumerResult {
		lock.Lock()
		defer lock.Unlock()
		seen[string(m.GetBody())] = m.GetDeliveryAttempt()
		if string(m.GetBody()) == "p0" && m.GetDeliveryAttempt() == 1 {
			return rmq.FAILURE
		}
		return rmq.SUCCESS
	}}
	push, err := rmq.NewPushConsumer(config(prefix+"-push"), rmq.WithPushAwaitDuration(5*time.Second),
		rmq.WithPushSubscriptionExpressions(map[string]*rmq.FilterExpression{topics[3]: rmq.SUB_ALL}),
		rmq.WithPushMessageListener(listener), rmq.WithPushConsumptionThreadCount(4), rmq.WithPushMaxCacheMessageCount(64))
	must(err)
	must(push.Start())
	for _, b := range numbered("p", 8) {
		must(send(p, topics[3], b, "x"))
	}
	for i := 0; i < 300; i++ {
		lock.Lock()
		done := len(seen) == 8 && seen["p0"] == 2
		lock.Unlock()
		if done {
			fmt.Println("ok push")
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	panic(fmt.Sprintf("push: %v", seen))
}

func steady() {
	topic := prefix + "-steady"
	p, c := producer(topic), simple(topic, prefix+"-steady", "*")
	before, after := numbered("b", 5), numbered("a", 5)
	for _, b := range before {
		must(send(p, topic, b, "x"))
	}
	fmt.Println("READY")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	must(err)
	until := time.Now().Add(60 * time.Second)
	for _, b := range after {
		for send(p, topic, b, "x") != nil {
			if time.Now().After(until) {
				panic("cannot send")
			}
			time.Sleep(500 * time.Millisecond)
		}
	}
	everything, got := append(before, after...), map[string]*rmq.MessageView{}
	for !all(got, everything) {
		if time.Now().After(until) {
			panic(fmt.Sprintf("lost: have only %v", keys(got)))
		}
		for b, m := range receive(c, everything, 5*time.Second) {
			got[b] = m
		}
	}
	fmt.Println("DONE")
}

// untilItWorks repeats a call while the server is away.
func untilItWorks(call func() error) {
	for until := time.Now().Add(60 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		err := call()
		if err == nil {
			return
		}
		if time.Now().After(until) {
			panic(fmt.Sprintf("the server does not come back: %v", err))
		}
	}
}

func sendMessage(p rmq.Producer, m *rmq.Message, t rmq.Transaction) *rmq.SendReceipt {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var receipts []*rmq.SendReceipt
	var err error
	if t != nil {
		receipts, err = p.SendWithTransaction(ctx, m, t)
	} else {
		receipts, err = p.Send(ctx, m)
	}
	must(err)
	return receipts[0]
}

func kinds() {
	fifo, delay, tx := prefix+"-fifo", prefix+"-delay", prefix+"-tx"
	p := producer(fifo, delay)
	for i := 0; i < 6; i++ {
		for _, group := range []string{"a", "b"} {
			m := &rmq.Message{Topic: fifo, Body: []byte(fmt.Sprintf("%s%d", group, i))}
			m.SetMessageGroup(group)
			sendMessage(p, m, nil)
		}
	}
	due := time.Now().Add(6 * time.Second)
	var recalled *rmq.SendReceipt
	for _, b := range []string{"later", "recalled"} {
		m := &rmq.Message{Topic: delay, Body: []byte(b)}
		m.SetDelayTimestamp(due)
		recalled = sendMessage(p, m, nil)
	}
	checker := &rmq.TransactionChecker{Check: func(m *rmq.MessageView) rmq.TransactionResolution {
		if string(m.GetBody()) == "orphan" {
			return rmq.COMMIT
		}
		return rmq.UNKNOWN
	}}
	transactionalProducer := func() rmq.Producer {
		p, err := rmq.NewProducer(config(""), rmq.WithTopics(tx), rmq.WithTransactionChecker(checker))
		must(err)
		must(p.Start())
		return p
	}
	transactional := transactionalProducer()
	transactions := map[string]rmq.Transaction{}
	for _, b := range []string{"committed", "rolled back", "orphan"} {
		transactions[b] = transactional.BeginTransaction()
		sendMessage(transactional, &rmq.Message{Topic: tx, Body: []byte(b)}, transactions[b])
	}
	fmt.Println("READY")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	must(err)

	untilItWorks(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := p.Recall(ctx, delay, recalled.RecallHandle)
		return err
	})
	untilItWorks(transactions["committed"].Commit)
	untilItWorks(transactions["rolled back"].RollBack)

	var lock sync.Mutex
	order := []string{}
	// No failure here: this client goes on with the next message while it waits to try one again.
	listener := &rmq.FuncMessageListener{Consume: func(m *rmq.MessageView) rmq.ConsumerResult {
		lock.Lock()
		defer lock.Unlock()
		order = append(order, string(m.GetBody()))
		return rmq.SUCCESS
	}}
	push, err := rmq.NewPushConsumer(config(fifo), rmq.WithPushAwaitDuration(5*time.Second),
		rmq.WithPushSubscriptionExpressions(map[string]*rmq.FilterExpression{fifo: rmq.SUB_ALL}),
		rmq.WithPushMessageListener(listener), rmq.WithPushConsumptionThreadCount(4), rmq.WithPushMaxCacheMessageCount(64))
	must(err)
	must(push.Start())
	for i := 0; i < 600; i++ {
		lock.Lock()
		done := len(order) >= 12
		lock.Unlock()
		if done {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	for _, group := range []string{"a", "b"} {
		got := []string{}
		for _, b := range order {
			if b[:1] == group {
				got = append(got, b)
			}
		}
		equal(got, numbered(group, 6))
	}
	fmt.Println("ok fifo")

	equal(keys(receive(simple(delay, delay, "*"), []string{"later"}, 30*time.Second)), []string{"later"})
	if time.Now().Before(due) {
		panic("early")
	}
	fmt.Println("ok delay")

	// After a break this client says only minutes later what it produces; any other producer can be asked instead.
	transactionalProducer()
	want := []string{"committed", "orphan"}
	equal(keys(receive(simple(tx, tx, "*"), want, 40*time.Second)), want)
	fmt.Println("DONE")
}

func main() {
	endpoint, prefix = os.Args[1], os.Args[2]
	rmq.EnableSsl = os.Getenv("TLS") != "0"
	switch os.Args[3] {
	case "basic":
		basic()
	case "kinds":
		kinds()
	default:
		steady()
	}
	os.Exit(0)
}
