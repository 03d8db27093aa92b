// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// The capabilities of a profile's.
const (
	capNetAdmin = 12
	capBPF      = 39
)

// suspended is what a user's process has suspended.
var suspended *Suspended

func init() {
	// suspend ROOT PATH ARGUMENT...: answers with the pid.
	ops["suspend"] = func(args []string, _ []*os.File) (string, []*os.File, error) {
		var err error
		if suspended, err = Suspend(args[1], args[2:], []string{"A=b", "C="}, SuspendOptions{Root: args[0] == "root"}); err != nil {
			return "", nil, err
		}
		return strconv.Itoa(suspended.c.pid), nil, nil
	}
	// exec CAPABILITY...
	ops["exec"] = func(args []string, _ []*os.File) (string, []*os.File, error) {
		var capabilities []int
		for _, arg := range args {
			n, err := strconv.Atoi(arg)
			if err != nil {
				return "", nil, err
			}
			capabilities = append(capabilities, n)
		}
		return "", nil, suspended.Exec(capabilities)
	}
	// wait: answers with the status.
	ops["wait"] = func([]string, []*os.File) (string, []*os.File, error) {
		status, err := suspended.Wait()
		return fmt.Sprint(uint32(status)), nil, err
	}
	// kill: what Exec could not start.
	ops["kill"] = func([]string, []*os.File) (string, []*os.File, error) {
		suspended.Kill()
		return "", nil, nil
	}
	// run PATH ARGUMENT...: as usual; answers with the pid.
	ops["run"] = func(args []string, _ []*os.File) (string, []*os.File, error) {
		cmd := &exec.Cmd{Path: args[0], Args: args[1:], Env: []string{"A=b", "C="}}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			return "", nil, err
		}
		go func() { _ = cmd.Wait() }()
		return strconv.Itoa(cmd.Process.Pid), nil, nil
	}
	// prepare: ignores signals, handles others, and opens files.
	ops["prepare"] = func([]string, []*os.File) (string, []*os.File, error) {
		signal.Ignore(syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGPIPE)
		signal.Notify(make(chan os.Signal, 1), syscall.SIGUSR2, syscall.SIGINT)
		for _, flags := range []int{0, unix.O_CLOEXEC} {
			if _, err := unix.Open("/dev/null", unix.O_RDONLY|flags, 0); err != nil {
				return "", nil, err
			}
		}
		return "", nil, nil
	}
}

// program finds a program of the system's.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func isCommand(pid string) bool {
	data, err := os.ReadFile("/proc/" + pid + "/cmdline")
	return err == nil && strings.HasPrefix(string(data), "sleep\x00")
}

// state is what a process was given by the one that started it. It ends with
// the test.
func state(t *testing.T, pid string) map[string]string {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(n, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		_ = unix.Close(pidfd)
	})
	testtarget.Eventually(t, "the command sleeps", func() bool {
		stat, _ := os.ReadFile("/proc/" + pid + "/stat")
		return isCommand(pid) && strings.Contains(string(stat), ") S ")
	})
	read := func(name string) string {
		data, err := os.ReadFile("/proc/" + pid + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	s := map[string]string{}
	for line := range strings.Lines(read("status")) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if slices.Contains([]string{"Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs"}, key) {
			s[key] = strings.Join(strings.Fields(value), " ")
		}
	}
	for _, name := range []string{"uid_map", "gid_map", "setgroups"} {
		s[name] = strings.Join(strings.Fields(read(name)), " ")
	}
	s["limits"] = read("limits")
	s["arguments"], s["environment"] = read("cmdline"), read("environ")
	fds, err := filepath.Glob("/proc/" + pid + "/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		link, err := os.Readlink(fd)
		if err != nil {
			t.Fatal(err)
		}
		s["fd"] += filepath.Base(fd) + " " + link + "; "
	}
	for _, name := range []string{"cwd", "root"} {
		link, err := os.Readlink("/proc/" + pid + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		s[name] = link
	}
	return s
}

func TestSuspend(t *testing.T) {
	testtarget.NoLeaks(t)
	sleep := program(t, "sleep")
	p := testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})
	p.Must("prepare")
	usual := state(t, p.Must("run", sleep, "sleep", "60"))
	const ambient = "0000008000001000"
	all := fmt.Sprintf("%016x", uint64(1)<<lastCapability(t)<<1-1)
	for name, test := range map[string]struct {
		root    string
		capable []string
		want    map[string]string
	}{
		"alice": {"", []string{strconv.Itoa(capBPF), strconv.Itoa(capNetAdmin)}, map[string]string{
			"CapInh": ambient, "CapPrm": ambient, "CapEff": ambient, "CapAmb": ambient,
			"uid_map": "1000 1000 1", "gid_map": "1000 1000 1", "setgroups": "deny"}},
		"alice without capabilities": {"", nil, map[string]string{
			"uid_map": "1000 1000 1", "gid_map": "1000 1000 1", "setgroups": "deny"}},
		"root": {"root", []string{strconv.Itoa(capBPF), strconv.Itoa(capNetAdmin)}, map[string]string{
			"CapInh": ambient, "CapPrm": all, "CapEff": all, "CapAmb": ambient,
			"uid_map": "0 1000 1", "gid_map": "0 1000 1", "setgroups": "deny"}},
	} {
		t.Run(name, func(t *testing.T) {
			pid := p.Must("suspend", test.root, sleep, "sleep", "60")
			if isCommand(pid) {
				t.Error("it runs already")
			}
			p.Must("exec", test.capable...)
			want := map[string]string{}
			for key, value := range usual {
				want[key] = value
			}
			for key, value := range test.want {
				want[key] = value
			}
			if diff := cmp.Diff(want, state(t, pid)); diff != "" {
				t.Errorf("beside what an exec gives usually (-usual +got):\n%s", diff)
			}
			for _, kind := range []string{"user", "mnt"} {
				theirs, err := os.Readlink("/proc/" + pid + "/ns/" + kind)
				if err != nil {
					t.Fatal(err)
				}
				if own, _ := os.Readlink("/proc/self/ns/" + kind); own == theirs {
					t.Errorf("it has no %s namespace of its own", kind)
				}
			}
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(n, unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if got := p.Must("wait"); got != strconv.Itoa(int(unix.SIGTERM)) {
				t.Errorf("got status %s", got)
			}
		})
	}
}

