// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/testbus"
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

// anyPolkit lets any user be polkit, whom anybody may call.
const anyPolkit = `<policy context="default">
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>`

// testBus is a bus with a place for polkit.
type testBus struct {
	*testbus.Bus
	tb testing.TB
}

func newBus(tb testing.TB) testBus {
	tb.Helper()
	return testBus{testbus.New(tb, anyPolkit), tb}
}

// connect gives a godbus connection to the bus.
func (b testBus) connect() *dbus.Conn {
	b.tb.Helper()
	return b.Connect(b.tb)
}

// polkit gives a Polkit that uses the bus.
func (b testBus) polkit() *Polkit {
	p := New()
	p.address = b.Address
	b.tb.Cleanup(p.Close)
	return p
}

// hostileSignals sends n signals to a unique name, each with four fds that
// nothing in it refers to, and returns when the bus has passed them on.
func hostileSignals(t *testing.T, bus testBus, name string, n int) {
	t.Helper()
	c := newRawConn(t, bus)
	signal := signalTo(name)
	signal.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(4))
	for i := range n {
		c.write(encode(t, signal), 2, 2, 2, 2)
		// The bus queues 64 fds for a receiver and drops what comes beyond that.
		if i%8 == 7 {
			c.call("GetId")
		}
	}
	c.call("GetId")
}

func signalTo(name string) *dbus.Message {
	return &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(name),
		dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath("/x")),
		dbus.FieldInterface:   dbus.MakeVariant("x.y"),
		dbus.FieldMember:      dbus.MakeVariant("Z"),
	}}
}

// rawConn is a connection that says Hello, and leaves everything else to its user.
type rawConn struct {
	tb     testing.TB
	socket *net.UnixConn
	reader *bufio.Reader
}

func newRawConn(tb testing.TB, bus testBus) *rawConn {
	tb.Helper()
	socket, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: bus.Socket})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = socket.Close() })
	c := &rawConn{tb, socket, bufio.NewReader(socket)}
	if _, err := fmt.Fprintf(socket, "\x00AUTH EXTERNAL %x\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n", strconv.Itoa(os.Geteuid())); err != nil {
		tb.Fatal(err)
	}
	for range 2 {
		if _, err := c.reader.ReadString('\n'); err != nil {
			tb.Fatal(err)
		}
	}
	c.call("Hello")
	c.skip() // NameAcquired
	return c
}

// call calls a method of the bus and returns when it has answered, and so has
// handled what was sent before.
func (c *rawConn) call(member string) {
	c.tb.Helper()
	c.write(encode(c.tb, methodCall("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", member)))
	c.skip()
}

func (c *rawConn) write(data []byte, fds ...int) {
	c.tb.Helper()
	n, _, err := c.socket.WriteMsgUnix(data, syscall.UnixRights(fds...), nil)
	if err == nil && n < len(data) {
		_, err = c.socket.Write(data[n:])
	}
	if err != nil {
		c.tb.Fatal(err)
	}
}

// skip reads a message.
func (c *rawConn) skip() {
	c.tb.Helper()
	head, err := c.reader.Peek(16)
	if err != nil {
		c.tb.Fatal(err)
	}
	fields, body := binary.LittleEndian.Uint32(head[12:]), binary.LittleEndian.Uint32(head[4:])
	if _, err := c.reader.Discard(16 + int(fields+7)&^7 + int(body)); err != nil {
		c.tb.Fatal(err)
	}
}

func methodCall(destination string, path dbus.ObjectPath, iface, member string, body ...any) *dbus.Message {
	m := signalTo(destination)
	m.Type, m.Body = dbus.TypeMethodCall, body
	m.Headers[dbus.FieldPath] = dbus.MakeVariant(path)
	m.Headers[dbus.FieldInterface] = dbus.MakeVariant(iface)
	m.Headers[dbus.FieldMember] = dbus.MakeVariant(member)
	if len(body) != 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	return m
}

// encode gives a message as it is sent, with a serial.
func encode(tb testing.TB, message *dbus.Message) []byte {
	tb.Helper()
	var buffer bytes.Buffer
	if _, err := message.EncodeToWithFDs(&buffer, binary.LittleEndian); err != nil {
		tb.Fatal(err)
	}
	binary.LittleEndian.PutUint32(buffer.Bytes()[8:], 1)
	return buffer.Bytes()
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
func nameOfNext(t *testing.T, bus testBus, connect func()) string {
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
	stranger := newRawConn(t, bus)
	signal := signalTo(name)
	signal.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(""))
	signal.Body = []any{strings.Repeat("x", 30<<20)}
	data := encode(t, signal)

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 10 {
		stranger.write(data)
		stranger.call("GetId")
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
