// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/limit"
	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// The tests here count the process's file descriptors and goroutines, so they don't run in parallel.

func TestMain(m *testing.M) {
	r, w, _ := os.Pipe() // starts the runtime's poller, whose descriptors stay
	_, _ = r.Close(), w.Close()
	os.Exit(m.Run())
}

// testPeer counts itself away on Close.
type testPeer struct {
	key  uint32
	open *atomic.Int64
}

func (p testPeer) Key() uint32 { return p.key }
func (p testPeer) Close()      { p.open.Add(-1) }

const testDescription = `interface org.example.test

method Echo(text: string) -> (text: string)
`

type fixture struct {
	*Server[testPeer]
	path     string
	listener *net.UnixListener
	stop     func() error // ends Serve and returns its error; may be called again

	key     atomic.Uint32 // of peers to come
	started chan struct{} // a blocking method has begun
	release chan struct{} // closed by the test: a blocking method may end
	ended   chan error    // a blocking method's ctx.Err at its end
	undone  atomic.Int64
	plain   atomic.Int64 // calls of Plain
}

type encodingFails struct{}

func (encodingFails) MarshalJSON() ([]byte, error) { return nil, errors.New("secret") }

func serve(t testing.TB, limits Limits) *fixture {
	t.Helper()
	return serveUsers(t, limits, limit.NewUsers(limit.Requests, limit.Rate, limit.Burst))
}

