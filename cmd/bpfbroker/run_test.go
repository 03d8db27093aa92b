// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// user is a uid without privileges that the tests run bpfbroker with.
const user = 1000

// output collects what a process writes, and can be waited on.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.ReplaceAll(o.text.String(), "\r\n", "\n")
}

// await waits until the text is there.
func (o *output) await(t *testing.T, text string) {
	t.Helper()
	eventually(t, "the output "+text, func() bool { return strings.Contains(o.String(), text) })
}

// eventually waits until something is true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// bpfbroker is a command line for the fake broker at socket. The test binary
// is the program, found where a user without privileges can get at it too.
func bpfbroker(socket string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{"bpfbroker"}, args...)
	cmd.Env = append(os.Environ(), socketVariable+"="+socket)
	cmd.WaitDelay = time.Second
	return cmd
}

// start starts a command and returns its output.
func start(t *testing.T, cmd *exec.Cmd) *output {
	t.Helper()
	o := &output{}
	cmd.Stdout, cmd.Stderr = o, o
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return o
}

// wait waits for a command's end and returns its exit status.
func wait(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

// terminal is the master of a new terminal.
type terminal struct {
	*output
	master *os.File
}

// onTerminal starts a command as the leader of a session on a new terminal.
func onTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{output: &output{}, master: os.NewFile(uintptr(fd), "ptmx")}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	} else if err := slave.Chown(user, user); err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		buffer := make([]byte, 4096)
		for {
			n, err := term.master.Read(buffer)
			_, _ = term.Write(buffer[:n])
			if err != nil { // EIO: nobody has the slave any more
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-finished
		_ = term.master.Close()
	})
	return term
}

// press types a key.
func (term *terminal) press(t *testing.T, key string) {
	t.Helper()
	if _, err := term.master.WriteString(key); err != nil {
		t.Fatal(err)
	}
}

// children are the pids of a process's children.
func children(t *testing.T, pid int) []string {
	t.Helper()
	var all []string
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		data, _ := os.ReadFile(path)
		all = append(all, strings.Fields(string(data))...)
	}
	return all
}

// processState is the letter in /proc/PID/stat.
func processState(pid string) string {
	data, _ := os.ReadFile("/proc/" + pid + "/stat")
	_, after, _ := strings.Cut(string(data), ") ")
	return after[:min(1, len(after))]
}

// awaitEnd waits for a process to end; whether its new parent has noticed
// doesn't count.
func awaitEnd(t *testing.T, pid string) {
	t.Helper()
	eventually(t, "the end of a process", func() bool {
		state := processState(pid)
		return state == "" || state == "Z" || state == "X"
	})
}

