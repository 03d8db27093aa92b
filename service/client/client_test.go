// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

const grantJSON = `{"id":"0123456789abcdef","profile":"network","tier":"network","owner":1000,"unit":"a.service","process":7,
	"path":"/sys/fs/bpf","created":1700000000000000,"expires":1700000100000000,"capabilities":["CAP_BPF"],"notEnforced":["Lease="]}`

var wantGrant = Grant{
	ID: "0123456789abcdef", Profile: "network", Tier: "network", Owner: 1000, Unit: "a.service", Process: 7,
	Path: "/sys/fs/bpf", Created: 1700000000000000, Expires: 1700000100000000, Capabilities: []string{"CAP_BPF"}, NotEnforced: []string{"Lease="},
}

func TestMethods(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		method, request, reply string
		call                   func(context.Context, *Client) (any, error)
		want                   any
	}{
		{
			"ListProfiles", `{}`,
			`{"profiles":[{"name":"basic","description":"d","tier":"basic","available":true},
				{"name":"x","description":"","tier":"unlimited","available":false,"reason":"r","remedy":"m"}],"fromTheFuture":1}`,
			func(ctx context.Context, c *Client) (any, error) { return c.ListProfiles(ctx) },
			[]ProfileSummary{
				{Name: "basic", Description: "d", Tier: "basic", Available: true},
				{Name: "x", Tier: "unlimited", Reason: "r", Remedy: "m"},
			},
		},
		{
			"DescribeProfile", `{"profile":"basic"}`,
			`{"profile":{"name":"basic","description":"d","tier":"basic","guard":"unneeded","available":true,"reason":null,"leaseSeconds":60,"commands":["map_create"],
				"maps":["hash"],"programs":["xdp"],"attachments":["xdp"],"capabilities":["CAP_BPF"],"limits":["MaxMaps=1"],"notEnforced":[],"files":["/f"]}}`,
			func(ctx context.Context, c *Client) (any, error) { return c.DescribeProfile(ctx, "basic") },
			&Profile{
				ProfileSummary: ProfileSummary{Name: "basic", Description: "d", Tier: "basic", Available: true},
				Guard:          "unneeded", LeaseSeconds: 60, Commands: []string{"map_create"}, Maps: []string{"hash"}, Programs: []string{"xdp"},
				Attachments: []string{"xdp"}, Capabilities: []string{"CAP_BPF"}, Limits: []string{"MaxMaps=1"}, NotEnforced: []string{}, Files: []string{"/f"},
			},
		},
		{
			"MountToken", `{"profile":"network","processFileDescriptor":0,"path":"/mnt"}`, `{"grant":` + grantJSON + `}`,
			func(ctx context.Context, c *Client) (any, error) {
				return c.MountToken(ctx, "network", os.Stderr, "/mnt")
			},
			&wantGrant,
		},
		{
			"ListGrants", `{}`, `{"grants":[` + grantJSON + `]}`,
			func(ctx context.Context, c *Client) (any, error) { return c.ListGrants(ctx, false) },
			[]Grant{wantGrant},
		},
		{
			"RevokeGrant", `{"grant":"0123456789abcdef","kill":true}`, `{"notReached":["a"]}`,
			func(ctx context.Context, c *Client) (any, error) { return c.RevokeGrant(ctx, "0123456789abcdef", true) },
			[]string{"a"},
		},
		{
			"ListObjects", `{}`, `{"objects":[{"name":"a","description":"d","state":"loaded","available":true},
				{"name":"b","description":"","state":"failed","available":false,"reason":"r","remedy":"m"}]}`,
			func(ctx context.Context, c *Client) (any, error) { return c.ListObjects(ctx) },
			[]ObjectSummary{{Name: "a", Description: "d", State: "loaded", Available: true}, {Name: "b", State: "failed", Reason: "r", Remedy: "m"}},
		},
		{
			"DescribeObject", `{"object":"a"}`,
			`{"object":{"name":"a","description":"d","state":"unloaded","available":true,"load":"boot","keep":"always","maps":[{"name":"m","type":"hash","access":["read-only","consume"],
				"keySize":4,"valueSize":8,"maxEntries":10,"keyType":"int","valueType":null,"btf":"x"}],"programs":[{"name":"p","type":"xdp","new":1}],
				"links":[{"name":"l","program":"q","type":"xdp","target":"lo","attached":true}],"files":["/f"]}}`,
			func(ctx context.Context, c *Client) (any, error) { return c.DescribeObject(ctx, "a") },
			&Object{
				ObjectSummary: ObjectSummary{Name: "a", Description: "d", State: "unloaded", Available: true}, Load: "boot", Keep: "always",
				Maps:     []ObjectMap{{Name: "m", Type: "hash", Access: []Access{ReadOnly, Consume}, KeySize: 4, ValueSize: 8, MaxEntries: 10, KeyType: "int", BTF: "x"}},
				Programs: []ObjectProgram{{Name: "p", Type: "xdp"}}, Links: []ObjectLink{{"l", "q", "xdp", "lo", true}}, Files: []string{"/f"},
			},
		},
		{
			"OpenLink", `{"object":"a","link":"l"}`, `{"link":{"name":"l","program":"q","type":"xdp","target":"lo","attached":true}}`,
			func(ctx context.Context, c *Client) (any, error) { return c.OpenLink(ctx, "a", "l") },
			&ObjectLink{"l", "q", "xdp", "lo", true},
		},
		{
			"MountObjects", `{"objects":["a","b"],"processFileDescriptor":0,"path":"/mnt"}`, `{"pins":["a/m"],"warnings":["w"]}`,
			func(ctx context.Context, c *Client) (any, error) {
				pins, warnings, err := c.MountObjects(ctx, []string{"a", "b"}, os.Stderr, "/mnt")
				return [][]string{pins, warnings}, err
			},
			[][]string{{"a/m"}, {"w"}},
		},
		{
			"MountObjects", `{"objects":["a"],"path":"/mnt"}`, `{"pins":[],"warnings":[]}`,
			func(ctx context.Context, c *Client) (any, error) {
				pins, warnings, err := c.MountObjects(ctx, []string{"a"}, nil, "/mnt")
				return [][]string{pins, warnings}, err
			},
			[][]string{{}, {}},
		},
		{
			"Check", `{}`, `{"findings":[{"subject":"profile x","state":"ask","reason":"r","remedy":"m"}]}`,
			func(ctx context.Context, c *Client) (any, error) { return c.Check(ctx) },
			[]Finding{{Subject: "profile x", State: Ask, Reason: "r", Remedy: "m"}},
		},
	} {
		t.Run(test.method, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, parameters(test.reply))
			got, err := test.call(t.Context(), f.client(t))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
			want := &wire.Request{Method: "org.bpfbroker.Broker." + test.method, Parameters: json.RawMessage(test.request)}
			if diff := cmp.Diff([]*wire.Request{want}, f.seen()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAcquireToken(t *testing.T) {
	t.Parallel()
	directory, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = directory.Close() }) // after the fake's end
	f := newFake(t, nil)
	c := f.client(t)
	for _, test := range []struct {
		name, reply string
		files       []*os.File
		ok          bool
	}{
		{"one", `{"grant":` + grantJSON + `,"mountFileDescriptor":0}`, []*os.File{directory}, true},
		{"no file", `{"grant":` + grantJSON + `,"mountFileDescriptor":0}`, nil, false},
		{"no index", `{"grant":` + grantJSON + `}`, []*os.File{directory}, false},
		{"another index", `{"grant":` + grantJSON + `,"mountFileDescriptor":1}`, []*os.File{directory}, false},
		{"negative index", `{"grant":` + grantJSON + `,"mountFileDescriptor":-1}`, []*os.File{directory}, false},
		{"no grant", `{"mountFileDescriptor":0}`, []*os.File{directory}, false},
		{"wrong type", `{"grant":[],"mountFileDescriptor":0}`, []*os.File{directory}, false},
		{"two files", `{"grant":` + grantJSON + `,"mountFileDescriptor":0}`, []*os.File{directory, directory}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			f.setAnswer(func(*wire.Request, []*os.File) (any, []*os.File) {
				return wire.Reply{Parameters: json.RawMessage(test.reply)}, test.files
			})
			grant, mount, err := c.AcquireToken(t.Context(), "network")
			if (err == nil) != test.ok {
				t.Fatalf("got error %v", err)
			}
			if !test.ok {
				return
			}
			defer mount.Close()
			want, _ := directory.Stat()
			if got, err := mount.Stat(); err != nil || !os.SameFile(want, got) {
				t.Errorf("got another file, error %v", err)
			}
			if diff := cmp.Diff(&wantGrant, grant); diff != "" {
				t.Error(diff)
			}
		})
	}
	// What is no BPF file system gives no token, and is closed.
	f.setAnswer(func(*wire.Request, []*os.File) (any, []*os.File) {
		return wire.Reply{Parameters: json.RawMessage(`{"grant":` + grantJSON + `,"mountFileDescriptor":0}`)}, []*os.File{directory}
	})
	if _, _, err := c.Token(t.Context(), "network"); err == nil {
		t.Error("got a token from a directory")
	}
}

