// SPDX-License-Identifier: Apache-2.0

// Package scenarios drives a whole system from outside, only by what its users
// have: the product's commands, varlinkctl, systemctl, the journal, and
// programs of users' own.
package scenarios

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

const (
	broker = "/run/bpfbroker/org.bpfbroker.Broker"
	object = "/usr/local/lib/count.bpf.o"
)

var (
	machine *machines.Machine
	// machineContext is for what no test's end is to stop.
	machineContext context.Context
)

func TestMain(m *testing.M) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	code, err := testMain(ctx, m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "scenarios:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func testMain(ctx context.Context, m *testing.M) (code int, err error) {
	machineContext = ctx
	machine, err = machines.Boot(ctx, machines.Product(ctx, kernel))
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, machine.Close()) }()
	// alice may have the profile "network", by an example of the documentation;
	// bob may have nothing.
	out, err := machine.Command(ctx, "root", "sh", "-ec", `gpasswd --add alice bpf
cp /usr/share/doc/bpfbroker/polkit/`+machineRules+` /etc/polkit-1/rules.d/
echo root:secret | chpasswd
# What the daemon opens once and keeps is open before anybody counts.
runuser -u alice -- bpfbroker run -p network -- true`).CombinedOutput()
	if err != nil {
		return 1, fmt.Errorf("%w: %s", err, out)
	}
	return m.Run(), nil
}

// result is what a command did.
type result struct {
	out, err string
	code     int
}

// run runs a shell command as a user of the machine.
func run(t *testing.T, user, command string) result {
	t.Helper()
	touched = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), (1+slow)*time.Minute) // cleanups run commands too
	defer cancel()
	cmd := machine.Command(ctx, user, "bash", "-c", command)
	var out, err strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &err
	code := exitCode(t, cmd.Run())
	return result{out.String(), err.String(), code}
}

// transcript keeps what a command writes, for those who read it meanwhile.
type transcript struct {
	mutex sync.Mutex
	text  strings.Builder
}

func (o *transcript) Write(data []byte) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.text.Write(data)
}

func (o *transcript) String() string {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.text.String()
}

// exitCode is the exit status of a command that ended with err.
func exitCode(t *testing.T, err error) int {
	t.Helper()
	exit := (*exec.ExitError)(nil)
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	t.Fatal(err)
	return -1
}

// login gives a user a session at the machine's seat until the test's end.
func login(t *testing.T, user string) *machines.Session {
	t.Helper()
	touched = true
	session, err := machine.Login(t.Context(), user)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := session.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return session
}

// within has a shell command killed that takes more seconds than that on a
// real machine.
func within(seconds int, command string) string {
	return fmt.Sprintf("timeout --foreground %d %s", slow*seconds, command)
}

// must runs a shell command that has to succeed, and returns what it printed.
func must(t *testing.T, user, command string) string {
	t.Helper()
	r := run(t, user, command)
	if r.code != 0 {
		t.Fatalf("%s: %s: exit status %d\n%s%s\n%s", user, command, r.code, r.out, r.err, brokerJournal(t))
	}
	return r.out
}

// refused runs a shell command that has to fail with a status, and with a text
// on standard error and nothing on standard output.
func refused(t *testing.T, user, command string, code int, text string) {
	t.Helper()
	r := run(t, user, command)
	if r.code != code || !strings.Contains(r.err, text) || r.out != "" {
		t.Errorf("%s: %s: exit status %d, want %d with %q on standard error\nout: %s\nerr: %s", user, command, r.code, code, text, r.out, r.err)
	}
}

func brokerJournal(t *testing.T) string {
	t.Helper()
	journal, err := machine.Journal(context.WithoutCancel(t.Context()), "--unit=bpfbroker.service", "--output=cat", "--lines=8")
	if err != nil {
		return err.Error()
	}
	return journal
}

// journalHas waits for a record of the broker's, by its fields.
func journalHas(t *testing.T, fields ...string) string {
	t.Helper()
	var found string
	eventually(t, "a record "+strings.Join(fields, " ")+" in the journal", func() bool {
		var err error
		found, err = machine.Journal(t.Context(), append([]string{"--output=cat", "--quiet", "--unit=bpfbroker.service"}, fields...)...)
		return err == nil && found != ""
	})
	return found
}

// eventually waits for something that has to become true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	const patience = slow * 20 * time.Second
	for deadline := time.Now().Add(patience); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s\n%s", what, patience, brokerJournal(t))
		}
	}
}

// start starts a command of a user's that goes on until the test's end, and
// waits for what it prints first.
func start(t *testing.T, user, command string) (cmd *exec.Cmd, first string) {
	t.Helper()
	touched = true
	// The test's own context ends before its cleanups.
	cmd = machine.Command(context.WithoutCancel(t.Context()), user, "bash", "-c", command)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = machines.Signal(cmd, syscall.SIGTERM) // which bpfbroker passes on
		hard := time.AfterFunc(slow*5*time.Second, func() { _ = machines.Signal(cmd, syscall.SIGKILL) })
		defer hard.Stop()
		_ = cmd.Wait()
	})
	buffer := make([]byte, 4096)
	n, err := out.Read(buffer)
	if err != nil {
		t.Fatalf("%s: %s: %v\n%s", user, command, err, brokerJournal(t))
	}
	return cmd, string(buffer[:n])
}

// traces counts what the product can leave behind.
type traces struct {
	mounts, files, processes, rows, guarded int
}

// look counts the traces in the machine: mounts of BPF file systems, in whatever
// namespace, the daemon's descriptors and helper processes, the ledger, and what
// the guard knows. The daemon runs then, and has asked polkit.
func look(t *testing.T) (n traces) {
	t.Helper()
	counts := must(t, "root", `shopt -s nullglob
setpriv --reuid alice --regid alice --init-groups bpfbroker --no-ask-password list --all >/dev/null 2>&1
grep -hs ' - bpf ' /proc/[0-9]*/mountinfo | sort -u -k 1,1 | wc -l
files=(/proc/$(systemctl show -P MainPID bpfbroker.service)/fd/*); echo ${#files[@]}
mapfile processes </sys/fs/cgroup/system.slice/bpfbroker.service/cgroup.procs; echo ${#processes[@]}
rows=(/run/bpfbroker/grants/*); echo ${#rows[@]}
bpftool map dump pinned /sys/fs/bpf/bpfbroker/guard/maps/grants 2>/dev/null | grep -c '"key"' || true`)
	if _, err := fmt.Sscan(counts, &n.mounts, &n.files, &n.processes, &n.rows, &n.guarded); err != nil {
		t.Fatalf("%v: %s", err, counts)
	}
	touched = false
	return n
}

var (
	// touched says that something was done since the last look, which was seen.
	touched = true
	seen    traces
)

// leavesNothing checks that a test, and what it did to the daemon, leaves no
// more behind than there was.
func leavesNothing(t *testing.T) {
	t.Helper()
	if touched {
		seen = look(t)
	}
	before := seen
	t.Cleanup(func() {
		for range 100 {
			seen = look(t)
			if seen.mounts <= before.mounts && seen.files <= before.files && seen.processes <= before.processes && seen.rows <= before.rows && seen.guarded <= before.guarded {
				return
			}
			time.Sleep(slow * 200 * time.Millisecond)
		}
		t.Errorf("left behind: before %+v, after %+v", before, seen)
	})
}