func serveUsers(t testing.TB, limits Limits, users *limit.Users) *fixture {
	t.Helper()
	filesBefore, goroutinesBefore := openFiles(t), runtime.NumGoroutine()
	f := &fixture{
		path:    filepath.Join(t.TempDir(), "socket"),
		started: make(chan struct{}, 10000),
		release: make(chan struct{}),
		ended:   make(chan error, 10000),
	}
	var peers atomic.Int64
	devNull := func() *os.File {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Error(err)
		}
		return null
	}
	none := func(handle func(context.Context, *Call) (*Reply, error)) Method[testPeer] {
		return Method[testPeer]{Handle: func(ctx context.Context, _ testPeer, call *Call) (*Reply, error) {
			if err := call.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			return handle(ctx, call)
		}}
	}
	config := Config[testPeer]{
		Vendor: "V", Product: "P", Version: "1", URL: "https://example.org",
		Interfaces: map[string]string{"org.example.test": testDescription},
		Users:      users,
		Limits:     limits,
		Identify: func(*net.UnixConn) (testPeer, error) {
			if f.key.Load() == 666 {
				return testPeer{}, errors.New("secret")
			}
			peers.Add(1)
			return testPeer{f.key.Load(), &peers}, nil
		},
		Methods: map[string]Method[testPeer]{
			"org.example.test.Plain": none(func(context.Context, *Call) (*Reply, error) {
				f.plain.Add(1)
				return nil, nil
			}),
			// Counts up as long as the peer takes it, with a text of any size.
			"org.example.test.Count": {Streams: true, Handle: func(ctx context.Context, _ testPeer, call *Call) (*Reply, error) {
				var in struct {
					To   int `json:"to"`
					Size int `json:"size,omitempty"`
				}
				if err := call.Decode(&in); err != nil {
					return nil, err
				}
				var err error
				for i := 0; i < in.To && err == nil; i++ {
					err = call.Send(map[string]any{"n": i, "text": strings.Repeat("x", in.Size)})
				}
				f.started <- struct{}{}
				if err == nil && in.To == 0 {
					<-ctx.Done()
					err = ctx.Err()
				}
				f.ended <- err
				return nil, err
			}},
			"org.example.test.Echo": {Handle: func(_ context.Context, _ testPeer, call *Call) (*Reply, error) {
				var in struct {
					Text string `json:"text"`
				}
				if err := call.Decode(&in); err != nil {
					return nil, err
				}
				return &Reply{Parameters: in}, nil
			}},
			"org.example.test.Give": none(func(context.Context, *Call) (*Reply, error) {
				return &Reply{Parameters: map[string]int{"file": 0}, Files: []*os.File{devNull()}, Undo: func() { f.undone.Add(1) }}, nil
			}),
			"org.example.test.Big": none(func(context.Context, *Call) (*Reply, error) {
				return &Reply{Parameters: map[string]string{"x": strings.Repeat("x", 1<<20)}, Files: []*os.File{devNull()}, Undo: func() { f.undone.Add(1) }}, nil
			}),
			"org.example.test.Take": {MaxFiles: 1, Handle: func(_ context.Context, _ testPeer, call *Call) (*Reply, error) {
				var in struct {
					File *int `json:"file"`
				}
				if err := call.Decode(&in); err != nil {
					return nil, err
				}
				undo := &Reply{Undo: func() { f.undone.Add(1) }}
				if in.File == nil {
					return undo, nil
				}
				file, err := call.File(*in.File)
				if err != nil {
					return undo, err
				}
				if _, err := call.File(*in.File); err == nil {
					t.Error("took a file twice")
				}
				return &Reply{Parameters: map[string]string{"name": file.Name()}}, file.Close()
			}},
			"org.example.test.Block": none(func(ctx context.Context, _ *Call) (*Reply, error) {
				f.started <- struct{}{}
				select {
				case <-f.release:
				case <-ctx.Done():
				}
				f.ended <- ctx.Err()
				return nil, ctx.Err()
			}),
			"org.example.test.Stuck": none(func(context.Context, *Call) (*Reply, error) {
				f.started <- struct{}{}
				<-f.release
				return nil, nil
			}),
			"org.example.test.Panic": none(func(context.Context, *Call) (*Reply, error) { panic("secret") }),
			"org.example.test.Fail":  none(func(context.Context, *Call) (*Reply, error) { return nil, errors.New("secret") }),
			"org.example.test.Named": none(func(context.Context, *Call) (*Reply, error) {
				return nil, fmt.Errorf("wrapped: %w", &Error{"org.example.test.Named", map[string]int{"x": 1}})
			}),
			"org.example.test.NamedBadly": none(func(context.Context, *Call) (*Reply, error) {
				return nil, &Error{"org.example.test.Named", encodingFails{}}
			}),
			"org.example.test.Unencodable": none(func(context.Context, *Call) (*Reply, error) {
				return &Reply{Parameters: encodingFails{}, Files: []*os.File{devNull()}, Undo: func() { f.undone.Add(1) }}, nil
			}),
			"org.example.test.FailWithFile": none(func(context.Context, *Call) (*Reply, error) {
				return &Reply{Files: []*os.File{devNull()}}, errors.New("secret")
			}),
			"org.example.test.Undecoded": {Handle: func(context.Context, testPeer, *Call) (*Reply, error) { return nil, nil }},
		},
	}
	var err error
	if f.Server, err = New(config); err != nil {
		t.Fatal(err)
	}
	if f.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: f.path, Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.Serve(ctx, f.listener) }()
	f.stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() {
		if err := f.stop(); err != nil && !t.Failed() {
			t.Errorf("Serve: %v", err)
		}
		_ = f.listener.Close()
		eventually(t, "peers closed", func() bool { return peers.Load() == 0 })
		eventually(t, "goroutines gone", func() bool { return runtime.NumGoroutine() <= goroutinesBefore })
		if diff := cmp.Diff(filesBefore, openFiles(t)); diff != "" {
			t.Errorf("open files differ (-before +after):\n%s", diff)
		}
	})
	return f
}

func openFiles(t testing.TB) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil { // not the one that Glob read
			open = append(open, filepath.Base(link)+" "+target)
		}
	}
	return open
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// client is a raw connection and a Conn on it.
type client struct {
	t testing.TB
	*wire.Conn
	unix *net.UnixConn
}

func (f *fixture) dial(t testing.TB) *client {
	t.Helper()
	unix, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: f.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t, wire.NewConn(unix, wire.Limits{Bytes: 16 << 20, Files: 8}), unix}
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (c *client) send(text string, files ...*os.File) {
	c.t.Helper()
	var control []byte
	for _, f := range files {
		control = append(control, syscall.UnixRights(int(f.Fd()))...)
	}
	if _, _, err := c.unix.WriteMsgUnix([]byte(text+"\x00"), control, nil); err != nil {
		c.t.Fatal(err)
	}
}

// receive returns the reply, "closed" at the end of the connection, and how many files came; those it closes.
func (c *client) receive() (string, int) {
	c.t.Helper()
	data, files, err := c.ReadMessage()
	wire.CloseFiles(files)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return "closed", 0
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return string(data), len(files)
}