// TestFilesClosed is not parallel: it counts.
func TestFilesClosed(t *testing.T) {
	f := newFake(t, func(*wire.Request, []*os.File) (any, []*os.File) {
		return wire.Reply{Parameters: json.RawMessage(`{"mountFileDescriptor":0}`)}, []*os.File{os.Stderr}
	})
	c := New(WithSocket(f.socket))
	_, _, _ = c.AcquireToken(t.Context(), "network") // brings up the runtime's own
	_ = c.Close()
	f.hangUp()
	before := openFiles(t)
	for range 20 {
		if _, _, err := c.AcquireToken(t.Context(), "network"); !errors.Is(err, errBadReply) {
			t.Fatalf("got %v", err)
		}
		if _, err := c.MountToken(t.Context(), "network", os.Stderr, "/"); err == nil {
			t.Fatal("got a grant")
		}
		_ = c.Close()
		f.hangUp()
	}
	if after := openFiles(t); after > before {
		t.Errorf("had %d file descriptors, have %d", before, after)
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		answer answer
		want   *Error
	}{
		{"own", refusal("org.bpfbroker.Broker.NoSuchProfile", `{"reason":"cannot offer x","layer":"profile","remedy":"m"}`),
			&Error{Name: "NoSuchProfile", Reason: "cannot offer x", Layer: "profile", Remedy: "m"}},
		{"without remedy", refusal("org.bpfbroker.Broker.Canceled", `{"reason":"r","layer":"request"}`),
			&Error{Name: "Canceled", Reason: "r", Layer: "request"}},
		{"foreign", refusal("org.varlink.service.MethodNotFound", `{"method":"m"}`),
			&Error{Name: "org.varlink.service.MethodNotFound", Reason: `the broker answers org.varlink.service.MethodNotFound {"method":"m"}`, Layer: "request"}},
		{"wrong type", refusal("org.bpfbroker.Broker.Busy", `{"reason":1}`),
			&Error{Name: "Busy", Reason: `the broker answers org.bpfbroker.Broker.Busy {"reason":1}`, Layer: "request"}},
		{"without parameters", refusal("org.bpfbroker.Broker.Busy", ``),
			&Error{Name: "Busy", Reason: `the broker answers org.bpfbroker.Broker.Busy `, Layer: "request"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newFake(t, test.answer).client(t)
			_, err := c.DescribeProfile(t.Context(), "x")
			var got *Error
			if !errors.As(err, &got) {
				t.Fatalf("got %v", err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestBadReplies(t *testing.T) {
	t.Parallel()
	for name, reply := range map[string]any{
		"list":       []int{},
		"unknown":    map[string]any{"parameters": map[string]any{}, "what": 1},
		"no object":  map[string]any{"parameters": []int{1}},
		"wrong type": map[string]any{"parameters": map[string]any{"profile": 1}},
		"nothing":    map[string]any{},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newFake(t, func(*wire.Request, []*os.File) (any, []*os.File) { return reply, nil }).client(t)
			if p, err := c.DescribeProfile(t.Context(), "x"); !errors.Is(err, errBadReply) {
				t.Errorf("got %v, error %v", p, err)
			}
		})
	}
}

func TestInteraction(t *testing.T) {
	t.Parallel()
	f := newFake(t, parameters(`{"grants":[]}`))
	if _, err := f.client(t, WithInteraction()).ListGrants(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if got := string(f.seen()[0].Parameters); got != `{"all":true,"allowInteractiveAuthentication":true}` {
		t.Errorf("the parameters are %s", got)
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	c := New(WithSocket(filepath.Join(t.TempDir(), "s")))
	if _, err := c.ListGrants(t.Context(), true); !errors.Is(err, ErrUnreachable) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestIdle has the broker hang up between two calls.
func TestIdle(t *testing.T) {
	t.Parallel()
	f := newFake(t, parameters(`{"grants":[]}`))
	c := f.client(t)
	for range 3 {
		if _, err := c.ListGrants(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		f.hangUp()
	}
	if len(f.seen()) != 3 {
		t.Errorf("made %d requests, want 3", len(f.seen()))
	}
}

// TestHangsUp has the broker end within a request, which must not be made a
// second time.
func TestHangsUp(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(*wire.Request, []*os.File) (any, []*os.File) { return nil, nil })
	c := f.client(t)
	if _, err := c.MountToken(t.Context(), "x", os.Stderr, "/"); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
	if len(f.seen()) != 1 {
		t.Errorf("made %d requests, want 1", len(f.seen()))
	}
}

// TestTurnedAway has the broker say no and close before it reads anything.
func TestTurnedAway(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			c := wire.NewConn(conn, wire.Limits{Bytes: 1 << 10})
			_ = c.WriteMessage(wire.Reply{Error: brokerInterface + "TooManyConnections", Parameters: json.RawMessage(`{"reason":"r","layer":"limit","remedy":""}`)})
			_ = c.Close()
		}
	}()
	c := New(WithSocket(socket))
	defer c.Close()
	for range 50 {
		_, err := c.ListGrants(t.Context(), true)
		var refusal *Error
		if !errors.As(err, &refusal) || refusal.Name != "TooManyConnections" {
			t.Fatalf("got %v", err)
		}
	}
}

// TestCancel ends a call's context while the broker is silent, and then goes on
// with the same client.
func TestCancel(t *testing.T) {
	t.Parallel()
	silent := make(chan struct{})
	f := newFake(t, func(*wire.Request, []*os.File) (any, []*os.File) { <-silent; return nil, nil })
	c := f.client(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the user left")
	time.AfterFunc(50*time.Millisecond, func() { cancel(reason) })
	waiting := make(chan error)
	go func() { // waits its turn
		time.Sleep(10 * time.Millisecond)
		_, err := c.ListGrants(ctx, false)
		waiting <- err
	}()
	_, err := c.MountToken(ctx, "x", os.Stderr, "/")
	if !errors.Is(err, reason) {
		t.Errorf("got %v", err)
	}
	if err := <-waiting; !errors.Is(err, reason) {
		t.Errorf("got %v for the call that waited", err)
	}
	f.setAnswer(parameters(`{"grants":[]}`))
	close(silent)
	if _, err := c.ListGrants(t.Context(), true); err != nil {
		t.Error(err)
	}
}

func TestLongReply(t *testing.T) {
	t.Parallel()
	grants := strings.Repeat(grantJSON+",", 5000) + grantJSON
	c := newFake(t, parameters(`{"grants":[`+grants+`]}`)).client(t)
	got, err := c.ListGrants(t.Context(), true)
	if err != nil || len(got) != 5001 {
		t.Errorf("got %d grants, error %v", len(got), err)
	}
}

func TestCheckLocal(t *testing.T) {
	t.Parallel()
	var got []string
	for _, f := range CheckLocal() {
		got = append(got, f.Subject+" "+string(f.State))
		if (f.State == No) != (f.Remedy != "") {
			t.Errorf("%s is %s with the remedy %q", f.Subject, f.State, f.Remedy)
		}
	}
	if diff := cmp.Diff([]string{"user namespaces yes", "mount point yes"}, got); diff != "" {
		t.Error(diff)
	}
}

// What comes instead of a map or a program is closed, whatever it is.
func TestOpenObjects(t *testing.T) {
	directory, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = directory.Close() }) // after the fake's end
	f := newFake(t, nil)
	c := f.client(t)
	memory, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = memory.Close() })
	if err := memory.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	open := 0 // once there is a connection
	for _, test := range []struct {
		reply string
		files []*os.File
	}{
		{`{"mapFileDescriptor":0,"programFileDescriptor":0,"access":"read-only","warnings":[]}`, []*os.File{directory}},
		{`{"mapFileDescriptor":0,"programFileDescriptor":0,"access":"read-only","warnings":[]}`, nil},
		{`{"mapFileDescriptor":1,"programFileDescriptor":1,"access":"read-only","warnings":[]}`, []*os.File{directory}},
		{`{"access":"read-only","warnings":[]}`, []*os.File{directory}},
		{`{"mapFileDescriptor":0,"access":"read-write","warnings":[]}`, []*os.File{directory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":2,"frameSize":2048}`, []*os.File{directory, memory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":1024,"frameSize":2048}`, []*os.File{directory, memory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":3,"frameSize":2048}`, []*os.File{directory, memory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":-2,"frameSize":-2048}`, []*os.File{directory, memory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":4611686018427387904,"frameSize":4}`, []*os.File{directory, memory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":1,"frameSize":4096}`, []*os.File{memory, directory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":0,"interface":"lo","frames":2,"frameSize":2048}`, []*os.File{directory, memory}},
		{`{"socketFileDescriptor":0,"memoryFileDescriptor":1,"interface":"lo","frames":2,"frameSize":2048}`, []*os.File{memory}},
	} {
		f.setAnswer(func(*wire.Request, []*os.File) (any, []*os.File) {
			return wire.Reply{Parameters: json.RawMessage(test.reply)}, test.files
		})
		if m, _, err := c.OpenMap(t.Context(), "o", "m", ReadOnly); err == nil {
			_ = m.Close()
			t.Errorf("%s: got a map", test.reply)
		}
		if p, err := c.OpenProgram(t.Context(), "o", "p"); err == nil {
			_ = p.Close()
			t.Errorf("%s: got a program", test.reply)
		}
		if s, err := c.OpenSocket(t.Context(), "o", "m", 0); err == nil {
			_ = s.Close()
			t.Errorf("%s: got a socket", test.reply)
		}
		if open == 0 {
			open = openFiles(t)
		}
	}
	eventually(t, "the file descriptors to be closed", func() bool { return openFiles(t) <= open })
}