// TestSignals has bpfbroker, without a terminal, get signals.
func TestSignals(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			cmd := bpfbroker(f.socket, "run", "-p", "network", "tell-signals")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			o := start(t, cmd)
			o.await(t, "ready\n")
			if err := cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			if status := wait(t, cmd); status != 7 {
				t.Errorf("got exit status %d", status)
			}
			if diff := cmp.Diff(fmt.Sprintf("ready\nsignal %s\nend\n", s), o.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestTerminalSignals presses keys.
func TestTerminalSignals(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	for _, test := range []struct {
		name, want string
		do         func(*testing.T, *terminal, *exec.Cmd)
	}{
		{"Ctrl-C", "^Csignal interrupt\n", func(t *testing.T, term *terminal, _ *exec.Cmd) { term.press(t, "\x03") }},
		{"Ctrl-\\", "^\\signal quit\n", func(t *testing.T, term *terminal, _ *exec.Cmd) { term.press(t, "\x1c") }},
		{"size", "signal window changed\n", func(t *testing.T, term *terminal, _ *exec.Cmd) {
			if err := unix.IoctlSetWinsize(int(term.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 5, Col: 5}); err != nil {
				t.Fatal(err)
			}
		}},
		{"kill", "signal terminated\n", func(t *testing.T, _ *terminal, cmd *exec.Cmd) {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := bpfbroker(f.socket, "run", "-p", "network", "tell-signals")
			term := onTerminal(t, cmd)
			term.await(t, "ready\n")
			test.do(t, term, cmd)
			if status := wait(t, cmd); status != 7 {
				t.Errorf("got exit status %d", status)
			}
			term.await(t, "end\n")
			if diff := cmp.Diff("ready\n"+test.want+"end\n", term.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestBackground has bpfbroker in the background of a terminal, where a key
// doesn't reach it but kill does.
func TestBackground(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := exec.Command("bash", "--norc", "-m", "-c",
		"bpfbroker run -p network tell-signals >out & while ! grep -qs ready out; do :; done; kill -INT $!; wait $!; echo status $?; cat out")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), socketVariable+"="+f.socket)
	term := onTerminal(t, cmd)
	term.await(t, "status 7")
	term.await(t, "end")
	if got := strings.Count(term.String(), "signal interrupt"); got != 1 {
		t.Errorf("got the signal %d times: %s", got, term)
	}
	wait(t, cmd)
}

// TestJobControl stops and continues it from a shell.
func TestJobControl(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := exec.Command("bash", "--norc", "-m", "-c",
		"bpfbroker run -p network -- sh -c 'echo ready; exec sleep 60'; echo stopped with $?; fg >/dev/null; echo status $?")
	cmd.Env = append(os.Environ(), socketVariable+"="+f.socket)
	term := onTerminal(t, cmd)
	term.await(t, "ready\n")
	job := children(t, cmd.Process.Pid)[0]
	pid, _ := strconv.Atoi(job)
	eventually(t, "the command's execution", func() bool { return len(children(t, pid)) == 1 })
	command := children(t, pid)[0]
	term.press(t, "\x1a")
	// The shell goes on with its foreground job at once.
	term.await(t, "stopped with 148\n")
	eventually(t, "both to go on", func() bool { return processState(job) == "S" && processState(command) == "S" })
	time.Sleep(100 * time.Millisecond)
	term.press(t, "\x03")
	term.await(t, "status 130\n")
	wait(t, cmd)
}

// TestTerminalUntouched compares the terminal's settings with those before.
func TestTerminalUntouched(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := exec.Command("sh", "-c", "stty -g; bpfbroker run -p network -- sh -c 'stty -g; tty'; stty -g; echo end")
	cmd.Env = append(os.Environ(), socketVariable+"="+f.socket)
	term := onTerminal(t, cmd)
	term.await(t, "end\n")
	wait(t, cmd)
	lines := strings.Split(term.String(), "\n")
	if len(lines) < 5 || lines[0] != lines[1] || lines[0] != lines[3] || !strings.HasPrefix(lines[2], "/dev/pts/") {
		t.Errorf("got %q", lines)
	}
}

// TestNohup has the command ignore what bpfbroker was made to ignore.
func TestNohup(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := exec.Command("sh", "-c", "trap '' HUP; exec bpfbroker run -p network grep SigIgn /proc/self/status")
	cmd.Env = append(os.Environ(), socketVariable+"="+f.socket)
	o := start(t, cmd)
	if status := wait(t, cmd); status != 0 || !strings.HasSuffix(o.String(), "1\n") {
		t.Errorf("status %d: %s", status, o)
	}
}

// TestInterrupted ends bpfbroker while the broker is asking somebody.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 10)
	f := newFake(t, func(request) any { asked <- struct{}{}; select {} })
	marker := filepath.Join(t.TempDir(), "ran")
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGKILL} {
		cmd := bpfbroker(f.socket, "run", "-p", "network", "touch", marker)
		o := start(t, cmd)
		<-asked
		suspended := children(t, cmd.Process.Pid)
		if len(suspended) != 1 {
			t.Errorf("has %d children", len(suspended))
		}
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		want := 128 + int(s)
		if s == syscall.SIGKILL {
			want = -1
		}
		if status := wait(t, cmd); status != want {
			t.Errorf("got exit status %d, want %d", status, want)
		}
		if o.String() != "" {
			t.Errorf("printed %q", o)
		}
		awaitEnd(t, suspended[0])
	}
	if _, err := os.Stat(marker); err == nil {
		t.Error("the command ran")
	}
}

// TestEarlySignal has a signal come while bpfbroker waits for the broker, which
// doesn't end it: it is the command's, which dies of it.
func TestEarlySignal(t *testing.T) {
	t.Parallel()
	asked, granted := make(chan struct{}), make(chan struct{})
	f := newFake(t, func(r request) any {
		close(asked)
		<-granted
		return answers(r)
	})
	cmd := bpfbroker(f.socket, "run", "-p", "network", "sleep", "60")
	start(t, cmd)
	<-asked
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // Go hands it on
	close(granted)
	if status := wait(t, cmd); status != 128+int(syscall.SIGUSR1) {
		t.Errorf("got exit status %d", status)
	}
}

// TestLater looks at bpfbroker while the command runs.
func TestLater(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := bpfbroker(f.socket, "run", "-p", "network", "--", "sh", "-c", "echo ready; read line")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	o := start(t, cmd)
	o.await(t, "ready\n")
	pid := cmd.Process.Pid
	if got := children(t, pid); len(got) != 1 {
		t.Errorf("has the children %v", got)
	}
	eventually(t, "the connection's end", func() bool { return f.connections.Load() == 0 })
	before := cpuTime(t, pid)
	time.Sleep(300 * time.Millisecond)
	if spent := cpuTime(t, pid) - before; spent > 1 {
		t.Errorf("bpfbroker spent %d ticks on waiting", spent)
	}
	_ = in.Close()
	if status := wait(t, cmd); status != 1 {
		t.Errorf("got exit status %d", status)
	}
	want := []request{{
		Method:      "org.bpfbroker.Broker.MountToken",
		Parameters:  map[string]any{"profile": "network", "processFileDescriptor": 0.0, "path": "/sys/fs/bpf", "allowInteractiveAuthentication": true},
		interactive: true, files: 1,
	}}
	if diff := cmp.Diff(want, f.seen(), cmp.AllowUnexported(request{})); diff != "" {
		t.Error(diff)
	}
}

// cpuTime is user and system time in clock ticks.
func cpuTime(t *testing.T, pid int) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(after)
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return user + system
}

// TestKilled: a command outlives bpfbroker, as it would any other parent.
func TestKilled(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := bpfbroker(f.socket, "run", "-p", "network", "tell-signals")
	cmd.WaitDelay = 0
	o := start(t, cmd)
	o.await(t, "ready\n")
	_ = cmd.Process.Kill()
	if status := wait(t, cmd); status != -1 {
		t.Errorf("got exit status %d", status)
	}
	if diff := cmp.Diff("ready\nend\n", o.String()); diff != "" {
		t.Error(diff)
	}
}

// asUser makes a command run without privileges.
func asUser(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	// Under "go test -cover" the program writes into a directory, and complains
	// on standard error if it can't.
	cmd.Env = append(cmd.Env, "GOCOVERDIR="+openDirectory(t))
	return cmd
}

// openDirectory makes a directory that every user can use.
func openDirectory(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bpfbroker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestUnprivileged(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	for _, test := range []struct{ name, script, want string }{
		{"ids", "id -u; id -g", "1000\n1000\n"},
		{"capabilities", "grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status | cut -f2 | sort -u", "0000008000001000\n"},
		{"one uid", "grep -c . /proc/self/uid_map; tr -s ' ' </proc/self/uid_map", "1\n 1000 1000 1\n"},
		{"zombies", "for pid in $(cat /proc/$PPID/task/*/children); do cut -d' ' -f3 /proc/$pid/stat; done | grep -c Z", "0\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := asUser(t, bpfbroker(f.socket, "run", "-p", "network", "--", "sh", "-c", test.script))
			o := start(t, cmd)
			wait(t, cmd)
			if diff := cmp.Diff(test.want, o.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestLimits: Go raises the soft limit on open files for itself alone.
func TestLimits(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	cmd := exec.Command("sh", "-c", "ulimit -Sn 321; ulimit -n; exec bpfbroker run -p network -- sh -c 'ulimit -n'")
	cmd.Env = append(os.Environ(), socketVariable+"="+f.socket)
	o := start(t, cmd)
	wait(t, cmd)
	if diff := cmp.Diff("321\n321\n", o.String()); diff != "" {
		t.Error(diff)
	}
}

// pkttyagent is a stand-in: it tells that it is there, and when it ends.
const pkttyagent = `#!/bin/sh
echo "agent $*" >&2
trap 'echo agent ends >&2; exit' TERM
eval "exec $2>&-"
while :; do sleep 0.01; done
`

// TestAgent has polkit ask for a password on a terminal.
func TestAgent(t *testing.T) {
	t.Parallel()
	dir := openDirectory(t)
	if err := os.WriteFile(filepath.Join(dir, agentProgram), []byte(pkttyagent), 0o755); err != nil {
		t.Fatal(err)
	}
	f := newFake(t, func(r request) any {
		switch {
		case r.Parameters["profile"] == "asked" && !r.interactive:
			return refusal{"InteractionRequired", "cannot grant asked: somebody has to authenticate", "polkit", "have an agent"}
		case r.Parameters["profile"] == "denied" && !r.interactive:
			return refusal{"InteractionRequired", "cannot grant denied: somebody has to authenticate", "polkit", "have an agent"}
		case r.Parameters["profile"] == "denied":
			return refusal{"NotAuthorized", "cannot grant denied: dismissed", "polkit", "authenticate"}
		}
		return map[string]any{"grant": grant()}
	})
	const asks = "agent --notify-fd 3 --fallback\nagent ends\n"
	for _, test := range []struct {
		name   string
		args   []string
		status int
		want   string
	}{
		{"not needed", []string{"run", "-p", "free", "echo", "ran"}, 0, "ran\n"},
		{"needed", []string{"run", "-p", "asked", "echo", "ran"}, 0, asks + "ran\n"},
		{"denied", []string{"run", "-p", "denied", "echo", "ran"}, 77,
			asks + "bpfbroker: cannot grant denied: dismissed (polkit)\n  To change it: authenticate\n"},
		{"not wanted", []string{"run", "-p", "asked", "--no-ask-password", "echo", "ran"}, 77,
			"bpfbroker: cannot grant asked: somebody has to authenticate (polkit)\n  To change it: have an agent\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := asUser(t, bpfbroker(f.socket, test.args...))
			cmd.Env = append(cmd.Env, "PATH="+dir+":/usr/bin:/bin")
			term := onTerminal(t, cmd)
			if status := wait(t, cmd); status != test.status {
				t.Errorf("got exit status %d, want %d", status, test.status)
			}
			eventually(t, "the output "+test.want, func() bool { return len(term.String()) >= len(test.want) })
			if diff := cmp.Diff(test.want, term.String()); diff != "" {
				t.Error(diff)
			}
		})
	}

	// Ctrl-C while it asks leaves nothing.
	t.Run("interrupted", func(t *testing.T) {
		t.Parallel()
		f := newFake(t, func(r request) any {
			if r.interactive {
				select {}
			}
			return refusal{"InteractionRequired", "cannot grant asked: somebody has to authenticate", "polkit", "have an agent"}
		})
		cmd := asUser(t, bpfbroker(f.socket, "run", "-p", "asked", "echo", "ran"))
		cmd.Env = append(cmd.Env, "PATH="+dir+":/usr/bin:/bin")
		term := onTerminal(t, cmd)
		eventually(t, "the second request", func() bool { return len(f.seen()) == 2 })
		// The first request's process is killed, and reaped a little later.
		var started []string
		eventually(t, "an agent and one suspended process", func() bool {
			started = children(t, cmd.Process.Pid)
			return len(started) == 2
		})
		term.press(t, "\x03")
		if status := wait(t, cmd); status != 130 {
			t.Errorf("got exit status %d", status)
		}
		for _, pid := range started {
			awaitEnd(t, pid)
		}
	})
}

// TestColor prints to a terminal.
func TestColor(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	for _, test := range []struct{ name, env, want string }{
		{"color", "NO_COLOR=", "basic   basic     \x1b[32myes\x1b[0m       Maps & sockets\n"},
		{"no color", "NO_COLOR=1", "basic   basic     yes       Maps & sockets\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := bpfbroker(f.socket, "profiles", "--no-pager")
			cmd.Env = append(cmd.Env, "TERM=xterm", test.env)
			term := onTerminal(t, cmd)
			term.await(t, test.want)
			wait(t, cmd)
		})
	}
	t.Run("pager", func(t *testing.T) {
		t.Parallel()
		cmd := bpfbroker(f.socket, "profiles")
		cmd.Env = append(cmd.Env, "SYSTEMD_PAGER=sed s/^/paged:/", "NO_COLOR=1")
		term := onTerminal(t, cmd)
		term.await(t, "paged:basic ")
		wait(t, cmd)
	})
	t.Run("json", func(t *testing.T) {
		t.Parallel()
		cmd := bpfbroker(f.socket, "profiles", "-j", "--no-pager")
		term := onTerminal(t, cmd)
		term.await(t, "\n                \"name\": \"basic\",\n")
		wait(t, cmd)
	})
}

// TestFull prints to a device that takes nothing.
func TestFull(t *testing.T) {
	t.Parallel()
	f := newFake(t, answers)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	cmd := bpfbroker(f.socket, "profiles")
	cmd.Stdout = full
	if status := wait(t, startOnly(t, cmd)); status != 1 {
		t.Errorf("got exit status %d", status)
	}
}

func startOnly(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}