// want checks the replies to come: each is the whole text, or an error's name.
func (c *client) want(replies ...string) {
	c.t.Helper()
	for _, want := range replies {
		got, _ := c.receive()
		if strings.HasPrefix(want, "{") || want == "closed" {
			if got != want {
				c.t.Errorf("got %s, want %s", got, want)
			}
			continue
		}
		reply, err := wire.ParseReply([]byte(got))
		if err != nil || reply.Error != want {
			c.t.Errorf("got %s, want error %s", got, want)
			continue
		}
		if strings.HasPrefix(want, brokerInterface) {
			var in struct{ Reason, Layer, Remedy string }
			err := json.Unmarshal(reply.Parameters, &in)
			if err != nil || in.Reason == "" || in.Remedy == "" || !slices.Contains([]string{"request", "limit"}, in.Layer) || strings.Contains(got, "secret") {
				c.t.Errorf("bad parameters in %s", got)
			}
		}
	}
}

const (
	plain = `{"method":"org.example.test.Plain"}`
	block = `{"method":"org.example.test.Block"}`
	empty = `{"parameters":{}}`
)

func TestCalls(t *testing.T) {
	f := serve(t, Limits{})
	tests := map[string]struct{ send, want string }{
		"plain":             {plain, empty},
		"null parameters":   {`{"method":"org.example.test.Plain","parameters":null}`, empty},
		"more":              {`{"method":"org.example.test.Plain","more":true}`, empty},
		"echo":              {`{"method":"org.example.test.Echo","parameters":{"text":"a"}}`, `{"parameters":{"text":"a"}}`},
		"missing parameter": {`{"method":"org.example.test.Echo"}`, `{"parameters":{"parameter":"text"},"error":"org.varlink.service.InvalidParameter"}`},
		"unknown parameter": {`{"method":"org.example.test.Plain","parameters":{"x":1}}`, `{"parameters":{"parameter":"x"},"error":"org.varlink.service.InvalidParameter"}`},
		"wrong type":        {`{"method":"org.example.test.Echo","parameters":{"text":1}}`, `{"parameters":{"parameter":"text"},"error":"org.varlink.service.InvalidParameter"}`},
		"upgrade":           {`{"method":"org.example.test.Plain","upgrade":true}`, `{"parameters":{"parameter":"upgrade"},"error":"org.varlink.service.InvalidParameter"}`},
		"unknown method":    {`{"method":"org.example.test.X"}`, `{"parameters":{"method":"org.example.test.X"},"error":"org.varlink.service.MethodNotFound"}`},
		"unknown interface": {`{"method":"org.example.X.Plain"}`, `{"parameters":{"interface":"org.example.X"},"error":"org.varlink.service.InterfaceNotFound"}`},
		"no interface":      {`{"method":"Plain"}`, `{"parameters":{"interface":""},"error":"org.varlink.service.InterfaceNotFound"}`},
		"failure":           {`{"method":"org.example.test.Fail"}`, "org.bpfbroker.Broker.Internal"},
		"failure and file":  {`{"method":"org.example.test.FailWithFile"}`, "org.bpfbroker.Broker.Internal"},
		"own error":         {`{"method":"org.example.test.Named"}`, `{"parameters":{"x":1},"error":"org.example.test.Named"}`},
		"own error, bad":    {`{"method":"org.example.test.NamedBadly"}`, "org.bpfbroker.Broker.Internal"},
		"bad reply":         {`{"method":"org.example.test.Unencodable"}`, "org.bpfbroker.Broker.Internal"},
		"undecoded":         {`{"method":"org.example.test.Undecoded"}`, "org.bpfbroker.Broker.Internal"},
		"GetInfo": {`{"method":"org.varlink.service.GetInfo"}`,
			`{"parameters":{"vendor":"V","product":"P","version":"1","url":"https://example.org","interfaces":["org.example.test","org.varlink.service"]}}`},
		"GetInfo, parameter": {`{"method":"org.varlink.service.GetInfo","parameters":{"x":1}}`, "org.varlink.service.InvalidParameter"},
		"description":        {`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.example.test"}}`, description(t, testDescription)},
		"own description":    {`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.varlink.service"}}`, description(t, serviceDescription)},
		"no description": {`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"x"}}`,
			`{"parameters":{"interface":"x"},"error":"org.varlink.service.InterfaceNotFound"}`},
		"description of nothing": {`{"method":"org.varlink.service.GetInterfaceDescription"}`, "org.varlink.service.InvalidParameter"},
	}
	one := f.dial(t)
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			one.t = t
			one.send(test.send)
			one.want(test.want)
			one.send(plain) // the connection goes on
			one.want(empty)
		})
	}
	if f.undone.Load() != 1 { // the reply that could not be encoded
		t.Errorf("%d undone", f.undone.Load())
	}
}

