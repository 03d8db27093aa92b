// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

// The tests count the process's file descriptors, so they don't run in parallel.

func TestMain(m *testing.M) {
	r, w, _ := os.Pipe() // starts the runtime's poller, whose descriptors stay
	_, _ = r.Close(), w.Close()
	os.Exit(m.Run())
}

// fixture is a connection to a bus that is the test.
type fixture struct {
	t testing.TB
	*Conn
	bus     *net.UnixConn
	calls   chan *Message
	signals chan *Message
	ended   chan error
}

func (f *fixture) Call(m *Message)   { f.calls <- m }
func (f *fixture) Signal(m *Message) { f.signals <- m }

func newFixture(t testing.TB) *fixture {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ends := [2]*net.UnixConn{}
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socket")
		end, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		_ = file.Close()
		ends[i] = end.(*net.UnixConn)
	}
	f := &fixture{t, newConn(ends[0]), ends[1], make(chan *Message, 20_000), make(chan *Message, 20_000), make(chan error, 1)}
	go func() { f.ended <- f.Serve(f) }()
	t.Cleanup(func() {
		f.Close()
		_ = f.bus.Close()
	})
	return f
}

// message makes one with a sender.
func message(kind dbus.Type, sender string, fields map[dbus.HeaderField]any, body ...any) *dbus.Message {
	all := map[dbus.HeaderField]any{
		dbus.FieldSender:    sender,
		dbus.FieldPath:      dbus.ObjectPath("/x"),
		dbus.FieldInterface: "x.y",
		dbus.FieldMember:    "Z",
	}
	for field, value := range fields {
		all[field] = value
	}
	return newMessage(kind, body, all)
}

// put sends a message as the bus, with fds that it needn't name.
func (f *fixture) put(m *dbus.Message, fds ...int) {
	f.t.Helper()
	data, _, err := encode(m)
	if err != nil {
		f.t.Fatal(err)
	}
	f.putBytes(data, fds...)
}

