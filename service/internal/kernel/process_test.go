// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// processOf takes hold of a test's process.
func processOf(t testing.TB, p *testtarget.Process) *Process {
	t.Helper()
	process, err := NewProcess(p.Dup())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return process
}

func closed(f *os.File) bool {
	return errors.Is(f.Close(), os.ErrClosed)
}

func TestNewProcess(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.Start(t, testtarget.Attr{})
	process := processOf(t, p)
	if process.PID != p.PID || process.Inode == 0 || !process.Alive() {
		t.Errorf("got %+v for process %d", process, p.PID)
	}
	again := processOf(t, p)
	if again.Inode != process.Inode {
		t.Errorf("inode %d, then %d", process.Inode, again.Inode)
	}
	clone, err := process.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer clone.Close()
	if clone.PID != process.PID || clone.Inode != process.Inode || clone.FD() == process.FD() {
		t.Errorf("cloned %+v to %+v", process, clone)
	}
	if err := process.Close(); err != nil {
		t.Error(err)
	}
	if !clone.Alive() {
		t.Error("a clone depends on what it was cloned from")
	}
	if _, err := clone.Cgroup(); err != nil {
		t.Errorf("cannot get the cgroup: %v", err)
	}
	other := processOf(t, testtarget.Start(t, testtarget.Attr{}))
	if other.Inode == clone.Inode {
		t.Error("two processes with one inode")
	}
}

func TestExitedProcess(t *testing.T) {
	testtarget.NoLeaks(t)
	// The test reaps its own children only at its end.
	zombie := testtarget.Start(t, testtarget.Attr{})
	held := processOf(t, zombie)
	zombie.Kill()
	for _, process := range []*Process{held, processOf(t, zombie)} {
		if process.Alive() {
			t.Error("a zombie is alive")
		}
		if _, err := process.Namespaces(); !errors.Is(err, ErrProcessGone) {
			t.Errorf("the namespaces of a zombie: got %v", err)
		}
		if _, err := process.Cgroup(); !errors.Is(err, ErrProcessGone) {
			t.Errorf("the cgroup of a zombie: got %v", err)
		}
	}

	reaped := testtarget.Start(t, testtarget.Attr{}).Start(testtarget.Attr{})
	held = processOf(t, reaped)
	reaped.Kill()
	testtarget.Eventually(t, "the process is reaped", func() bool { return unix.Kill(reaped.PID, 0) == unix.ESRCH })
	if held.Alive() {
		t.Error("a reaped process is alive")
	}
	if _, err := held.Namespaces(); !errors.Is(err, ErrProcessGone) {
		t.Errorf("the namespaces of a reaped process: got %v", err)
	}
	pidfd := reaped.Dup()
	if _, err := NewProcess(pidfd); !errors.Is(err, ErrProcessGone) {
		t.Errorf("a reaped process: got %v", err)
	}
	if !closed(pidfd) {
		t.Error("the pidfd is still open")
	}
}

// threadOf opens a pidfd of a thread of the test's that isn't its main one,
// and returns its id.
func threadOf(t *testing.T) (tid, pidfd int) {
	t.Helper()
	type thread struct {
		tid, pidfd int
		err        error
	}
	opened, done := make(chan thread), make(chan struct{})
	t.Cleanup(func() { close(done) })
	start := func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if unix.Gettid() == os.Getpid() {
			opened <- thread{}
			<-done
			return
		}
		fd, err := unix.PidfdOpen(unix.Gettid(), unix.O_EXCL) // PIDFD_THREAD
		opened <- thread{unix.Gettid(), fd, err}
		<-done
	}
	for {
		go start()
		if th := <-opened; th.err != nil {
			t.Fatal(th.err)
		} else if th.tid != 0 {
			return th.tid, th.pidfd
		}
	}
}