func description(t *testing.T, text string) string {
	data, err := json.Marshal(map[string]any{"parameters": map[string]string{"description": text}})
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestBrokenMessages(t *testing.T) {
	tests := map[string]struct{ send, want string }{
		"empty":       {"", "org.bpfbroker.Broker.InvalidMessage"},
		"bad JSON":    {"{", "org.bpfbroker.Broker.InvalidMessage"},
		"no method":   {"{}", "org.bpfbroker.Broker.InvalidMessage"},
		"unknown key": {`{"method":"org.example.test.Plain","x":1}`, "org.bpfbroker.Broker.InvalidMessage"},
		"too long":    {strings.Repeat("x", 64<<10+1), "org.bpfbroker.Broker.MessageTooLarge"},
		"panic":       {`{"method":"org.example.test.Panic"}`, "org.bpfbroker.Broker.Internal"},
	}
	f := serve(t, Limits{})
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			c := f.dial(t)
			c.send(plain)
			c.send(test.send)
			_, _ = c.unix.Write([]byte(plain + "\x00")) // fails when the connection is closed already
			c.want(empty, test.want, "closed")
		})
	}
	if f.plain.Load() != int64(len(tests)) {
		t.Errorf("%d calls, want %d", f.plain.Load(), len(tests))
	}
}

func TestTenMebibytesWithoutEnd(t *testing.T) {
	f := serve(t, Limits{})
	c := f.dial(t)
	n, err := c.unix.Write([]byte(strings.Repeat("x", 10<<20)))
	if err == nil || n > 1<<20 {
		t.Errorf("wrote %d bytes: %v", n, err)
	}
	c.want("org.bpfbroker.Broker.MessageTooLarge", "closed")
}

func TestOneway(t *testing.T) {
	f := serve(t, Limits{})
	c := f.dial(t)
	for _, method := range []string{"Plain", "Give", "Fail", "X"} {
		c.send(`{"method":"org.example.test.` + method + `","oneway":true}`)
	}
	c.send(`{"method":"org.example.test.Echo","parameters":{"text":"a"}}`)
	c.want(`{"parameters":{"text":"a"}}`)
	if f.plain.Load() != 1 || f.undone.Load() != 1 {
		t.Errorf("%d calls, %d undone", f.plain.Load(), f.undone.Load())
	}
	c.send(`{"method":"org.example.test.Panic","oneway":true}`)
	c.want("closed")

	// varlinkctl hangs up at once.
	c = f.dial(t)
	c.send(`{"method":"org.example.test.Block","oneway":true}`)
	_ = c.Close()
	<-f.started
	time.Sleep(50 * time.Millisecond)
	close(f.release)
	if err := <-f.ended; err != nil {
		t.Errorf("oneway call ended with %v", err)
	}
}

func TestStream(t *testing.T) {
	f := serve(t, Limits{Request: time.Millisecond, Write: 200 * time.Millisecond})
	c := f.dial(t)
	c.send(`{"method":"org.example.test.Count","parameters":{"to":3}}`)
	c.want("org.varlink.service.ExpectedMore")
	c.send(`{"method":"org.example.test.Count","parameters":{"to":3},"more":true,"oneway":true}`)
	c.send(`{"method":"org.example.test.Count","parameters":{"to":3},"more":true}`)
	c.want(`{"parameters":{"n":0,"text":""},"continues":true}`, `{"parameters":{"n":1,"text":""},"continues":true}`,
		`{"parameters":{"n":2,"text":""},"continues":true}`, `{"parameters":{}}`)
	if err := <-f.ended; err != nil {
		t.Error(err)
	}

	// The time for a request is not a stream's, and the peer's leaving ends it.
	c.send(`{"method":"org.example.test.Count","parameters":{"to":0},"more":true}`)
	<-f.started
	<-f.started
	time.Sleep(50 * time.Millisecond)
	_ = c.Close()
	if err := <-f.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}

	// A peer that doesn't read holds nobody up for long.
	c = f.dial(t)
	c.send(`{"method":"org.example.test.Count","parameters":{"to":1000,"size":100000},"more":true}`)
	if err := <-f.ended; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("ended with %v", err)
	}

	// Neither does a stream hold up the server's end.
	c = f.dial(t)
	c.send(`{"method":"org.example.test.Count","parameters":{"to":0},"more":true}`)
	<-f.started
	<-f.started
	start := time.Now()
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("stopping took %v", took)
	}
}

