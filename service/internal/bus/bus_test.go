// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/limit"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testbus"
)

// The tests count the process's file descriptors, so they don't run in parallel.

func TestMain(m *testing.M) {
	r, w, _ := os.Pipe() // starts the runtime's poller, whose descriptors stay
	_, _ = r.Close(), w.Close()
	os.Exit(m.Run())
}

// room is for a thousand calls of one connection.
const room = `<limit name="max_replies_per_connection">2000</limit>`

// asRoot lets the tests' user do what only root may.
const asRoot = `<policy user="%d">
    <allow own="org.bpfbroker.Broker1"/>
    <allow send_destination="org.bpfbroker.Broker1" send_interface="org.freedesktop.DBus.Properties" send_member="Set" max_fds="0"/>
  </policy>`

const ourPolicy = "../../../packaging/dbus/org.bpfbroker.Broker1.conf"

// testBus is a bus with our policy.
type testBus struct{ *testbus.Bus }

func newBus(t testing.TB) testBus {
	t.Helper()
	policy, err := filepath.Abs(ourPolicy)
	if err != nil {
		t.Fatal(err)
	}
	rules := room + "<include>" + policy + "</include>"
	if uid := os.Getuid(); uid != 0 {
		rules = fmt.Sprintf(asRoot, uid) + rules
	}
	return testBus{testbus.New(t, rules)}
}

// client is a connection of a caller's.
type client struct {
	*dbus.Conn
	t testing.TB
}

func (b testBus) connect(t testing.TB) *client {
	t.Helper()
	return &client{b.Connect(t), t}
}

// stranger connects as another user: the kernel notes who a thread is when it
// connects. Where the tests aren't run by root, everybody is a stranger.
func (b testBus) stranger(t testing.TB) *client {
	t.Helper()
	if os.Getuid() != 0 {
		return b.connect(t)
	}
	const nobody = 65534
	connected := make(chan *dbus.Conn)
	go func() {
		defer close(connected)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			t.Error(errno)
			return
		}
		conn, err := dbus.Dial(b.Address)
		if err != nil {
			t.Error(err)
			return
		}
		connected <- conn
	}()
	conn := <-connected
	if conn == nil {
		t.FailNow()
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.Auth([]dbus.Auth{dbus.AuthExternal("65534")}); err != nil {
		t.Fatal(err)
	}
	if err := conn.Hello(); err != nil {
		t.Fatal(err)
	}
	return &client{conn, t}
}

// call calls a method of ours, and fails the test when nothing comes back.
func (c *client) call(path, method string, args ...any) *dbus.Call {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	call := c.Object(busName, dbus.ObjectPath(path)).CallWithContext(ctx, method, 0, args...)
	if call.Err == context.DeadlineExceeded {
		c.t.Errorf("no answer to %s", method)
	}
	return call
}

func (c *client) manager(member string, args ...any) *dbus.Call {
	c.t.Helper()
	return c.call(rootPath, managerInterface+"."+member, args...)
}

// errorOf gives a call's error by its name.
func errorOf(call *dbus.Call) string {
	switch e := call.Err.(type) {
	case nil:
		return ""
	case dbus.Error:
		return strings.TrimPrefix(strings.TrimPrefix(e.Name, errorPrefix), "org.freedesktop.DBus.Error.")
	default:
		return call.Err.Error()
	}
}

var noOptions = map[string]dbus.Variant{}

// fakeBroker grants everything at once, but for profiles of special names.
type fakeBroker struct {
	made, renewed func(grant.Grant)
	ended         func(grant.Grant, grant.Reason)
	object        func(broker.Object, catalog.News)

	// started says that a request for "slow" has begun, which ends when released
	// or with its context; canceled has the context's error.
	started  chan struct{}
	release  chan struct{}
	canceled chan error

	mu        sync.Mutex
	last      broker.Caller
	grants    map[grant.ID]grant.Grant
	withdrawn int
}

