// SPDX-License-Identifier: Apache-2.0

//go:build root

package objects

import (
	"bytes"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// The records' types can be found by name: Record= of an object file does.
func TestRecordTypes(t *testing.T) {
	for name, record := range map[string]struct {
		name string
		size int
	}{
		"execs":           {"exec_event", binary.Size(execEvent{})},
		"tcp-connections": {"closed_connection", binary.Size(closed{})},
	} {
		types, err := spec(t, name).Types.AnyTypesByName(record.name)
		if err != nil || len(types) != 1 {
			t.Fatalf("%s: %d types %s, error %v", name, len(types), record.name, err)
		}
		if size, err := btf.Sizeof(types[0]); err != nil || size != record.size {
			t.Errorf("%s: a record has %d bytes, want %d, error %v", name, size, record.size, err)
		}
	}
}

// The virtual machines of test/kernels have only the test itself.
//
//go:embed *.bpf.o
var files embed.FS

func spec(t *testing.T, name string) *ebpf.CollectionSpec {
	t.Helper()
	data, err := files.ReadFile(name + ".bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// load loads an object and attaches its programs to raw tracepoints.
func load(t *testing.T, name string, tracepoints map[string]string) *ebpf.Collection {
	t.Helper()
	spec := spec(t, name)
	for _, m := range spec.Maps {
		if m.Type == ebpf.RingBuf {
			m.MaxEntries = 64 << 10 // it is soon full
		}
		if m.Type != ebpf.RingBuf && (m.Value == nil || m.Key == nil) {
			t.Errorf("map %s has no types", m.Name)
		}
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(collection.Close)
	for program, tracepoint := range tracepoints {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: tracepoint, Program: collection.Programs[program]})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
	}
	return collection
}

const slots = 36

type histogram struct {
	Slots [slots]uint64
	Sum   uint64
}

func (h *histogram) add(o histogram) {
	for i, n := range o.Slots {
		h.Slots[i] += n
	}
	h.Sum += o.Sum
}

func (h *histogram) count() (n uint64) {
	for _, slot := range h.Slots {
		n += slot
	}
	return n
}

type latency struct {
	Errors   uint64
	Duration histogram
}

func syscallLatency(t *testing.T, m *ebpf.Map, number uint32) (sum latency) {
	t.Helper()
	var perCPU []latency
	if err := m.Lookup(number, &perCPU); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	for _, l := range perCPU {
		sum.Errors += l.Errors
		sum.Duration.add(l.Duration)
	}
	return sum
}

func TestSyscallLatency(t *testing.T) {
	maps := load(t, "syscall-latency-"+runtime.GOARCH, map[string]string{"enter": "sys_enter", "leave": "sys_exit", "forget": "sched_process_exit"}).Maps
	syscalls := maps["syscalls"]
	// System calls that nobody else makes.
	const failures, naps, nap = 1000, 5, 20 * time.Millisecond
	start := time.Now()
	for range failures {
		if _, _, err := unix.RawSyscall(unix.SYS_IO_CANCEL, 0, 0, 0); err == 0 {
			t.Fatal("io_cancel succeeds")
		}
	}
	elapsed := uint64(time.Since(start))
	got := syscallLatency(t, syscalls, unix.SYS_IO_CANCEL)
	if got.Errors != failures || got.Duration.count() != failures {
		t.Errorf("io_cancel: %d calls and %d errors, want %d", got.Duration.count(), got.Errors, failures)
	}
	if got.Duration.Sum == 0 || got.Duration.Sum > elapsed {
		t.Errorf("io_cancel took %d ns within %d", got.Duration.Sum, elapsed)
	}

	start = time.Now()
	for range naps {
		var none unix.Sigset_t
		timeout := unix.NsecToTimespec(int64(nap))
		_, _, err := unix.Syscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&none)), 0, uintptr(unsafe.Pointer(&timeout)), 8, 0, 0)
		if err != unix.EAGAIN {
			t.Fatal(err)
		}
	}
	elapsed = uint64(time.Since(start))
	got = syscallLatency(t, syscalls, unix.SYS_RT_SIGTIMEDWAIT)
	if got.Errors != naps || got.Duration.count() != naps {
		t.Errorf("rt_sigtimedwait: %d calls and %d errors, want %d", got.Duration.count(), got.Errors, naps)
	}
	if got.Duration.Sum < naps*uint64(nap) || got.Duration.Sum > elapsed {
		t.Errorf("rt_sigtimedwait took %d ns, want %d to %d", got.Duration.Sum, naps*nap, elapsed)
	}
	// 20 ms are between 2^24 and 2^25 ns; it can take longer.
	var quick uint64
	for _, n := range got.Duration.Slots[:bits.Len64(uint64(nap))-1] {
		quick += n
	}
	if quick != 0 {
		t.Errorf("%d of them took less than %v", quick, nap)
	}

	// Nothing is kept of threads that are gone.
	var gone []uint32
	for range 20 {
		command := exec.Command("true")
		run(t, command)
		gone = append(gone, uint32(command.Process.Pid))
	}
	for _, thread := range gone {
		if call, err := maps["calls"].LookupBytes(thread); err != nil || call != nil {
			t.Errorf("thread %d is gone, and still in %x, error %v", thread, call, err)
		}
	}
}

