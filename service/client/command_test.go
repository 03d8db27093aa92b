// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// grantOf is an answer that grants with these capabilities.
func grantOf(capabilities string) answer {
	return parameters(`{"grant":{"id":"0123456789abcdef","profile":"network","tier":"network","owner":0,"process":7,"created":1,"capabilities":[` +
		capabilities + `],"notEnforced":[]}}`)
}

// shell runs a script with a profile, and returns what it wrote to $out.
func shell(t *testing.T, c *Client, script string, set func(*Command)) (string, syscall.WaitStatus) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	command := c.Command("network", "/bin/sh", "-c", "exec >"+out+"\n"+script)
	if set != nil {
		set(command)
	}
	if err := command.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	status, err := command.Wait()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text)), status
}

func TestCommand(t *testing.T) {
	t.Setenv("LIBBPF_BPF_TOKEN_PATH", "/elsewhere")
	t.Setenv("KEPT", "kept")
	t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	t.Setenv("LISTEN_PIDFDID", "1")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	t.Setenv("SYSTEMD_EXEC_PID", "1")
	const meant = "echo $((LISTEN_PID - $$)) $LISTEN_PIDFDID $((WATCHDOG_PID - $$)) $SYSTEMD_EXEC_PID"
	c := newFake(t, grantOf(`"CAP_BPF","CAP_NET_ADMIN"`)).client(t)
	uid, gid := os.Getuid(), os.Getgid()
	const signals = "grep -E '^Sig(Blk|Ign)' /proc/self/status"
	for _, test := range []struct {
		name, script string
		set          func(*Command)
		want         string
	}{
		{"environment", "echo $KEPT $LIBBPF_BPF_TOKEN_PATH; cat /proc/$$/environ | tr '\\0' '\\n' | grep -c TOKEN_PATH", nil, "kept /sys/fs/bpf\n1"},
		{"own environment", "echo $KEPT $MINE $LIBBPF_BPF_TOKEN_PATH", func(c *Command) { c.Env = []string{"MINE=mine"} }, "mine /sys/fs/bpf"},
		{"capabilities", "grep -E '^Cap(Inh|Amb)' /proc/self/status | cut -f2 | sort -u", nil, "0000008000001000"},
		{"no new privileges are left", "grep NoNewPrivs /proc/self/status | cut -f2", nil, "0"},
		{"ids", "id -u; id -g", nil, fmt.Sprintf("%d\n%d", uid, gid)},
		{"an heir's environment", meant, func(c *Command) { c.Heir = true }, "0 0 1"},
		{"another's environment", strings.ReplaceAll(meant, "$$", "$PPID"), nil, "0 1 0 1"},
		{"root", "id -u; id -g", func(c *Command) { c.Root = true }, "0\n0"},
		{"signals", signals, nil, inherited(t, signals)},
		{"files", "exec ls /proc/self/fd", nil, inherited(t, "exec ls /proc/self/fd")},
		{"process group", "cut -d' ' -f5 /proc/$$/stat", nil, fmt.Sprint(syscall.Getpgrp())},
		{"parent", "cut -d' ' -f4 /proc/$$/stat", nil, fmt.Sprint(os.Getpid())},
		{"namespace", "readlink /proc/self/ns/user /proc/self/ns/mnt | grep -cvxFf - " + ownNamespaces(t), nil, "2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, status := shell(t, c, test.script, test.set)
			if diff := cmp.Diff(test.want, got); diff != "" || status != 0 {
				t.Errorf("status %v: %s", status, diff)
			}
		})
	}
}