func lastCapability(t *testing.T) uint {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 8)
	if err != nil {
		t.Fatal(err)
	}
	return uint(n)
}

// The command gets the limit that its caller was started with, not the one
// that Go gave itself.
func TestSuspendLimit(t *testing.T) {
	testtarget.NoLeaks(t)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	// syscall's own keeps Go from giving children the first limit.
	lower := syscall.Rlimit{Cur: 345, Max: old.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lower); err != nil {
		t.Fatal(err)
	}
	p := testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	pid := p.Must("suspend", "", program(t, "sleep"), "sleep", "60")
	p.Must("exec")
	limits := state(t, pid)["limits"]
	for line := range strings.Lines(limits) {
		if strings.HasPrefix(line, "Max open files") && strings.Fields(line)[3] != "345" {
			t.Error(line)
		}
	}
	p.Kill() // and the command lives on, like any other
	if !isCommand(pid) {
		t.Error("the command went with its parent")
	}
}

func TestSuspendedParentKilled(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})
	pid, err := strconv.Atoi(p.Must("suspend", "", program(t, "sleep"), "sleep", "60"))
	if err != nil {
		t.Fatal(err)
	}
	p.Kill()
	testtarget.Eventually(t, "what was suspended ends", func() bool {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return len(status) == 0 || strings.Contains(string(status), ") Z ")
	})
}

// What interrupts a process while it is suspended ends it before its command
// has begun.
func TestSignalSuspended(t *testing.T) {
	testtarget.NoLeaks(t)
	file := filepath.Join(t.TempDir(), "file")
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		s, err := Suspend(program(t, "sh"), []string{"sh", "-c", "trap '' INT TERM; echo >" + file}, os.Environ(), SuspendOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Signal(sig); err != nil {
			t.Error(err)
		}
		if err := s.Exec(nil); err != nil {
			t.Errorf("%v: %v", sig, err)
			s.Kill()
			continue
		}
		status, err := s.Wait()
		if err != nil || !status.Signaled() || status.Signal() != sig {
			t.Errorf("%v: got %#x, %v", sig, status, err)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%v: the command ran", sig)
		}
	}
}

func TestExecFails(t *testing.T) {
	testtarget.NoLeaks(t)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("neither"), 0o600); err != nil {
		t.Fatal(err)
	}
	executable := filepath.Join(t.TempDir(), "executable")
	if err := os.WriteFile(executable, []byte("neither"), 0o700); err != nil {
		t.Fatal(err)
	}
	sleep := program(t, "sleep")
	for name, test := range map[string]struct {
		path         string
		argv         []string
		capabilities []int
		want         error
	}{
		"missing":              {"/nonexistent", []string{"x"}, nil, unix.ENOENT},
		"an empty path":        {"", []string{"x"}, nil, unix.ENOENT},
		"a directory":          {"/", []string{"x"}, nil, unix.EACCES},
		"not executable":       {plain, []string{"x"}, nil, unix.EACCES},
		"below a file":         {plain + "/x", []string{"x"}, nil, unix.ENOTDIR},
		"not a program":        {executable, []string{"x"}, nil, unix.ENOEXEC},
		"too long an argument": {sleep, []string{"sleep", strings.Repeat("1", 1<<20)}, nil, unix.E2BIG},
		"no such capability":   {sleep, []string{"sleep", "60"}, []int{63}, unix.EINVAL},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Suspend(test.path, test.argv, os.Environ(), SuspendOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Exec(test.capabilities); !errors.Is(err, test.want) {
				t.Errorf("got %v", err)
			}
			s.Kill()
		})
	}
	for name, strings := range map[string][3]string{"path": {"a\x00", "b", "c"}, "argument": {"a", "b\x00", "c"}, "environment": {"a", "b", "c\x00"}} {
		if s, err := Suspend(strings[0], []string{strings[1]}, []string{strings[2]}, SuspendOptions{}); err == nil {
			s.Kill()
			t.Errorf("a NUL is in the %s", name)
		}
	}
	// One that isn't wanted any more.
	s, err := Suspend(sleep, []string{"sleep", "60"}, nil, SuspendOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.Kill()
}