type execEvent struct {
	BootTime                  uint64
	Process, Parent, UID, GID uint32
	Command                   [16]byte
	File, Arguments           [256]byte
}

func text(b []byte) string {
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(before)
}

// records returns what is in a ring buffer.
func records[T any](t *testing.T, m *ebpf.Map) (all []T) {
	t.Helper()
	r, err := ringbuf.NewReader(m)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.SetDeadline(time.Now()) // no waiting
	for {
		record, err := r.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var one T
		if _, err := binary.Decode(record.RawSample, binary.NativeEndian, &one); err != nil {
			t.Fatal(err)
		}
		all = append(all, one)
	}
}

// total adds up a per-CPU counter.
func total(t *testing.T, m *ebpf.Map, key uint32) (sum uint64) {
	t.Helper()
	var perCPU []uint64
	if err := m.Lookup(key, &perCPU); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	for _, n := range perCPU {
		sum += n
	}
	return sum
}

// run executes a command. Its exit status doesn't matter: where it is busybox, it
// has another name than its commands.
func run(t *testing.T, command *exec.Cmd) {
	t.Helper()
	var status *exec.ExitError
	if err := command.Run(); err != nil && !errors.As(err, &status) {
		t.Fatal(err)
	}
}

func TestExecs(t *testing.T) {
	maps := load(t, "execs", map[string]string{"executed": "sched_process_exec"}).Maps
	directory, err := os.MkdirTemp("", "execs") // others can reach it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(directory)
	if err := os.Chmod(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(directory, fmt.Sprintf("e%d", os.Getpid()))
	path, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, data, 0o755); err != nil {
		t.Fatal(err)
	}
	const executions = 20
	pids := make(map[uint32]bool)
	for range executions {
		command := exec.Command(program, "one", "two words", strings.Repeat("x", 300))
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4712}}
		run(t, command)
		pids[uint32(command.Process.Pid)] = true
	}
	for _, e := range records[execEvent](t, maps["events"]) {
		if !pids[e.Process] {
			continue
		}
		delete(pids, e.Process)
		arguments := program + " one two words " + strings.Repeat("x", 300)
		if e.Parent != uint32(os.Getpid()) || e.UID != 4711 || e.GID != 4712 || text(e.Command[:]) != filepath.Base(program) ||
			text(e.File[:]) != program || text(e.Arguments[:]) != arguments[:255] {
			t.Errorf("got %+v: %q %q %q", e, text(e.Command[:]), text(e.File[:]), text(e.Arguments[:]))
		}
	}
	if len(pids) != 0 {
		t.Errorf("%d executions are missing", len(pids))
	}
	key := struct {
		UID     uint32
		Command [16]byte
	}{UID: 4711}
	copy(key.Command[:], filepath.Base(program))
	var n uint64
	if err := maps["commands"].Lookup(key, &n); err != nil || n != executions {
		t.Errorf("%d executions counted, error %v", n, err)
	}
	if n := total(t, maps["totals"], 0); n < executions {
		t.Errorf("%d executions in all", n)
	}

	// Nobody reads: what finds no room is counted, and the others stay whole.
	for total(t, maps["totals"], 1) == 0 {
		run(t, exec.Command(program))
	}
	all, lost := total(t, maps["totals"], 0), total(t, maps["totals"], 1)
	if n := uint64(len(records[execEvent](t, maps["events"]))); n < 100 || n+lost > all {
		t.Errorf("%d events of %d, %d lost", n, all, lost)
	}
}