func (f *fixture) putBytes(data []byte, fds ...int) {
	f.t.Helper()
	binary.LittleEndian.PutUint32(data[8:], 7)
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	n, _, err := f.bus.WriteMsgUnix(data, rights, nil)
	if err == nil && n < len(data) {
		_, err = f.bus.Write(data[n:])
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	return len(links)
}

// Nothing that comes with fds keeps one, with no policy in between.
func TestHostileFiles(t *testing.T) {
	f := newFixture(t)
	before := openFiles(t)
	many := make([]int, 200)
	for i := range many {
		many[i] = 2
	}
	kinds := []*dbus.Message{
		message(dbus.TypeMethodCall, ":1.1", nil),
		message(dbus.TypeMethodCall, ":1.1", map[dbus.HeaderField]any{dbus.FieldUnixFDs: uint32(4)}, "x"),
		message(dbus.TypeSignal, ":1.1", map[dbus.HeaderField]any{dbus.FieldUnixFDs: uint32(4)}),
		message(dbus.TypeSignal, busName, nil),
		message(dbus.TypeMethodReply, busName, map[dbus.HeaderField]any{dbus.FieldReplySerial: uint32(99)}),
		message(dbus.TypeError, ":1.1", map[dbus.HeaderField]any{dbus.FieldReplySerial: uint32(1), dbus.FieldErrorName: "x.y"}),
		message(dbus.TypeMethodCall, ":1.1", nil, strings.Repeat("x", 100_000)),
	}
	for i := range 10_000 {
		f.put(kinds[i%len(kinds)], many[:1+i%len(many)]...)
	}
	f.put(message(dbus.TypeSignal, busName, map[dbus.HeaderField]any{dbus.FieldMember: "Last"}))
	for m := range f.signals {
		if m.Member == "Last" {
			break
		}
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

func TestAnswerWithFile(t *testing.T) {
	f := newFixture(t)
	before := openFiles(t)
	for i := range 1000 {
		var answered sync.WaitGroup
		answered.Go(func() {
			// The call, of which only the serial matters; it is written in one go.
			data := make([]byte, 4096)
			if _, err := f.bus.Read(data); err != nil {
				t.Error(err)
			}
			serial := binary.LittleEndian.Uint32(data[8:])
			fields := map[dbus.HeaderField]any{dbus.FieldReplySerial: serial}
			if i%2 == 0 {
				// Somebody else's fds, before and after.
				f.put(message(dbus.TypeSignal, ":1.1", nil), 2, 2)
			}
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Error(err)
			}
			f.put(message(dbus.TypeMethodReply, busName, fields, map[string]dbus.Variant{"x": dbus.MakeVariant(uint32(1))}), int(null.Fd()))
			f.put(message(dbus.TypeSignal, ":1.1", nil), 2, 2)
			_ = null.Close()
		})
		m, file, err := f.CallForFile("X", "y")
		answered.Wait()
		if err != nil {
			t.Fatal(err)
		}
		var body map[string]dbus.Variant
		if err := m.Decode(&body); err != nil || body["x"].Value() != uint32(1) {
			t.Errorf("got %v, %v", body, err)
		}
		if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", file.Fd())); err != nil || link != os.DevNull {
			t.Errorf("the file is %s, %v", link, err)
		}
		_ = file.Close()
	}
	f.put(message(dbus.TypeSignal, busName, nil))
	<-f.signals
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

// Large messages are thrown away without being held.
func TestSize(t *testing.T) {
	f := newFixture(t)
	large, _, err := encode(message(dbus.TypeMethodCall, ":1.1", nil, strings.Repeat("x", 30<<20)))
	if err != nil {
		t.Fatal(err)
	}
	path, _, err := encode(message(dbus.TypeMethodCall, ":1.1", map[dbus.HeaderField]any{dbus.FieldPath: dbus.ObjectPath("/" + strings.Repeat("x", 10<<20))}))
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 5 {
		f.putBytes(large)
		f.putBytes(path)
	}
	for range 5 {
		if m := <-f.calls; !m.TooLarge || m.Sender != ":1.1" || m.Path != "/x" {
			t.Errorf("got %+v", m)
		}
		if m := <-f.calls; m.TooLarge || m.Sender != ":1.1" || m.Path != "" || m.Member != "Z" {
			t.Errorf("got %+v", m)
		}
	}
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 1<<20 {
		t.Errorf("%d bytes allocated for 200 MiB", allocated)
	}
}

func TestCalls(t *testing.T) {
	f := newFixture(t)
	f.put(message(dbus.TypeMethodCall, ":1.1", nil, "a", uint32(5), map[string]dbus.Variant{"k": dbus.MakeVariant("v")}))
	m := <-f.calls
	got := []any{m.Path, m.Interface, m.Member, m.Sender, m.Signature, m.serial}
	if diff := cmp.Diff([]any{"/x", "x.y", "Z", ":1.1", "sua{sv}", uint32(7)}, got); diff != "" {
		t.Error(diff)
	}
	var s string
	var u uint32
	var options map[string]dbus.Variant
	if err := m.Decode(&s, &u, &options); err != nil || s != "a" || u != 5 || options["k"].Value() != "v" {
		t.Errorf("got %q %d %v, %v", s, u, options, err)
	}
	if err := m.Decode(&u); err == nil {
		t.Error("decoded into what isn't there")
	}
}

// A header field of a kind that nobody knows is no reason to hang up.
func TestUnreadableFields(t *testing.T) {
	f := newFixture(t)
	data, _, err := encode(message(dbus.TypeMethodCall, ":1.1", nil, "a"))
	if err != nil {
		t.Fatal(err)
	}
	data[bytes.Index(data, []byte("\x01o\x00"))+1] = 'y'
	f.putBytes(data)
	f.put(message(dbus.TypeMethodCall, ":1.2", nil))
	if m := <-f.calls; m.Sender != ":1.2" {
		t.Errorf("got %+v", m)
	}
}

func TestStrangersAreNotTheBus(t *testing.T) {
	f := newFixture(t)
	answered := make(chan *Message, 1)
	if err := f.Start("X", func(m *Message) { answered <- m }); err != nil {
		t.Fatal(err)
	}
	f.put(message(dbus.TypeMethodReply, ":1.1", map[dbus.HeaderField]any{dbus.FieldReplySerial: uint32(1)}, "no"))
	f.put(message(dbus.TypeSignal, ":1.1", nil, "no"))
	f.put(message(dbus.TypeMethodReply, busName, map[dbus.HeaderField]any{dbus.FieldReplySerial: uint32(1)}, "yes"))
	var text string
	if err := (<-answered).Decode(&text); err != nil || text != "yes" {
		t.Errorf("got %q, %v", text, err)
	}
	if len(f.signals) != 0 {
		t.Error("a stranger's signal came through")
	}
}

func TestConnectionEnds(t *testing.T) {
	f := newFixture(t)
	failed := make(chan error, 1)
	go func() {
		_, err := f.Conn.Call("X")
		failed <- err
	}()
	if _, err := f.bus.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	_ = f.bus.Close()
	for _, errs := range []chan error{failed, f.ended} {
		select {
		case err := <-errs:
			if !errors.Is(err, ErrDisconnected) {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the connection goes on")
		}
	}
	if _, err := f.Conn.Call("X"); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}
}

func TestSocketName(t *testing.T) {
	tests := []struct{ address, name string }{
		{"unix:path=/run/dbus/system_bus_socket", "/run/dbus/system_bus_socket"},
		{"unix:guid=0123,path=/a%20b", "/a b"},
		{"unix:abstract=x,guid=0123", "@x"},
		{"unix:path=/a%2", ""},
		{"unix:tmpdir=/tmp", ""},
		{"tcp:host=localhost", ""},
		{"", ""},
	}
	for _, test := range tests {
		name, err := socketName(test.address)
		if name != test.name || (err == nil) != (test.name != "") {
			t.Errorf("socketName(%q) = %q, %v; want %q", test.address, name, err, test.name)
		}
	}
}

// FuzzMessage reads anything: it must neither panic nor take more than there is,
// and what godbus makes of it must be the same.
func FuzzMessage(f *testing.F) {
	for _, body := range [][]any{nil, {"a", map[string]dbus.Variant{}}, {uint32(1), "x"}} {
		data, _, err := encode(message(dbus.TypeMethodCall, ":1.1", nil, body...))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		for range 10 {
			broken := bytes.Clone(data)
			broken[rand.IntN(len(broken))]++
			f.Add(broken)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < headLen {
			return
		}
		h, err := parseHead(data)
		if err != nil {
			return
		}
		r := bytes.NewReader(data[headLen:])
		if err := h.readRest(bufio.NewReader(r)); err != nil || h.TooLarge {
			return
		}
		var a, b any
		ours := h.Decode(&a, &b)
		theirs, err := dbus.DecodeMessage(bytes.NewReader(data))
		if err != nil {
			return
		}
		sender, _ := theirs.Headers[dbus.FieldSender].Value().(string)
		path, _ := theirs.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
		if len(sender) < maxText && h.Sender != sender || len(path) < maxText && h.Path != string(path) {
			t.Errorf("sender %q and path %q, for godbus %q and %q", h.Sender, h.Path, sender, path)
		}
		if ours == nil && len(theirs.Body) != 2 {
			t.Errorf("%d arguments for godbus", len(theirs.Body))
		}
	})
}

// Others than the bus answer only what they were asked; and the files in a call
// are counted wherever they are.
func TestAsk(t *testing.T) {
	f := newFixture(t)
	before := openFiles(t)
	answered := make(chan *Message, 2)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	args := []any{map[string]dbus.Variant{"a": dbus.MakeVariant(dbus.UnixFD(null.Fd()))}, dbus.UnixFD(null.Fd())}
	if err := f.Ask(Method{"x.y", "/x", "x.y", "Z"}, func(m *Message) { answered <- m }, args...); err != nil {
		t.Fatal(err)
	}
	_ = null.Close()
	data, control := make([]byte, 4096), make([]byte, 4096)
	n, controlLen, _, _, err := f.bus.ReadMsgUnix(data, control)
	if err != nil {
		t.Fatal(err)
	}
	call, err := dbus.DecodeMessage(bytes.NewReader(data[:n]))
	if err != nil || call.Headers[dbus.FieldUnixFDs].Value() != uint32(2) {
		t.Errorf("got %v, %v", call, err)
	}
	messages, err := syscall.ParseSocketControlMessage(control[:controlLen])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 2 {
		t.Errorf("got %v, %v", fds, err)
	}
	for _, fd := range fds {
		_ = syscall.Close(fd)
	}
	to := func(serial uint32) map[dbus.HeaderField]any {
		return map[dbus.HeaderField]any{dbus.FieldReplySerial: serial}
	}
	f.put(message(dbus.TypeMethodReply, ":1.1", to(7), "another's"), 2)
	f.put(message(dbus.TypeMethodReply, ":1.1", to(1), "yes"), 2, 2)
	f.put(message(dbus.TypeMethodReply, ":1.1", to(1), "again"), 2)
	var text string
	if err := (<-answered).Decode(&text); err != nil || text != "yes" {
		t.Errorf("got %q, %v", text, err)
	}
	if err := f.Ask(Method{"x.y", "/x", "x.y", "Z"}, func(m *Message) { answered <- m }); err != nil {
		t.Fatal(err)
	}
	fields := to(2)
	fields[dbus.FieldErrorName] = "x.Wrong"
	f.put(message(dbus.TypeError, ":1.1", fields, "why"), 2)
	if err := (<-answered).Err(); err == nil || err.Error() != `x.Wrong: "why"` {
		t.Errorf("got %v", err)
	}
	f.put(message(dbus.TypeSignal, busName, nil))
	<-f.signals
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
	if err := f.Ask(Method{"x.y", "/x", "x.y", "Z"}, func(*Message) {}, dbus.UnixFD(-1)); !errors.Is(err, syscall.EBADF) {
		t.Errorf("a bad fd: got %v", err)
	}
}

func TestParseHead(t *testing.T) {
	for _, test := range []struct {
		head string
		size int
		ok   bool
	}{
		{"l\x02\x00\x01\x04\x00\x00\x00\x01\x00\x00\x00\x09\x00\x00\x00", 16 + 16 + 4, true},
		{"B\x02\x00\x01\x00\x00\x00\x04\x00\x00\x00\x01\x00\x00\x00\x08", 16 + 8 + 4, true},
		{"l\x02\x00\x01\xff\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff", 0, false},
		{"x\x02\x00\x01\x04\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00", 0, false},
	} {
		h, err := parseHead([]byte(test.head))
		if (err == nil) != test.ok || err == nil && h.Size != test.size {
			t.Errorf("parseHead(%q) = %+v, %v; want %d", test.head, h, err, test.size)
		}
	}
}