func TestPipelining(t *testing.T) {
	f := serve(t, Limits{})
	c := f.dial(t)
	var text strings.Builder
	var want []string
	for i := range 100 {
		fmt.Fprintf(&text, `{"method":"org.example.test.Echo","parameters":{"text":"%d"}}`+"\x00", i)
		want = append(want, fmt.Sprintf(`{"parameters":{"text":"%d"}}`, i))
	}
	c.send(strings.TrimSuffix(text.String(), "\x00"))
	c.want(want...)
}

func TestFiles(t *testing.T) {
	f := serve(t, Limits{})
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	take := func(index string) string {
		return `{"method":"org.example.test.Take","parameters":{"file":` + index + `}}`
	}
	taken := `{"parameters":{"name":"received"}}`
	tests := map[string]struct {
		send   string
		files  int
		want   []string
		undone int64
	}{
		"taken":                    {take("0"), 1, []string{taken, empty}, 0},
		"no file":                  {take("0"), 0, []string{"org.bpfbroker.Broker.NoSuchFileDescriptor", empty}, 1},
		"wrong index":              {take("1"), 1, []string{"org.bpfbroker.Broker.NoSuchFileDescriptor", empty}, 1},
		"negative index":           {take("-1"), 1, []string{"org.bpfbroker.Broker.NoSuchFileDescriptor", empty}, 1},
		"huge index":               {take("1e99"), 1, []string{"org.varlink.service.InvalidParameter", empty}, 0},
		"no index":                 {take("null"), 1, []string{"org.bpfbroker.Broker.UnexpectedFileDescriptor", empty}, 1},
		"method without files":     {plain, 1, []string{"org.bpfbroker.Broker.UnexpectedFileDescriptor", empty}, 0},
		"unknown method":           {`{"method":"x.y"}`, 1, []string{"org.varlink.service.InterfaceNotFound", empty}, 0},
		"two":                      {take("0"), 2, []string{"org.bpfbroker.Broker.TooManyFileDescriptors", "closed"}, 0},
		"two, method without":      {plain, 2, []string{"org.bpfbroker.Broker.TooManyFileDescriptors", "closed"}, 0},
		"two hundred fifty":        {take("0"), 250, []string{"org.bpfbroker.Broker.TooManyFileDescriptors", "closed"}, 0},
		"with a panic":             {`{"method":"org.example.test.Panic"}`, 1, []string{"org.bpfbroker.Broker.UnexpectedFileDescriptor", empty}, 0},
		"with rubbish":             {"rubbish", 1, []string{"org.bpfbroker.Broker.InvalidMessage", "closed"}, 0},
		"with too long a message":  {strings.Repeat("x", 64<<10+1), 1, []string{"org.bpfbroker.Broker.MessageTooLarge", "closed"}, 0},
		"with an unknown argument": {`{"method":"org.example.test.Take","parameters":{"x":0}}`, 1, []string{"org.varlink.service.InvalidParameter", empty}, 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			undone := f.undone.Load()
			c := f.dial(t)
			fds := make([]int, test.files)
			for i := range fds {
				fds[i] = int(file.Fd())
			}
			control := []byte(nil)
			if len(fds) > 0 {
				control = syscall.UnixRights(fds...)
			}
			if _, _, err := c.unix.WriteMsgUnix([]byte(test.send+"\x00"), control, nil); err != nil {
				t.Fatal(err)
			}
			_, _ = c.unix.Write([]byte(plain + "\x00")) // fails when the connection is closed already
			c.want(test.want...)
			if got := f.undone.Load() - undone; got != test.undone {
				t.Errorf("undone %d times, want %d", got, test.undone)
			}
		})
	}

	c := f.dial(t)
	c.send(`{"method":"org.example.test.Give"}`)
	if reply, files := c.receive(); reply != `{"parameters":{"file":0}}` || files != 1 {
		t.Errorf("got %s with %d files", reply, files)
	}
}

