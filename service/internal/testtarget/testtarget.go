// SPDX-License-Identifier: Apache-2.0

// Package testtarget makes the processes that bpfbroker's tests work on:
// users' processes, in namespaces of their own, that do as a test says. Each
// is the test's own binary, so that a test needs no other program; the test's
// TestMain calls Main. Nothing but tests imports it.
package testtarget

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Alice and Bob are uids of ordinary users, and their groups.
const (
	Alice = 1000
	Bob   = 1001
)

// Mapping says which ids a new user namespace has.
type Mapping int

// The mappings.
const (
	// Root maps the user to uid 0, which then has every capability.
	Root Mapping = iota
	// Same maps the user to itself.
	Same
	// None leaves the namespace without ids.
	None
	// Others maps uid 1, of a process in a container, to uid 0, as for a
	// container that has no id of its owner's.
	Others
)

// Attr is how a process differs from the one that starts it.
type Attr struct {
	// UID is its uid and gid, 0 for those it is started with.
	UID int
	// Groups are its supplementary groups, if UID is set.
	Groups []uint32
	// Namespaces are the new ones that it gets (CLONE_NEW…).
	Namespaces uintptr
	// Mapping is for a new user namespace.
	Mapping Mapping
	// Env is added to its environment.
	Env []string
}

// Op is something that a process can be told to do, on its main thread. The
// files that it gets are closed after it; those that it returns are the
// test's.
type Op func(args []string, files []*os.File) (string, []*os.File, error)

// Process is a process that does as it is told.
type Process struct {
	t testing.TB
	// PID is the process's id in the test's pid namespace.
	PID int
	// PidFD belongs to the Process.
	PidFD  *os.File
	mu     sync.Mutex
	socket *os.File
}

// socketEnv tells a process that it is one, and which descriptor its
// instructions come from.
const socketEnv = "BPFBROKER_TEST_TARGET"

const socketFD = 3

func init() {
	// Namespaces are a thread's, and a process's are those of the main one.
	if os.Getenv(socketEnv) != "" {
		runtime.LockOSThread()
	}
}

// Main runs the tests, and fails them if they leak descriptors or processes;
// or, in a process that a test has started, does what that says. prepare, which
// may be nil, comes before the tests. It doesn't return.
func Main(m *testing.M, ops map[string]Op, prepare func() error) {
	if os.Getenv(socketEnv) != "" {
		serve(ops)
		os.Exit(0)
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			panic(err)
		}
	}
	warmUp()
	// A small machine may lack the place where targets have their own files.
	_ = os.Mkdir("/mnt", 0o755)
	before := takeStock()
	code := m.Run()
	if leaks := before.wait(); leaks != "" && code == 0 {
		fmt.Fprintln(os.Stderr, leaks)
		code = 1
	}
	os.Exit(code)
}

// New starts a target: a process in a user and a mount namespace of the
// user's own, in which it is root. It has an empty tmpfs at /mnt.
func New(t testing.TB, user int) *Process {
	t.Helper()
	p := NewWith(t, user, unix.CLONE_NEWUSER|unix.CLONE_NEWNS, Root)
	p.Must("tmpfs", "/mnt")
	return p
}

// NewWith starts a process of the user's in new namespaces that are the
// user's. The user namespace of a process belongs to the uid that made it, so
// that takes two.
func NewWith(t testing.TB, user int, namespaces uintptr, mapping Mapping) *Process {
	t.Helper()
	if user == 0 {
		return Start(t, Attr{Namespaces: namespaces, Mapping: mapping})
	}
	return Start(t, Attr{UID: user}).Start(Attr{Namespaces: namespaces, Mapping: mapping})
}

// Subordinate is the uid, and gid, that is 1 in a container of NewContainer's.
const Subordinate = 100000

// NewContainer starts a process in a user and a mount namespace of the user's
// own, with ids as rootless containers have them: root is the user, and there
// are others after that.
func NewContainer(t testing.TB, user int) *Process {
	t.Helper()
	p := NewWith(t, user, unix.CLONE_NEWUSER|unix.CLONE_NEWNS, None)
	ids := fmt.Sprintf("0 %d 1\n1 %d 65536", user, Subordinate)
	p.Map(ids, ids)
	return p.Start(Attr{})
}

// Start starts a process from the test's own. It ends with the test.
func Start(t testing.TB, a Attr) *Process {
	t.Helper()
	if a.UID != 0 && os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	cmd, socket, pidfd, err := start(a)
	if err != nil {
		t.Fatalf("cannot start a process: %v", err)
	}
	p := &Process{t: t, PID: cmd.Process.Pid, PidFD: pidfd, socket: socket}
	t.Cleanup(func() {
		p.Kill()
		_ = cmd.Wait()
		p.close()
	})
	return p
}

// Start starts a process from this one, which also reaps it.
func (p *Process) Start(a Attr) *Process {
	p.t.Helper()
	data, err := json.Marshal(a)
	if err != nil {
		p.t.Fatal(err)
	}
	out, files, err := p.Do("start", []string{string(data)})
	if err != nil {
		p.t.Fatalf("cannot start a process: %v", err)
	}
	pid, err := strconv.Atoi(out)
	if err != nil {
		p.t.Fatal(err)
	}
	child := &Process{t: p.t, PID: pid, PidFD: files[1], socket: files[0]}
	p.t.Cleanup(func() {
		child.Kill()
		child.close()
	})
	return child
}