type connection struct {
	Local, Remote [16]byte
	LocalPort     uint16
	RemotePort    [2]byte
	Network       uint32
}

type state struct {
	State, Role, Process     uint32
	Command                  [16]byte
	_                        uint32
	Lifetime, Sent, Received uint64
}

type closed struct {
	Connection connection
	State      state
}

type serviceTotal struct {
	Closed, Lost, Sent, Received uint64
	Lifetime                     histogram
}

func TestTCPConnections(t *testing.T) {
	maps := load(t, "tcp-connections", map[string]string{"set_state": "inet_sock_set_state"}).Maps
	loopback(t)
	for _, address := range []string{"127.0.0.1", "::1"} {
		t.Run(address, func(t *testing.T) { testConnections(t, maps, address) })
	}
}

// loopback brings the interface up in a virtual machine, where nobody else does.
func loopback(t *testing.T) {
	t.Helper()
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(socket)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	request.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request); err != nil {
		t.Fatal(err)
	}
}

func testConnections(t *testing.T, maps map[string]*ebpf.Map, address string) {
	const (
		connections, up, down = 3, 100_000, 2345
		life                  = 50 * time.Millisecond
	)
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	for range connections {
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = client.Write(make([]byte, up)) }()
		if _, err := io.ReadFull(server, make([]byte, up)); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Write(make([]byte, down)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, down)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(life)
		_ = client.Close()
		if n, err := server.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatal(n, err)
		}
		_ = server.Close()
	}
	ends := [2]int{}
	deadline := time.Now().Add(5 * time.Second)
	for ends != [2]int{connections, connections} && time.Now().Before(deadline) {
		for _, c := range records[closed](t, maps["closed"]) {
			remote := binary.BigEndian.Uint16(c.Connection.RemotePort[:])
			if c.Connection.LocalPort != port && remote != port {
				continue
			}
			role := c.State.Role
			ends[role]++
			sent, received, process := uint64(up), uint64(down), uint32(os.Getpid())
			if role == 1 {
				sent, received, process = down, up, 0
			}
			s := c.State
			if s.State != 7 || s.Sent != sent || s.Received != received || s.Process != process {
				t.Errorf("got %+v, want %d bytes sent and %d received, process %d", s, sent, received, process)
			}
			if s.Lifetime < uint64(life) || s.Lifetime > uint64(life)*20 {
				t.Errorf("it lived %v, want %v", time.Duration(s.Lifetime), life)
			}
			if ip := net.IP(c.Connection.Local[:]); !ip.Equal(net.ParseIP(address)) || c.Connection.Local != c.Connection.Remote {
				t.Errorf("addresses %v %v", ip, net.IP(c.Connection.Remote[:]))
			}
			var status unix.Stat_t
			if err := unix.Stat("/proc/self/ns/net", &status); err != nil || uint64(c.Connection.Network) != status.Ino {
				t.Errorf("network namespace %d, want %d, error %v", c.Connection.Network, status.Ino, err)
			}
			var kept state
			if err := maps["connections"].Lookup(c.Connection, &kept); err != nil || kept != s {
				t.Errorf("the table has %+v, error %v", kept, err)
			}
		}
	}
	if want := [2]int{connections, connections}; ends != want {
		t.Errorf("connections of clients and servers: %v, want %v", ends, want)
	}
	for role, want := range []serviceTotal{
		{Closed: connections, Sent: connections * up, Received: connections * down},
		{Closed: connections, Sent: connections * down, Received: connections * up},
	} {
		var perCPU []serviceTotal
		if err := maps["services"].Lookup([2]uint32{uint32(role), uint32(port)}, &perCPU); err != nil {
			t.Fatal(err)
		}
		var got serviceTotal
		for _, s := range perCPU {
			got.Closed += s.Closed
			got.Lost += s.Lost
			got.Sent += s.Sent
			got.Received += s.Received
			got.Lifetime.add(s.Lifetime)
		}
		if got.Lifetime.count() != connections || got.Lifetime.Sum < connections*uint64(life) {
			t.Errorf("lifetimes: %+v", got.Lifetime)
		}
		if got.Lifetime = (histogram{}); got != want {
			t.Errorf("role %d: got %+v, want %+v", role, got, want)
		}
	}
}