// inherited is what a script prints that the test itself runs.
func inherited(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("/bin/sh", "-c", script).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// ownNamespaces writes the names of the test's namespaces to a file.
func ownNamespaces(t *testing.T) string {
	t.Helper()
	var names string
	for _, kind := range []string{"user", "mnt"} {
		name, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		names += name + "\n"
	}
	path := filepath.Join(t.TempDir(), "namespaces")
	if err := os.WriteFile(path, []byte(names), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A sibling is a child of whoever started the test.
func TestSibling(t *testing.T) {
	t.Parallel()
	c := newFake(t, grantOf("")).client(t)
	out := filepath.Join(t.TempDir(), "out")
	command := c.Command("network", "/bin/sh", "-c", "echo $PPID $$ >"+out)
	command.Sibling = true
	if err := command.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%d %d\n", os.Getppid(), command.PID())
	eventually(t, "the command to say whose it is", func() bool {
		text, _ := os.ReadFile(out)
		return string(text) == want
	})
}

// An error of Granted's keeps the command from running.
func TestNotWanted(t *testing.T) {
	t.Parallel()
	c := newFake(t, grantOf("")).client(t)
	marker := filepath.Join(t.TempDir(), "ran")
	for _, sibling := range []bool{false, true} {
		command := c.Command("network", "/bin/touch", marker)
		unwanted := errors.New("not wanted")
		command.Sibling, command.Granted = sibling, func(*Grant) error { return unwanted }
		if err := command.Start(t.Context()); !errors.Is(err, unwanted) {
			t.Errorf("got %v", err)
		}
		if _, err := os.Stat(marker); err == nil {
			t.Error("the command ran")
		}
		if err := syscall.Kill(command.PID(), 0); err == nil && !sibling { // one is a zombie of its parent's
			t.Error("the process is still there")
		}
	}
}

func TestCommandStatus(t *testing.T) {
	t.Parallel()
	c := newFake(t, grantOf("")).client(t)
	if _, status := shell(t, c, "exit 7", nil); status.ExitStatus() != 7 {
		t.Errorf("got %v", status)
	}
	if _, status := shell(t, c, "kill -KILL $$", nil); !status.Signaled() || status.Signal() != syscall.SIGKILL {
		t.Errorf("got %v", status)
	}
}

func TestCommandSignal(t *testing.T) {
	t.Parallel()
	c := newFake(t, grantOf("")).client(t)
	command := c.Command("network", "/bin/sleep", "60")
	if err := command.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := command.Start(t.Context()); err == nil {
		t.Error("started twice")
	}
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() { // all the while, also when it has ended
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				if err := command.Signal(syscall.SIGCONT); err != nil && !errors.Is(err, os.ErrProcessDone) {
					t.Error(err)
					return
				}
			}
		}
	}()
	time.AfterFunc(50*time.Millisecond, func() { _ = command.Signal(syscall.SIGTERM) })
	status, err := command.Wait()
	if err != nil || !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("got %v, error %v", status, err)
	}
	time.Sleep(10 * time.Millisecond)
	close(stop)
	<-stopped
	if err := command.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("got %v", err)
	}
}

// TestNotStarted is not parallel: it counts.
func TestNotStarted(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "ran")
	ended := errors.New("enough")
	notExecutable := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notExecutable, []byte("nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	var notPath *fs.PathError
	for _, test := range []struct {
		name   string
		answer answer
		path   string
		check  func(error) bool
	}{
		{"refused", refusal(brokerInterface+"NotAuthorized", `{"reason":"r","layer":"polkit","remedy":""}`), "", func(err error) bool {
			var refusal *Error
			return errors.As(err, &refusal)
		}},
		{"the broker dies", func(*wire.Request, []*os.File) (any, []*os.File) { return nil, nil }, "", func(err error) bool {
			return err != nil && !errors.As(err, &notPath)
		}},
		{"nonsense", parameters(`{}`), "", func(err error) bool { return errors.Is(err, errBadReply) }},
		{"unknown capability", grantOf(`"CAP_SYS_BOOT"`), "", func(err error) bool { return err != nil }},
		{"not there", grantOf(""), "/nonexistent", func(err error) bool {
			return errors.As(err, &notPath) && errors.Is(err, syscall.ENOENT)
		}},
		{"not executable", grantOf(""), notExecutable, func(err error) bool {
			return errors.As(err, &notPath) && errors.Is(err, syscall.ENOEXEC)
		}},
		{"NUL", grantOf(""), "a\x00b", func(err error) bool { return errors.Is(err, syscall.EINVAL) }},
		{"context ends", func(*wire.Request, []*os.File) (any, []*os.File) {
			time.Sleep(300 * time.Millisecond)
			return nil, nil
		}, "", func(err error) bool { return errors.Is(err, ended) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFake(t, test.answer)
			try := func() {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				defer time.AfterFunc(200*time.Millisecond, func() { cancel(ended) }).Stop()
				c := New(WithSocket(f.socket))
				defer c.Close()
				command := c.Command("network", "/bin/sh", "-c", "touch "+marker)
				if test.path != "" {
					command.Path = test.path
				}
				if err := command.Start(ctx); !test.check(err) {
					t.Errorf("got %v", err)
				}
			}
			before := openFiles(t)
			try()
			f.hangUp()
			eventually(t, "the file descriptors to be closed", func() bool { return openFiles(t) <= before })
			if _, err := os.Stat(marker); err == nil {
				t.Error("the command ran")
			}
			eventually(t, "the process to be gone", func() bool { return len(children(t)) == 0 })
		})
	}
}

func TestGranted(t *testing.T) {
	t.Parallel()
	c := newFake(t, grantOf(`"CAP_BPF"`)).client(t)
	var got *Grant
	_, _ = shell(t, c, "", func(c *Command) { c.Granted = func(g *Grant) error { got = g; return nil } })
	if got == nil || got.ID != "0123456789abcdef" {
		t.Errorf("got %v", got)
	}
}