func TestNotAPidFD(t *testing.T) {
	testtarget.NoLeaks(t)
	open := func(path string, flags int) func() (int, error) {
		return func() (int, error) { return unix.Open(path, flags|unix.O_CLOEXEC, 0) }
	}
	for name, open := range map[string]func() (int, error){
		"pipe": func() (int, error) {
			var p [2]int
			err := unix.Pipe2(p[:], unix.O_CLOEXEC)
			unix.Close(p[1])
			return p[0], err
		},
		"memfd":                func() (int, error) { return unix.MemfdCreate("pidfd:[1]", unix.MFD_CLOEXEC) },
		"directory":            open("/", unix.O_DIRECTORY),
		"directory of pidfs":   open("/proc/self", unix.O_DIRECTORY),
		"O_PATH":               open("/proc/self", unix.O_PATH),
		"O_PATH of a symlink":  open("/proc/self/exe", unix.O_PATH|unix.O_NOFOLLOW),
		"null":                 open("/dev/null", unix.O_RDWR),
		"namespace":            open("/proc/self/ns/user", 0),
		"socket":               func() (int, error) { return unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) },
		"eventfd":              func() (int, error) { return unix.Eventfd(0, unix.EFD_CLOEXEC) },
		"epoll":                func() (int, error) { return unix.EpollCreate1(unix.EPOLL_CLOEXEC) },
		"a file named like it": func() (int, error) { return unix.Open(namedLikePidFD(t), unix.O_CLOEXEC, 0) },
		"thread":               func() (int, error) { _, fd := threadOf(t); return fd, nil },
	} {
		t.Run(name, func(t *testing.T) {
			fd, err := open()
			if err != nil {
				t.Fatal(err)
			}
			file := os.NewFile(uintptr(fd), name)
			if _, err := NewProcess(file); !errors.Is(err, ErrNotPidFD) {
				t.Errorf("got %v", err)
			}
			if !closed(file) {
				t.Error("it is still open")
			}
		})
	}
}

// namedLikePidFD makes a file whose path begins as the link of a pidfd, if
// that were relative.
func namedLikePidFD(t *testing.T) string {
	path := t.TempDir() + "/pidfd:[1]"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestClosedNumber(t *testing.T) {
	testtarget.NoLeaks(t)
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	if _, err := NewProcess(file); err == nil {
		t.Error("a closed file is a process")
	}
	// One that was closed behind the file's back.
	if _, err := NewProcess(os.NewFile(1<<20, "closed")); err == nil {
		t.Error("a closed number is a process")
	}
}

func TestFindProcess(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.Start(t, testtarget.Attr{})
	process := processOf(t, p)
	found, err := FindProcess(process.PID, process.Inode)
	if err != nil {
		t.Fatal(err)
	}
	defer found.Close()
	if found.Inode != process.Inode || found.PID != process.PID {
		t.Errorf("got %+v for %+v", found, process)
	}
	tid, fd := threadOf(t)
	unix.Close(fd)
	for name, other := range map[string]struct {
		pid   int
		inode uint64
	}{
		"another inode":                {process.PID, process.Inode + 1},
		"no inode":                     {process.PID, 0},
		"the pid is another's now":     {os.Getpid(), process.Inode},
		"the pid is a thread's id now": {tid, process.Inode},
		"no such pid":                  {1 << 30, process.Inode},
		"pid 0":                        {0, process.Inode},
		"a negative pid":               {-1, process.Inode},
		"PIDFD_SELF":                   {unix.PIDFD_SELF, process.Inode},
	} {
		if _, err := FindProcess(other.pid, other.inode); !errors.Is(err, ErrProcessGone) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	p.Kill()
	// It may be a zombie, which the ledger's watcher then tells of.
	if zombie, err := FindProcess(process.PID, process.Inode); err == nil {
		defer zombie.Close()
		if zombie.Alive() {
			t.Error("a zombie is alive")
		}
	} else if !errors.Is(err, ErrProcessGone) {
		t.Errorf("a zombie: got %v", err)
	}
}

func TestInitialUserNamespace(t *testing.T) {
	initial, err := InInitialUserNamespace()
	if err != nil {
		t.Fatal(err)
	}
	link, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Contains(link, "4026531837"); initial != want {
		t.Errorf("got %v in %s", initial, link)
	}
}

func TestProbeTokens(t *testing.T) {
	testtarget.NoLeaks(t)
	// Every kernel that these tests are run on has them.
	if err := ProbeTokens(); err != nil {
		t.Error(err)
	}
}
