// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// socketVariable tells bpfbroker, where the test binary is it, which socket to
// use.
const socketVariable = "BPFBROKER_TEST_SOCKET"

// programs are what the test binary is under other names.
var programs = map[string]func(){
	"bpfbroker":    func() { os.Exit(execute(os.Getenv(socketVariable))) },
	"tell-signals": tellSignals,
}

func TestMain(m *testing.M) { testscript.Main(attentive{m}, programs) }

// attentive runs the tests where nothing is ignored that somebody, as nohup does,
// made them ignore: a program that is executed would ignore it too.
type attentive struct{ *testing.M }

func (a attentive) Run() int {
	for _, s := range signals {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	return a.M.Run()
}

// tellSignals writes the name of each signal that comes, until none has come
// for a while. Its first line is "ready".
func tellSignals() {
	received := make(chan os.Signal, 100)
	signal.Notify(received, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
	fmt.Println("ready")
	for {
		select {
		case s := <-received:
			fmt.Println("signal", s)
		case <-time.After(500 * time.Millisecond):
			fmt.Println("end")
			os.Exit(7)
		}
	}
}

// request is what the fake broker sees of a request.
type request struct {
	Method     string         `json:"method"`
	Parameters map[string]any `json:"parameters"`

	interactive bool
	files       int
}

// refusal is the fake broker's way to answer with an error.
type refusal struct{ name, reason, layer, remedy string }

// withFile is the fake broker's way to answer with a file descriptor as well.
type withFile struct {
	reply any
	fd    int
}

// stream is the fake broker's way to give several answers.
type stream []any

// fake is a broker for tests. A nil answer makes it hang up.
type fake struct {
	socket      string
	connections atomic.Int64 // open ones
	mu          sync.Mutex
	requests    []request
}

func newFake(t testing.TB, answer func(request) any) *fake {
	t.Helper()
	f := &fake{socket: filepath.Join(openDirectory(t), "s")}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: f.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if err := os.Chmod(f.socket, 0o777); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			f.connections.Add(1)
			go func() {
				defer f.connections.Add(-1)
				defer conn.Close()
				f.serve(conn, answer)
			}()
		}
	}()
	return f
}

func (f *fake) serve(conn *net.UnixConn, answer func(request) any) {
	r := &filesReader{conn: conn}
	in := bufio.NewReader(r)
	for {
		data, err := in.ReadBytes(0)
		if err != nil {
			return
		}
		var q request
		if err := json.Unmarshal(data[:len(data)-1], &q); err != nil {
			panic(err)
		}
		q.interactive, _ = q.Parameters["allowInteractiveAuthentication"].(bool)
		q.files, r.files = r.files, 0
		f.mu.Lock()
		f.requests = append(f.requests, q)
		f.mu.Unlock()
		var reply any
		var rights []byte
		switch a := answer(q).(type) {
		case nil:
			return
		case stream:
			for _, parameters := range a[:len(a)-1] {
				data, err := json.Marshal(map[string]any{"parameters": parameters, "continues": true})
				if err != nil {
					panic(err)
				}
				if _, err := conn.Write(append(data, 0)); err != nil {
					return
				}
			}
			reply = map[string]any{"parameters": a[len(a)-1]}
		case refusal:
			reply = map[string]any{
				"error":      "org.bpfbroker.Broker." + a.name,
				"parameters": map[string]string{"reason": a.reason, "layer": a.layer, "remedy": a.remedy},
			}
		case withFile:
			reply, rights = map[string]any{"parameters": a.reply}, syscall.UnixRights(a.fd)
		default:
			reply = map[string]any{"parameters": a}
		}
		data, err = json.Marshal(reply)
		if err != nil {
			panic(err)
		}
		if _, _, err := conn.WriteMsgUnix(append(data, 0), rights, nil); err != nil {
			return
		}
	}
}

func (f *fake) seen() []request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests
}

// filesReader counts the file descriptors that come in, and closes them.
type filesReader struct {
	conn  *net.UnixConn
	files int
}

func (r *filesReader) Read(p []byte) (int, error) {
	control := make([]byte, 256)
	n, controlled, _, _, err := r.conn.ReadMsgUnix(p, control)
	messages, _ := syscall.ParseSocketControlMessage(control[:controlled])
	for _, m := range messages {
		fds, _ := syscall.ParseUnixRights(&m)
		for _, fd := range fds {
			r.files++
			_ = syscall.Close(fd)
		}
	}
	return n, err
}