func newFakeBroker() *fakeBroker {
	return &fakeBroker{
		started:  make(chan struct{}, 10_000),
		release:  make(chan struct{}),
		canceled: make(chan error, 10_000),
		grants:   map[grant.ID]grant.Grant{},
	}
}

func (b *fakeBroker) Watch(w broker.Watcher) {
	b.made, b.renewed, b.ended, b.object = w.Made, w.Leased, w.Ended, w.Object
}

var testProfile = &profile.Profile{Name: "network", Description: "d", Lease: time.Hour, Files: []string{"/x"}}

func (b *fakeBroker) ListProfiles() []broker.Offer {
	return []broker.Offer{
		{Profile: testProfile, Tier: testProfile.Tier(false)},
		{Profile: &profile.Profile{Name: "refused"}, Refusal: &broker.Error{Name: "X", Reason: "why", Remedy: "what"}},
	}
}

func (b *fakeBroker) DescribeProfile(name string) (broker.Offer, error) {
	if name == "panic" {
		panic("secret")
	}
	for _, o := range b.ListProfiles() {
		if o.Name == name {
			return o, nil
		}
	}
	return broker.Offer{}, fmt.Errorf("cannot describe %.64q: %w", name, profile.ErrNotFound)
}

func (b *fakeBroker) Check(context.Context, broker.Caller) []broker.Finding {
	return []broker.Finding{{Subject: "a", State: "yes", Reason: "b", Remedy: "c"}}
}

func (b *fakeBroker) AcquireToken(ctx context.Context, c broker.Caller, name string) (grant.Grant, *os.File, error) {
	g, err := b.grant(ctx, c, name, "", c.Process.PID)
	if err != nil {
		return g, nil, err
	}
	file, err := os.Open(os.DevNull)
	if name == "unsendable" {
		_ = file.Close()
	}
	return g, file, err
}

func (b *fakeBroker) MountToken(ctx context.Context, c broker.Caller, name string, process *kernel.Process, _, path string) (grant.Grant, error) {
	return b.grant(ctx, c, name, path, process.PID)
}

func (b *fakeBroker) grant(ctx context.Context, c broker.Caller, name, path string, pid int) (grant.Grant, error) {
	switch name {
	case "slow":
		b.started <- struct{}{}
		select {
		case <-b.release:
		case <-ctx.Done():
			b.canceled <- ctx.Err()
			return grant.Grant{}, ctx.Err()
		}
	case "stubborn": // finds out too late
		b.started <- struct{}{}
		<-b.release
	case "bad":
		return grant.Grant{}, fmt.Errorf("cannot \xff\x00: %w", profile.ErrNotFound)
	}
	b.mu.Lock()
	g := grant.Grant{ID: grant.ID(1000 + len(b.grants)), Profile: name, Tier: "basic", Owner: c.UID, PID: pid, Path: path, Created: int64(len(b.grants))}
	b.grants[g.ID] = g
	b.last = c
	b.mu.Unlock()
	b.made(g)
	return g, nil
}

func (b *fakeBroker) end(id grant.ID, reason grant.Reason) {
	b.mu.Lock()
	g := b.grants[id]
	delete(b.grants, id)
	b.mu.Unlock()
	b.ended(g, reason)
}

// oddName is one that paths have to encode, and a broken text.
const oddName = "0_a-b\xff"

func (b *fakeBroker) ListObjects() []broker.Object {
	return []broker.Object{{Description: b.describe("tcp")}, failedObject}
}

// failedObject is what is known of an object whose files are wrong.
var failedObject = broker.Object{
	Description: catalog.Description{Status: catalog.Status{Name: oddName, State: catalog.Failed}},
	Refusal:     &broker.Error{Name: "X", Reason: "why \xff", Remedy: "what"},
}

func (b *fakeBroker) FindObject(name string) (broker.Object, error) {
	if name == oddName {
		return failedObject, nil
	}
	return b.DescribeObject(name)
}

