// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"
)

func TestMain(m *testing.M) {
	if address := os.Getenv(benchMock); address != "" {
		serveMock(address)
	}
	// The runtime's poller opens fds of its own when it is first used.
	if listener, err := net.Listen("unix", ""); err == nil {
		_ = listener.Close()
	}
	if _, err := selfPidFD(); err != nil {
		panic(err)
	}
	before := fdNumbers()
	code := m.Run()
	if after := fdNumbers(); len(after) > len(before) {
		fmt.Fprintf(os.Stderr, "fds leaked: %v before the tests, %v after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

// fdNumbers gives the open fds of this process.
func fdNumbers() []int {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		panic(err)
	}
	var fds []int
	for _, name := range names {
		if fd, err := strconv.Atoi(name); err == nil && fd != int(dir.Fd()) {
			fds = append(fds, fd)
		}
	}
	return fds
}

func sameFile(a, b int) bool {
	var x, y syscall.Stat_t
	return syscall.Fstat(a, &x) == nil && syscall.Fstat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

// busConfig has the rules of dbus-daemon's system bus and of polkit's policy file,
// except that any user may be polkit.
const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:path=%s</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>
</busconfig>
`

// A testBus is a dbus-daemon of the test's own with the system bus's policy.
type testBus struct {
	tb      testing.TB
	config  string
	address string
	daemon  *exec.Cmd
}

func newBus(tb testing.TB) *testBus {
	tb.Helper()
	dir := tb.TempDir()
	socket := filepath.Join(dir, "bus")
	bus := &testBus{tb: tb, config: filepath.Join(dir, "bus.conf"), address: "unix:path=" + socket}
	if err := os.WriteFile(bus.config, fmt.Appendf(nil, busConfig, socket), 0o600); err != nil {
		tb.Fatal(err)
	}
	bus.start()
	tb.Cleanup(bus.stop)
	return bus
}

func (b *testBus) start() {
	b.tb.Helper()
	b.daemon = exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--nosyslog", "--print-address", "--config-file="+b.config)
	b.daemon.Stderr = b.tb.Output()
	stdout, err := b.daemon.StdoutPipe()
	if err != nil {
		b.tb.Fatal(err)
	}
	if err := b.daemon.Start(); err != nil {
		b.tb.Fatal(err)
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		b.tb.Fatalf("dbus-daemon didn't start: %v", err)
	}
}

func (b *testBus) stop() {
	if b.daemon == nil {
		return
	}
	if err := b.daemon.Process.Kill(); err != nil {
		b.tb.Error(err)
	}
	// It was killed, so the error says nothing.
	_ = b.daemon.Wait()
	b.daemon = nil
}

// connect gives a godbus connection to the bus.
func (b *testBus) connect() *dbus.Conn {
	b.tb.Helper()
	c, err := dbus.Connect(b.address)
	if err != nil {
		b.tb.Fatal(err)
	}
	b.tb.Cleanup(func() { _ = c.Close() })
	return c
}

// polkit gives a Polkit that uses the bus.
func (b *testBus) polkit() *Polkit {
	p := New()
	p.address = b.address
	b.tb.Cleanup(p.Close)
	return p
}

// hostileSignals sends n signals to a unique name, each with four fds that
// nothing in it refers to, and returns when the bus has passed them on.
func hostileSignals(t *testing.T, bus *testBus, name string, n int) {
	t.Helper()
	c := rawConn(t, bus)
	signal := signalTo(name)
	signal.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(4))
	for i := range n {
		if _, _, err := c.socket.WriteMsgUnix(wire(t, c, signal), syscall.UnixRights(2, 2, 2, 2), nil); err != nil {
			t.Fatal(err)
		}
		// The bus queues 64 fds for a receiver and drops what comes beyond that.
		if i%8 == 7 {
			roundTrip(t, c)
		}
	}
	roundTrip(t, c)
}

func signalTo(name string) *dbus.Message {
	return &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(name),
		dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath("/x")),
		dbus.FieldInterface:   dbus.MakeVariant("x.y"),
		dbus.FieldMember:      dbus.MakeVariant("Z"),
	}}
}

func rawConn(t *testing.T, bus *testBus) *conn {
	t.Helper()
	c, err := dial(t.Context(), bus.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

// wire gives a message as it is sent on c, with a serial.
func wire(t *testing.T, c *conn, message *dbus.Message) []byte {
	t.Helper()
	var buffer bytes.Buffer
	if err := message.EncodeTo(&buffer, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	binary.LittleEndian.PutUint32(buffer.Bytes()[8:], c.nextSerial())
	return buffer.Bytes()
}

// roundTrip returns when the bus has handled what c sent.
func roundTrip(t *testing.T, c *conn) {
	t.Helper()
	replies, err := c.call(methodCall("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId"))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := <-replies; !ok {
		t.Fatal("the bus hung up")
	}
}

// uniqueNames gives the unique names on the bus.
func uniqueNames(t *testing.T, c *dbus.Conn) []string {
	t.Helper()
	var names []string
	if err := c.BusObject().Call("org.freedesktop.DBus.ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(name, ":") })
}

// nameOfNext gives the unique name that appears on the bus during connect.
func nameOfNext(t *testing.T, bus *testBus, connect func()) string {
	t.Helper()
	observer := bus.connect()
	before := uniqueNames(t, observer)
	connect()
	for _, name := range uniqueNames(t, observer) {
		if !slices.Contains(before, name) {
			return name
		}
	}
	t.Fatal("no new name on the bus")
	return ""
}

// What strangers send with fds must not stay open: the kernel closes it.
func TestHostileFDs(t *testing.T) {
	bus := newBus(t)
	newMock(t, bus, says(true, false, nil))
	p := bus.polkit()
	name := nameOfNext(t, bus, func() { mustPass(t, p) })
	c := p.conn

	before := len(fdNumbers())
	hostileSignals(t, bus, name, 10_000)
	mustPass(t, p)
	if after := len(fdNumbers()) - 1; after != before { // one is the stranger's connection
		t.Errorf("%d fds before, %d after 10 000 signals with 4 fds each", before, after)
	}
	if p.conn != c {
		t.Error("the connection didn't survive")
	}
}

// This is why the package has a connection of its own. Should it fail with a
// later godbus, then perhaps godbus's will do.
func TestGodbusKeepsHostileFDs(t *testing.T) {
	bus := newBus(t)
	victim := bus.connect()
	before := fdNumbers()
	hostileSignals(t, bus, victim.Names()[0], 100)
	// Its own answer comes after the signals.
	if err := victim.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil {
		t.Fatal(err)
	}
	kept := 0
	for _, fd := range fdNumbers() {
		if !slices.Contains(before, fd) && sameFile(fd, 2) {
			kept++
			if err := syscall.Close(fd); err != nil {
				t.Error(err)
			}
		}
	}
	if kept != 400 {
		t.Errorf("godbus kept %d of 400 fds", kept)
	}
}

// A large signal is thrown away without being held or decoded.
func TestHostileSize(t *testing.T) {
	bus := newBus(t)
	newMock(t, bus, says(true, false, nil))
	p := bus.polkit()
	name := nameOfNext(t, bus, func() { mustPass(t, p) })
	stranger := rawConn(t, bus)
	signal := signalTo(name)
	signal.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(""))
	signal.Body = []any{strings.Repeat("x", 30<<20)}
	data := wire(t, stranger, signal)

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 10 {
		if _, err := stranger.socket.Write(data); err != nil {
			t.Fatal(err)
		}
		roundTrip(t, stranger)
	}
	mustPass(t, p)
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 1<<20 {
		t.Errorf("%d bytes allocated for signals of 300 MiB", allocated)
	}
}

// Strangers can't call methods of the connection, so it needs no handler.
func TestMethodCallsDontArrive(t *testing.T) {
	bus := newBus(t)
	newMock(t, bus, says(true, false, nil))
	p := bus.polkit()
	name := nameOfNext(t, bus, func() { mustPass(t, p) })
	err := bus.connect().Object(name, "/").Call("org.freedesktop.DBus.Peer.Ping", 0).Err
	if e, ok := err.(dbus.Error); !ok || e.Name != "org.freedesktop.DBus.Error.AccessDenied" {
		t.Errorf("calling a method gave %v, not AccessDenied", err)
	}
}

func TestSocketName(t *testing.T) {
	t.Parallel()
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

func TestMessageSize(t *testing.T) {
	t.Parallel()
	tests := []struct {
		head string
		size int
		ok   bool
	}{
		{"l\x02\x00\x01\x04\x00\x00\x00\x01\x00\x00\x00\x09\x00\x00\x00", 16 + 16 + 4, true},
		{"B\x02\x00\x01\x00\x00\x00\x04\x00\x00\x00\x01\x00\x00\x00\x08", 16 + 8 + 4, true},
		{"l\x02\x00\x01\xff\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff", 0, false},
		{"x\x02\x00\x01\x04\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00", 0, false},
	}
	for _, test := range tests {
		size, ok := messageSize([]byte(test.head))
		if ok != test.ok || ok && size != test.size {
			t.Errorf("messageSize(%q) = %d, %t; want %d, %t", test.head, size, ok, test.size, test.ok)
		}
	}
}