// grant is what the fake grants.
func grant(capabilities ...string) map[string]any {
	return map[string]any{
		"id": "0123456789abcdef", "profile": "network", "tier": "network", "owner": 0, "unit": "session-1.scope", "process": 4711,
		"path": "/sys/fs/bpf", "created": 1700000000000000, "capabilities": append([]string{}, capabilities...), "notEnforced": []string{},
	}
}

// answers is what the scripts' broker says.
func answers(r request) any {
	name, _ := r.Parameters["profile"].(string)
	switch strings.TrimPrefix(r.Method, "org.bpfbroker.Broker.") {
	case "ListProfiles":
		return map[string]any{"profiles": []any{
			map[string]any{"name": "basic", "description": "Maps & sockets", "tier": "basic", "available": true},
			map[string]any{"name": "network", "description": "Packets\x1b[2J", "tier": "unlimited", "available": false, "reason": "no guard"},
		}}
	case "DescribeProfile":
		if name != "network" {
			return refusal{"NoSuchProfile", "cannot describe \"" + name + "\": no such profile", "profile", "see \"bpfbroker profiles\""}
		}
		return map[string]any{"profile": map[string]any{
			"name": "network", "description": "Packets", "tier": "unlimited", "guard": "required", "available": false,
			"reason": "no guard", "remedy": "accept that", "leaseSeconds": 28800,
			"commands": []string{"map_create", "prog_load", "btf_load"},
			"maps":     []string{"hash", "array", "percpu_hash", "percpu_array", "lru_hash", "lpm_trie", "array_of_maps", "hash_of_maps", "devmap", "ringbuf"},
			"programs": []string{"xdp"}, "attachments": []string{}, "capabilities": []string{"CAP_BPF", "CAP_NET_ADMIN"},
			"limits": []string{"[Guard] MaxMaps=256", "[Attach] Interfaces=own"}, "notEnforced": []string{"Lease="}, "files": []string{"/usr/lib/a", "/etc/b"},
		}}
	case "ListGrants":
		second := grant()
		second["id"], second["process"], second["expires"] = "fedcba9876543210", 12, time.Now().Add(8*time.Hour+30*time.Second).UnixMicro()
		delete(second, "unit")
		delete(second, "path")
		return map[string]any{"grants": []any{grant("CAP_BPF"), second}}
	case "RenewGrant":
		if r.Parameters["grant"] != "0123456789abcdef" {
			return refusal{"GrantNarrowed", "cannot renew it: it has more than network gives now", "profile", "ask for a new grant"}
		}
		if !r.interactive {
			return refusal{"InteractionRequired", "cannot grant network: polkit wants authentication", "polkit", "allow it"}
		}
		return map[string]any{"grant": grant("CAP_BPF")}
	case "RevokeGrant":
		if r.Parameters["grant"] != "0123456789abcdef" {
			return refusal{"NoSuchGrant", "cannot revoke it: no such grant", "request", "see \"bpfbroker list\""}
		}
		if r.Parameters["kill"] == true {
			return map[string]any{"notReached": []string{"1 process that did not end"}}
		}
		return map[string]any{"notReached": []string{"tokens that were already created"}}
	case "ExplainGrant":
		switch r.Parameters["grant"] {
		case nil:
			return map[string]any{"denials": []any{}, "withheld": []any{}}
		case "0123456789abcdef":
		default:
			return refusal{"NoSuchGrant", "cannot explain it: no such grant", "request", "see \"bpfbroker list\""}
		}
		return map[string]any{"profile": "network", "ended": true, "denials": []any{
			map[string]any{"event": map[string]any{"time": 1700000000000000, "kind": "denied", "owner": 0, "grant": "0123456789abcdef", "process": 7,
				"command": "evil\x1b[2J", "program": "xdp \"p\\x1b\", 3 instructions", "reason": "the helper send_signal", "layer": "guard"},
				"allow": "[Guard] Helpers= without ~send_signal", "count": 3},
		}, "withheld": []any{map[string]any{"layer": "token mask", "setting": "[Delegate] Programs=", "names": []string{"kprobe", "tracing"}}}}
	case "Monitor":
		if r.Parameters["all"] == true && !r.interactive {
			return refusal{"InteractionRequired", "cannot monitor the grants of all users: polkit wants authentication", "polkit", "allow it"}
		}
		event := func(kind string, more map[string]any) map[string]any {
			e := map[string]any{"time": 1700000000000000, "kind": kind, "owner": 1000, "grant": "0123456789abcdef"}
			maps.Copy(e, more)
			return map[string]any{"event": e}
		}
		return stream{
			map[string]any{},
			event("made", map[string]any{"profile": "network", "process": 7, "expires": 1700000001000000}),
			event("loaded", map[string]any{"process": 8, "uid": 1000, "command": "a\x1b[2J\nb", "program": "xdp \"p\", 3 instructions", "tag": "00ff"}),
			event("denied", map[string]any{"process": 8, "uid": 1000, "command": "c", "program": "xdp \"p\", 3 instructions", "reason": "the helper x", "layer": "guard", "setting": "[Guard] Helpers="}),
			map[string]any{"event": map[string]any{"time": 1700000000000000, "kind": "refused", "owner": 1000, "profile": "network", "reason": "not authorized", "layer": "polkit"}},
			map[string]any{"event": map[string]any{"time": 1700000000000000, "kind": "lost", "owner": 1000, "lost": 9, "reason": "too many"}},
			event("ended", map[string]any{"profile": "network", "reason": "exited"}),
			event("new", map[string]any{"reason": "from the future"}),
			map[string]any{},
		}
	case "LearnGrant":
		return stream{map[string]any{}, map[string]any{"profile": "# Learnt.\n[Delegate]\n"}}
	case "Check":
		return map[string]any{"findings": []any{
			map[string]any{"subject": "guard", "state": "no", "reason": "there is none", "remedy": "wait for it"},
			map[string]any{"subject": "profile basic", "state": "yes", "reason": "polkit allows it"},
			map[string]any{"subject": "profile network", "state": "ask", "reason": "polkit wants a password"},
		}}
	case "ListObjects":
		return map[string]any{"objects": []any{
			map[string]any{"name": "flows", "description": "Who with whom", "state": "loaded", "available": true},
			map[string]any{"name": "broken", "description": "", "state": "failed", "available": false, "reason": "no such file"},
		}}
	case "DescribeObject":
		if r.Parameters["object"] != "flows" {
			return refusal{"NoSuchObject", "cannot describe it: no such object", "request", "see \"bpfbroker objects\""}
		}
		return map[string]any{"object": map[string]any{
			"name": "flows", "description": "Who with whom", "state": "loaded", "available": false, "reason": "verifier:\nno", "remedy": "mend it", "load": "first-use", "keep": "5min",
			"maps": []any{
				map[string]any{"name": "table", "type": "hash", "access": []string{"read-only", "read-write"}, "keySize": 8, "valueSize": 8, "maxEntries": 100,
					"keyType": "struct flow {\n\tint port;\n}", "valueType": "counter"},
				map[string]any{"name": "events", "type": "ringbuf", "access": []string{"consume"}, "keySize": 0, "valueSize": 0, "maxEntries": 4096, "valueType": "struct event"},
			},
			"programs": []any{map[string]any{"name": "pass", "type": "xdp"}},
			"links": []any{
				map[string]any{"name": "trace", "program": "p", "type": "raw_tracepoint", "target": "sys_enter", "attached": true},
				map[string]any{"name": "pass", "program": "p", "type": "xdp", "target": "eth7", "attached": false},
			},
			"files": []string{"/usr/lib/a"},
		}}
	case "OpenMap":
		return refusal{"NotAuthorized", "cannot open the map: not authorized", "polkit", "ask the administrator for a polkit rule"}
	case "MountObjects":
		if r.Parameters["path"] != "/mnt" {
			return refusal{"PathNotFound", "cannot mount: no such directory", "target", ""}
		}
		return map[string]any{"pins": []string{"flows/table"}, "warnings": []string{"it can be pinned"}}
	case "MountToken":
		switch name {
		case "network":
			return map[string]any{"grant": grant("CAP_BPF", "CAP_NET_ADMIN")}
		case "unlimited":
			return map[string]any{"grant": grant("CAP_BPF")}
		case "dies":
			return nil
		case "busy":
			return refusal{"Busy", "cannot grant busy: the profile has changed meanwhile", "profile", "ask again"}
		}
		return refusal{"NotAuthorized", "cannot grant " + name + ": not authorized", "polkit", "ask the administrator for a polkit rule"}
	}
	return refusal{"Internal", r.Method, "request", ""}
}

// TestScripts runs testdata/*.txtar against that broker.
func TestScripts(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE") != "",
		Setup: func(env *testscript.Env) error {
			env.Setenv(socketVariable, f.socket)
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds:      map[string]func(*testscript.TestScript, bool, []string){"status": status},
		Condition: builtWith,
	})
}

// builtWith says whether the program was built with a tag.
func builtWith(tag string) (bool, error) {
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if s.Key == "-tags" {
			return slices.Contains(strings.Split(s.Value, ","), tag), nil
		}
	}
	return false, nil
}

// status is the script command "status N PROGRAM ARGUMENT…": PROGRAM exits with N.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N PROGRAM ARGUMENT…")
	}
	got := "0"
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("exit status %s, want %s", got, args[0])
	}
}