func TestConnectionsPerUser(t *testing.T) {
	f := serve(t, Limits{})
	f.key.Store(1)
	var all []*client
	for range 1000 { // a backlog of 1000 may be more than the kernel takes
		c := f.dial(t)
		all = append(all, c)
	}
	for i, c := range all {
		if i >= 128 {
			c.want("org.bpfbroker.Broker.TooManyConnections", "closed")
			continue
		}
		c.send(plain)
		c.want(empty)
	}
	f.key.Store(2) // somebody else doesn't notice
	other := f.dial(t)
	other.send(plain)
	other.want(empty)

	f.key.Store(1) // a place that is free again can be had
	_ = all[0].Close()
	eventually(t, "free place", func() bool {
		c := f.dial(t)
		defer c.Close()
		if _, err := c.unix.Write([]byte(plain + "\x00")); err != nil {
			return false
		}
		reply, _ := c.receive()
		return reply == empty
	})
}

func TestConnectionsInAll(t *testing.T) {
	f := serve(t, Limits{Connections: 3})
	for key := range 3 {
		f.key.Store(uint32(key))
		c := f.dial(t)
		c.send(plain)
		c.want(empty)
	}
	f.key.Store(4)
	f.dial(t).want("org.bpfbroker.Broker.TooManyConnections", "closed")
}

func TestUnidentified(t *testing.T) {
	f := serve(t, Limits{})
	f.key.Store(666)
	f.dial(t).want("org.bpfbroker.Broker.Internal", "closed")
}

func TestRequestsPerUser(t *testing.T) {
	f := serveUsers(t, Limits{}, limit.NewUsers(2, limit.Rate, limit.Burst))
	var busy []*client
	for range 2 {
		c := f.dial(t)
		c.send(block)
		<-f.started
		busy = append(busy, c)
	}
	c := f.dial(t)
	c.send(plain)
	c.want("org.bpfbroker.Broker.QuotaExceeded")
	close(f.release)
	for _, b := range busy {
		b.want(empty)
	}
	eventually(t, "both have ended", func() bool {
		c.send(plain)
		reply, _ := c.receive()
		return reply == empty
	})
}

// Who takes no answers doesn't get more of them ready.
func TestUntakenAnswersCount(t *testing.T) {
	f := serveUsers(t, Limits{}, limit.NewUsers(2, limit.Rate, limit.Burst))
	for range 2 {
		f.dial(t).send(`{"method":"org.example.test.Big"}`)
	}
	c := f.dial(t)
	eventually(t, "the user has two answers waiting", func() bool {
		c.send(plain)
		reply, _ := c.receive()
		return strings.Contains(reply, "QuotaExceeded")
	})
	time.Sleep(50 * time.Millisecond) // they still wait
	c.send(plain)
	c.want("org.bpfbroker.Broker.QuotaExceeded")
	f.key.Store(2)
	other := f.dial(t)
	other.send(plain)
	other.want(empty)
}

func TestRate(t *testing.T) {
	f := serveUsers(t, Limits{}, limit.NewUsers(limit.Requests, 1, 3))
	f.key.Store(1)
	c := f.dial(t)
	for range 3 {
		c.send(plain)
		c.want(empty)
	}
	c.send(plain)
	c.want("org.bpfbroker.Broker.QuotaExceeded", "closed")
	c = f.dial(t) // a new connection changes nothing
	c.send(plain)
	c.want("org.bpfbroker.Broker.QuotaExceeded", "closed")
	f.key.Store(2)
	c = f.dial(t)
	c.send(plain)
	c.want(empty)
	f.key.Store(1)
	time.Sleep(1100 * time.Millisecond)
	c = f.dial(t)
	c.send(plain)
	c.want(empty)
}