func (b *fakeBroker) describe(name string) catalog.Description {
	return catalog.Description{
		Status: catalog.Status{Name: name, State: catalog.Loaded, Object: &catalog.Object{
			Name: name, Description: "d", Keep: -1, Files: []string{"/x\xff"},
			Maps:     map[string]*catalog.Map{"m": {}},
			Programs: map[string]*catalog.Program{"p": {Publish: true}, "q": {}},
		}},
		Maps:     []catalog.MapInfo{{Name: "m", Type: "hash", Access: []catalog.Access{catalog.ReadOnly}, KeyType: "u32", BTF: []byte{1}}},
		Programs: []catalog.ProgramInfo{{Name: "p", Type: "xdp", AttachType: "xdp"}},
		Links:    []catalog.LinkInfo{{Name: "p", Program: "p", Type: "xdp", Target: "eth0", Attached: true}},
	}
}

func (b *fakeBroker) DescribeObject(name string) (broker.Object, error) {
	if name != "tcp" {
		return broker.Object{}, fmt.Errorf("cannot describe %.64q: %w", name, catalog.ErrNoSuchObject)
	}
	return broker.Object{Description: b.describe(name)}, nil
}

func (b *fakeBroker) OpenLink(object, link string) (catalog.LinkInfo, error) {
	return b.describe(object).Links[0], nil
}

func (b *fakeBroker) OpenMap(_ context.Context, _ broker.Caller, object, mapName string, access catalog.Access) (*os.File, []string, error) {
	if mapName != "m" {
		return nil, nil, fmt.Errorf("cannot open: %w", catalog.ErrNoSuchMap)
	}
	file, err := os.Open(os.DevNull)
	return file, []string{"warning"}, err
}

func (b *fakeBroker) MountObjects(context.Context, broker.Caller, []string, *kernel.Process, string) (broker.Mounted, error) {
	return broker.Mounted{Pins: []string{"tcp/m"}, Undo: func() {}}, nil
}

func (b *fakeBroker) OpenSocket(context.Context, broker.Caller, string, string, uint32) (*kernel.PacketSocket, string, error) {
	socket, err := os.Open(os.DevNull)
	if err != nil {
		return nil, "", err
	}
	memory, err := os.Open(os.DevNull)
	return &kernel.PacketSocket{Socket: socket, Memory: memory}, "eth0", err
}

func (b *fakeBroker) OpenProgram(context.Context, broker.Caller, string, string) (*os.File, error) {
	return os.Open(os.DevNull)
}

func (b *fakeBroker) Withdraw(id grant.ID) {
	b.end(id, grant.Undone)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.withdrawn++
}

func (b *fakeBroker) ListGrants(_ context.Context, c broker.Caller, all bool) ([]*grant.Grant, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var grants []*grant.Grant
	for _, g := range b.grants {
		if all || g.Owner == c.UID {
			grants = append(grants, &g)
		}
	}
	return grants, nil
}

func (b *fakeBroker) GetGrant(_ context.Context, c broker.Caller, id string) (grant.Grant, error) {
	var wanted grant.ID
	if err := wanted.UnmarshalText([]byte(id)); err != nil {
		return grant.Grant{}, fmt.Errorf("cannot find %.64q: %w", id, grant.ErrNotFound)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	g, ok := b.grants[wanted]
	if !ok || g.Owner != c.UID {
		return grant.Grant{}, fmt.Errorf("cannot find %.64q: %w", id, grant.ErrNotFound)
	}
	return g, nil
}

func (b *fakeBroker) ExplainGrant(context.Context, broker.Caller, string) (broker.Explanation, error) {
	return broker.Explanation{
		Denials:  []broker.Denial{{Event: broker.Event{Grant: 1, Command: "\xff", Program: "p"}, Allow: "a"}},
		Withheld: []profile.Withheld{{Layer: "l", Setting: "s", Names: []string{"n"}}},
	}, nil
}

func (b *fakeBroker) RenewGrant(ctx context.Context, c broker.Caller, id string) (grant.Grant, error) {
	g, err := b.GetGrant(ctx, c, id)
	if err == nil {
		g.Expires = 77
		b.renewed(g)
	}
	return g, err
}

func (b *fakeBroker) RevokeGrant(ctx context.Context, c broker.Caller, id string, kill bool) ([]string, error) {
	g, err := b.GetGrant(ctx, c, id)
	if err != nil {
		return nil, err
	}
	b.end(g.ID, grant.Revoked)
	if kill {
		return nil, nil
	}
	return []string{"links"}, nil
}

func (b *fakeBroker) caller() broker.Caller {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.last
}

func (b *fakeBroker) taken() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.withdrawn
}