func (p *Process) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.socket.Close()
	_ = p.PidFD.Close()
}

// Kill ends the process and waits until it has exited.
func (p *Process) Kill() {
	_ = unix.PidfdSendSignal(int(p.PidFD.Fd()), unix.SIGKILL, nil, 0)
	poll := []unix.PollFd{{Fd: int32(p.PidFD.Fd()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(poll, 10_000); err != unix.EINTR {
			return
		}
	}
}

// Map gives ids to a user namespace that has none, as user_namespaces(7) has
// them. What the process starts afterwards has the capabilities of its ids.
func (p *Process) Map(uids, gids string) {
	p.t.Helper()
	for file, data := range map[string]string{"uid_map": uids, "gid_map": gids} {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", p.PID, file), []byte(data), 0); err != nil {
			p.t.Fatal(err)
		}
	}
}

// Dup returns another pidfd of the process, the caller's to close.
func (p *Process) Dup() *os.File {
	p.t.Helper()
	return Dup(p.t, int(p.PidFD.Fd()))
}

// Dup returns a copy of a file descriptor, the caller's to close.
func Dup(t testing.TB, fd int) *os.File {
	t.Helper()
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(dup), "dup")
}

// Must tells the process to do something that has to work.
func (p *Process) Must(op string, args ...string) string {
	p.t.Helper()
	out, files, err := p.Do(op, args)
	for _, f := range files {
		_ = f.Close()
	}
	if err != nil {
		p.t.Fatalf("cannot do %s %.100q: %v", op, args, err)
	}
	return out
}

// Do tells the process to do something. An error of the process's is an
// Errno if it was one there.
func (p *Process) Do(op string, args []string, files ...*os.File) (string, []*os.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := send(p.socket, request{op, args}, files); err != nil {
		return "", nil, err
	}
	var a answer
	got, err := receive(p.socket, &a)
	switch {
	case err != nil:
	case a.Errno != 0:
		err = a.Errno
	case a.Error != "":
		err = errors.New(a.Error)
	}
	return a.Out, got, err
}

type request struct {
	Op   string
	Args []string
}

type answer struct {
	Out, Error string
	Errno      syscall.Errno
}

// start starts a process and returns its socket and its pidfd.
func start(a Attr) (_ *exec.Cmd, socket, pidfd *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	// The path of the binary may be closed to the user; this one isn't.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), socketEnv+"=1", "GOMAXPROCS=2"), a.Env...)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	fd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: a.Namespaces, PidFD: &fd, Pdeathsig: syscall.SIGKILL}
	if a.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.UID), Gid: uint32(a.UID), Groups: a.Groups}
	}
	if a.Namespaces&unix.CLONE_NEWUSER != 0 && a.Mapping != None {
		uid, gid := os.Geteuid(), os.Getegid()
		insideUID, insideGID := uid, gid
		switch a.Mapping {
		case Root:
			insideUID, insideGID = 0, 0
		case Others:
			uid, gid, insideUID, insideGID = 1, 1, 0, 0
			cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
		}
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: insideUID, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: insideGID, HostID: gid, Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		_ = unix.Close(pair[0])
		return nil, nil, nil, err
	}
	started.Store(cmd.Process.Pid, nil)
	return cmd, os.NewFile(uintptr(pair[0]), "socket"), os.NewFile(uintptr(fd), "pidfd"), nil
}

// serve does as it is told until the test has gone.
func serve(more map[string]Op) {
	_ = os.Unsetenv(socketEnv)
	unix.CloseOnExec(socketFD)
	socket := os.NewFile(socketFD, "socket")
	for {
		var r request
		files, err := receive(socket, &r)
		if err != nil {
			return
		}
		op := more[r.Op]
		if op == nil {
			op = ops[r.Op]
		}
		var a answer
		var results []*os.File
		if op == nil {
			a.Error = "no such operation: " + r.Op
		} else if a.Out, results, err = op(r.Args, files); err != nil {
			a.Error = err.Error()
			errors.As(err, &a.Errno)
		}
		err = send(socket, a, results)
		for _, f := range append(files, results...) {
			_ = f.Close()
		}
		if err != nil {
			return
		}
	}
}

func send(socket *os.File, message any, files []*os.File) error {
	data, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	return unix.Sendmsg(int(socket.Fd()), data, rights, nil, unix.MSG_NOSIGNAL)
}

func receive(socket *os.File, message any) ([]*os.File, error) {
	data, control := make([]byte, 64<<10), make([]byte, 4096)
	var n, controlLen int
	var err error
	for {
		if n, controlLen, _, _, err = unix.Recvmsg(int(socket.Fd()), data, control, unix.MSG_CMSG_CLOEXEC); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("the other end has gone")
	}
	var files []*os.File
	if controlLen > 0 {
		messages, err := unix.ParseSocketControlMessage(control[:controlLen])
		if err != nil {
			return nil, err
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, json.Unmarshal(data[:n], message)
}

// Eventually waits until something is so.
func Eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for range 1000 {
		if is() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("waited in vain: %s", what)
}