func TestRateCountsLongMessages(t *testing.T) {
	f := serveUsers(t, Limits{}, limit.NewUsers(limit.Requests, 1, 100))
	c := f.dial(t)
	long := plain + strings.Repeat(" ", 60<<10)
	c.send(long)
	c.send(long)
	c.want(empty, "org.bpfbroker.Broker.QuotaExceeded", "closed")
}

func TestConnectionsAreForgotten(t *testing.T) {
	c := connections{limits: Limits{}.withDefaults(), byKey: make(map[uint32]int)}
	c.connect(0)
	for key := range uint32(1000) {
		c.connect(key)
		c.disconnect(key)
	}
	if len(c.byKey) != 1 || c.byKey[0] != 1 || c.all != 1 {
		t.Errorf("%d connections of %v", c.all, c.byKey)
	}
}

func TestSlowWriter(t *testing.T) {
	f := serve(t, Limits{Arrival: 50 * time.Millisecond})
	c := f.dial(t)
	begin := time.Now()
	for _, b := range []byte(plain) {
		if _, err := c.unix.Write([]byte{b}); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.want("closed")
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestHalfMessage(t *testing.T) {
	f := serve(t, Limits{Arrival: 50 * time.Millisecond})
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	hangsUp, waits := f.dial(t), f.dial(t)
	for _, c := range []*client{hangsUp, waits} {
		if _, _, err := c.unix.WriteMsgUnix([]byte("{"), syscall.UnixRights(int(file.Fd())), nil); err != nil {
			t.Fatal(err)
		}
	}
	_ = hangsUp.Close()
	waits.want("closed")

	// Half a message doesn't harm the call before it.
	c := f.dial(t)
	c.send(block)
	if _, err := c.unix.Write([]byte("{")); err != nil {
		t.Fatal(err)
	}
	<-f.started
	time.Sleep(200 * time.Millisecond)
	close(f.release)
	c.want(empty, "closed")
}

func TestIdleConnection(t *testing.T) {
	f := serve(t, Limits{Idle: 100 * time.Millisecond})
	c := f.dial(t)
	c.send(block)
	<-f.started
	time.Sleep(200 * time.Millisecond) // with a request it isn't idle
	close(f.release)
	c.want(empty, "closed")
}

func TestPeerThatNeverReads(t *testing.T) {
	f := serve(t, Limits{Write: 50 * time.Millisecond})
	c := f.dial(t)
	c.send(`{"method":"org.example.test.Big"}`)
	eventually(t, "undone and closed", func() bool {
		_, idle := f.IdleSince()
		return idle && f.undone.Load() == 1
	})
}

func TestHangUpEndsRequest(t *testing.T) {
	f := serve(t, Limits{})
	for name, hangUp := range map[string]func(*client){
		"close":          func(c *client) { _ = c.Close() },
		"half close":     func(c *client) { _ = c.unix.CloseWrite() },
		"half a message": func(c *client) { _, _ = c.unix.Write([]byte("{")); _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			c := f.dial(t)
			c.send(block)
			<-f.started
			select {
			case err := <-f.ended:
				t.Fatalf("ended before: %v", err)
			case <-time.After(20 * time.Millisecond):
			}
			hangUp(c)
			if err := <-f.ended; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want %v", err, context.Canceled)
			}
		})
	}
}

func TestHangUpUndoes(t *testing.T) {
	f := serve(t, Limits{})
	for range 20 {
		c := f.dial(t)
		c.send(`{"method":"org.example.test.Block","oneway":true}`)
		c.send(`{"method":"org.example.test.Give"}`)
		<-f.started
		_ = c.Close()
		f.release <- struct{}{}
		<-f.ended
	}
	eventually(t, "undone", func() bool { return f.undone.Load() == 20 })
}