// fixture is a bus with a front on it, in front of a fake broker.
type fixture struct {
	*Front
	bus    testBus
	broker *fakeBroker
	stop   func() error // ends Serve and returns its error; may be called again

	mu    sync.Mutex
	users map[string]uint32 // uids by unique name, for connections that get one
}

func openProcess(pid int) (*kernel.Process, error) {
	file := pidfd(nil, uint32(pid))
	if file == nil {
		return nil, kernel.ErrProcessGone
	}
	return kernel.NewProcess(file)
}

// pidfd stands in for the ProcessFD of a bus that is too old to have it.
func pidfd(file *os.File, pid uint32) *os.File {
	if file != nil {
		return file
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), "pidfd")
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	return serveOn(t, newBus(t), nil)
}

// serveOn starts a front. change may alter it before.
func serveOn(t testing.TB, bus testBus, change func(*fixture)) *fixture {
	t.Helper()
	f := &fixture{bus: bus, broker: newFakeBroker(), users: map[string]uint32{}}
	var err error
	f.Front, err = New(Config{
		Broker:      f.broker,
		Users:       limit.NewUsers(32, 500, 2000),
		OpenProcess: openProcess,
		LogLevel:    new(slog.LevelVar),
	})
	if err != nil {
		t.Fatal(err)
	}
	f.address = bus.Address
	f.processFD = pidfd
	f.userOf = func(name string, uid uint32) uint32 {
		f.mu.Lock()
		defer f.mu.Unlock()
		if other, ok := f.users[name]; ok {
			return other
		}
		return uid
	}
	if change != nil {
		change(f)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.Serve(ctx) }()
	f.stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() {
		if err := f.stop(); err != nil && !t.Failed() {
			t.Errorf("Serve: %v", err)
		}
	})
	f.waitForName(t)
	return f
}

func (f *fixture) waitForName(t testing.TB) {
	t.Helper()
	c := f.bus.connect(t)
	eventually(t, "the name is on the bus", func() bool {
		var has bool
		if err := c.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, busName).Store(&has); err != nil {
			t.Fatal(err)
		}
		return has && f.session.Load() != nil
	})
	_ = c.Close()
}

// connectAs connects somebody whom the front takes for another user.
func (f *fixture) connectAs(t testing.TB, uid uint32) *client {
	t.Helper()
	c := f.bus.connect(t)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users[c.Names()[0]] = uid
	return c
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	open := 0
	for _, link := range links {
		if _, err := os.Readlink(link); err == nil { // not the one that Glob read
			open++
		}
	}
	return open
}

// closeFiles closes what a reply brought, which godbus leaves to the receiver.
func closeFiles(t testing.TB, call *dbus.Call) {
	t.Helper()
	for _, value := range call.Body {
		if fd, ok := value.(dbus.UnixFD); ok {
			if err := syscall.Close(int(fd)); err != nil {
				t.Error(err)
			}
		}
	}
}

// unlimited is for measuring.
var unlimited = limit.NewUsers(1<<30, 1<<30, 1<<30)