func TestRequestTime(t *testing.T) {
	f := serve(t, Limits{Request: 50 * time.Millisecond})
	c := f.dial(t)
	c.send(block)
	c.want("org.bpfbroker.Broker.Internal")
	if err := <-f.ended; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

func TestIdleSince(t *testing.T) {
	f := serve(t, Limits{})
	first, idle := f.IdleSince()
	if !idle || time.Since(first) > 5*time.Second {
		t.Errorf("at the start: %v, %v", first, idle)
	}
	c := f.dial(t)
	c.send(plain)
	c.want(empty)
	if _, idle := f.IdleSince(); idle {
		t.Error("idle with a connection")
	}
	_ = c.Close()
	eventually(t, "idle", func() bool { _, idle := f.IdleSince(); return idle })
	if since, _ := f.IdleSince(); !since.After(first) {
		t.Errorf("idle since %v, before %v", since, first)
	}
}

// Whoever is connected when the server stops gets an answer; whoever is not waits for the next server.
func TestStopLosesNothing(t *testing.T) {
	f := serve(t, Limits{Linger: 300 * time.Millisecond})
	busy, quiet, late := f.dial(t), f.dial(t), f.dial(t)
	for _, c := range []*client{busy, quiet, late} {
		c.send(plain)
		c.want(empty)
	}
	busy.send(block + "\x00" + plain)
	<-f.started
	stopped := make(chan error, 1)
	go func() { stopped <- f.stop() }()
	late.send(plain) // before it could know
	late.want(empty)

	time.Sleep(100 * time.Millisecond)
	next := f.dial(t) // into the backlog
	next.send(`{"method":"org.example.test.Echo","parameters":{"text":"next"}}`)

	quiet.want("closed")
	close(f.release)
	busy.want(empty, empty, "closed")
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if err := f.listener.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	again := make(chan error)
	go func() { again <- f.Serve(ctx, f.listener) }()
	next.want(`{"parameters":{"text":"next"}}`)
	cancel()
	if err := <-again; err != nil {
		t.Error(err)
	}
}

// Clients that come and go all the time, while servers stop and start: each request gets its answer, or its connection was never accepted.
func TestStopUnderLoad(t *testing.T) {
	f := serveUsers(t, Limits{Linger: 500 * time.Millisecond}, limit.NewUsers(limit.Requests, 1<<20, 1<<20))
	var clients sync.WaitGroup
	var answers atomic.Int64
	for range 8 {
		clients.Go(func() {
			for range 200 {
				c := f.dial(t)
				c.send(plain)
				c.want(empty)
				_ = c.Close()
				answers.Add(1)
			}
		})
	}
	eventually(t, "some answers", func() bool { return answers.Load() > 100 })
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	for range 3 {
		_ = f.listener.SetDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if err := f.Serve(ctx, f.listener); err != nil {
			t.Error(err)
		}
		cancel()
	}
	_ = f.listener.SetDeadline(time.Time{})
	ctx, cancel := context.WithCancel(context.Background())
	last := make(chan error)
	go func() { last <- f.Serve(ctx, f.listener) }()
	clients.Wait()
	cancel()
	if err := <-last; err != nil {
		t.Error(err)
	}
}

func TestStopEndsLongRequests(t *testing.T) {
	f := serve(t, Limits{Drain: 50 * time.Millisecond, Linger: time.Millisecond})
	c := f.dial(t)
	c.send(block)
	<-f.started
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	if err := <-f.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	c.want("org.bpfbroker.Broker.Internal", "closed")
}

func TestStopGivesUp(t *testing.T) {
	f := serve(t, Limits{Drain: 20 * time.Millisecond, Write: 20 * time.Millisecond})
	c := f.dial(t)
	c.send(`{"method":"org.example.test.Stuck"}`)
	<-f.started
	if err := f.stop(); err == nil {
		t.Error("stopped with a request under way")
	}
	f.stop = func() error { return nil }
	close(f.release)
	c.want(empty, "closed")
}

func TestServeWithoutListener(t *testing.T) {
	f := serve(t, Limits{})
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	_ = f.listener.Close()
	if err := f.Serve(context.Background(), f.listener); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func TestNewRefusesStrayMethod(t *testing.T) {
	_, err := New(Config[testPeer]{Methods: map[string]Method[testPeer]{"org.example.X": {}}})
	if err == nil {
		t.Error("a method without an interface was taken")
	}
}

func BenchmarkGetInfo(b *testing.B) {
	f := serveUsers(b, Limits{}, limit.NewUsers(limit.Requests, 1<<30, 1<<30))
	c := f.dial(b)
	_ = c.SetDeadline(time.Time{})
	request := wire.Request{Method: "org.varlink.service.GetInfo"}
	for b.Loop() {
		if err := c.WriteMessage(request); err != nil {
			b.Fatal(err)
		}
		data, _, err := c.ReadMessage()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := wire.ParseReply(data); err != nil {
			b.Fatal(err)
		}
	}
}
