// SPDX-License-Identifier: Apache-2.0

package machines_test

import (
	"bufio"
	"context"
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
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// shared is the machine of the tests that need no other.
var shared *machines.Machine

func TestMain(m *testing.M) {
	// This program also plays other parts, named by its first argument.
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "perf-event-open":
			os.Exit(perfEventOpen())
		case "boot-and-hang":
			os.Exit(bootAndHang())
		}
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if shared, err = machines.Boot(ctx, machines.Options{Install: installSelf, Kernel: kernel}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if err := shared.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// installSelf puts this program into a machine, as /usr/bin/self.
func installSelf(root string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return exec.Command("install", self, filepath.Join(root, "usr/bin/self")).Run()
}

func perfEventOpen() int {
	// A software clock, which every kernel has, of this process's own.
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_TASK_CLOCK, Bits: unix.PerfBitExcludeKernel}
	if _, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func bootAndHang() int {
	m, err := machines.Boot(context.Background(), machines.Options{Kernel: kernel})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(m.RootPID())
	select {}
}

func TestCommand(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		user    string
		command []string
		output  string
		code    int
	}{
		{"root", "root", []string{"id"}, "uid=0(root) gid=0(root) groups=0(root)\n", 0},
		{"alice", "alice", []string{"id"}, "uid=1000(alice) gid=1000(alice) groups=1000(alice)\n", 0},
		{"bob", "bob", []string{"id"}, "uid=1001(bob) gid=1001(bob) groups=1001(bob)\n", 0},
		{"directory", "alice", []string{"pwd"}, "/\n", 0},
		{"environment", "alice", []string{"env"}, "PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games\nLANG=C.UTF-8\n" +
			"USER=alice\nLOGNAME=alice\nHOME=/home/alice\nSHELL=/bin/bash\n", 0},
		{"capabilities", "alice", []string{"sh", "-c", "grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status | cut -f2 | sort -u"},
			"0000000000000000\n", 0},
		{"init", "root", []string{"cat", "/proc/1/comm"}, "systemd\n", 0},
		{"host name", "alice", []string{"uname", "-n"}, "machine\n", 0},
		{"network", "alice", []string{"sh", "-c", "ls /sys/class/net; cat /sys/class/net/lo/flags"}, "lo\n0x9\n", 0},
		{"control group", "alice", []string{"grep", "^0:", "/proc/self/cgroup"}, "0::/system.slice/machine-command.service\n", 0},
		{"arguments", "bob", []string{"printf", "<%s>", "a b", "", "$HOME", "--"}, "<a b><><$HOME><-->", 0},
		{"no input", "alice", []string{"cat"}, "", 0},
		{"exit code", "alice", []string{"sh", "-c", "exit 77"}, "", 77},
		{"exit code of root", "root", []string{"sh", "-c", "exit 3"}, "", 3},
		{"no such program", "alice", []string{"nonexistent"}, "", 127},
		{"no such program of root", "root", []string{"nonexistent"}, "", 127},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := shared.Command(t.Context(), test.user, test.command[0], test.command[1:]...)
			output, err := cmd.Output()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.output, string(output)); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
			if code := cmd.ProcessState.ExitCode(); code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
		})
	}
}

func TestCommandOfUnknownUser(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"", "mallory", "1000", "alice:x", "root\nalice"} {
		if err := shared.Command(t.Context(), user, "true").Run(); err == nil {
			t.Errorf("user %q: no error", user)
		}
	}
}

func TestSignal(t *testing.T) {
	t.Parallel()
	cmd := shared.Command(t.Context(), "alice", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done")
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "ready\n" {
		t.Fatal(line, err)
	}
	if err := machines.Signal(cmd, syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 5 {
		t.Errorf("%v, want exit code 5", cmd.ProcessState)
	}
}

func TestCancelledCommandIsKilledInside(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := shared.Command(ctx, "bob", "sh", "-c", "echo $$; exec sleep infinity")
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(output).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("no error from a cancelled command")
	}
	if err := shared.Command(t.Context(), "root", "test", "-e", "/proc/"+strings.TrimSpace(line)).Run(); err == nil {
		t.Error("the process still runs")
	}
}

// systemTest is a command that a user of the machine can run, or cannot.
type systemTest struct {
	name    string
	user    string
	command string
	refused bool
}

// TestSystem holds what scenarios rely on.
func TestSystem(t *testing.T) {
	t.Parallel()
	for _, test := range append([]systemTest{
		{"running", "root", `test "$(systemctl is-system-running)" = running`, false},
		{"systemd 262 or later", "alice", `test "$(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p')" -ge 262`, false},
		{"bus", "alice", "busctl --no-pager call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus GetId", false},
		{"varlink", "alice", "varlinkctl info /run/systemd/io.systemd.Hostname", false},
		{"polkit says yes to root", "root", "pkcheck --process $$ --action-id org.freedesktop.login1.reboot", false},
		{"polkit says no to alice", "alice", "pkcheck --process $$ --action-id org.freedesktop.login1.set-wall-message", true},
		{"user namespace", "alice", "unshare -Urm true", false},
		{"proc in a user namespace", "alice", "unshare -Urmpf --mount-proc true", false},
		{"sysfs in a user namespace", "alice", "unshare -Urmn mount -t sysfs none /sys", false},
		{"bpffs", "root", `test "$(stat -fc %T /sys/fs/bpf)" = bpf_fs && unshare -m mount -t bpf none /sys/fs/bpf`, false},
		{"bpf", "root", "bpftool map create /sys/fs/bpf/machines_test type array key 4 value 4 entries 1 name machines_test && rm /sys/fs/bpf/machines_test", false},
		{"no bpf for alice", "alice", "/usr/sbin/bpftool map create /sys/fs/bpf/x type array key 4 value 4 entries 1 name x", true},
		{"group bpf is empty", "root", `test "$(getent group bpf | cut -d: -f4)" = ""`, false},
	}, systemTests...) {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			output, err := shared.Command(t.Context(), test.user, "sh", "-c", test.command).CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if (err != nil) != test.refused {
				t.Errorf("%v, want refused = %v\n%s", err, test.refused, output)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	const path = "/etc/machines test/folder/file"
	for _, content := range []string{"one\n", "", "\x00\xff"} {
		if err := shared.WriteFile(t.Context(), path, 0o640, []byte(content)); err != nil {
			t.Fatal(err)
		}
		data, err := shared.ReadFile(t.Context(), path)
		if err != nil || string(data) != content {
			t.Errorf("%q, %v, want %q", data, err, content)
		}
	}
	output, err := shared.Command(t.Context(), "root", "stat", "-c", "%a %U", path).Output()
	if string(output) != "640 root\n" {
		t.Errorf("%q, %v", output, err)
	}
	if _, err := shared.ReadFile(t.Context(), "/nonexistent"); err == nil {
		t.Error("no error from a missing file")
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	identifier := fmt.Sprintf("machines-test-%d", time.Now().UnixNano())
	if err := shared.Command(t.Context(), "alice", "systemd-cat", "-t", identifier, "echo", "hello").Run(); err != nil {
		t.Fatal(err)
	}
	text, err := shared.Journal(t.Context(), "--identifier="+identifier, "--output=cat")
	if text != "hello\n" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
}

func TestLogin(t *testing.T) {
	t.Parallel()
	session, err := shared.Login(t.Context(), "alice")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{
		`test "$(loginctl show-session --property=Active --value "$XDG_SESSION_ID")" = yes`,
		`test "$(systemctl --user is-system-running --wait)" = running`,
		`test "$(systemd-run --user --wait --quiet --pipe id -un)" = alice`,
		// Allowed to active local sessions, and to nobody else.
		"pkcheck --process $$ --action-id org.freedesktop.login1.suspend",
	} {
		if output, err := session.Command(t.Context(), "sh", "-c", command).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", command, err, output)
		}
	}
	if err := session.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := shared.Login(t.Context(), "mallory"); err == nil {
		t.Error("an unknown user can log in")
	}
}

// killOwner boots a machine in another process, kills that, and waits for the machine's end.
func killOwner(t *testing.T) (owner int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "boot-and-hang")
	cmd.Stderr = os.Stderr
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(output).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	leader, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	awaitEnd(t, leader)
	return cmd.Process.Pid
}

// leavesNothing runs something that is to leave nothing on the host. No other test may run meanwhile, as it counts what the
// whole process has.
func leavesNothing(t *testing.T, run func(t *testing.T)) {
	t.Helper()
	before := traces(t)
	run(t)
	diff := cmp.Diff(before, traces(t))
	// Where the host's systemd made the control group, it removes it in its own time.
	for deadline := time.Now().Add(5 * time.Second); diff != "" && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		diff = cmp.Diff(before, traces(t))
	}
	if diff != "" {
		t.Errorf("traces (-before +after):\n%s", diff)
	}
}

// boot boots a machine that ends with the test, and gives its journal to a test that fails.
func boot(t *testing.T, options machines.Options) *machines.Machine {
	t.Helper()
	m, err := machines.Boot(context.WithoutCancel(t.Context()), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() }) // where its error matters, the test has looked at it
	return m
}

// traces returns what a machine could leave on the host, as far as it can only be this process's.
func traces(t *testing.T) map[string][]string {
	t.Helper()
	descriptors, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var children []string
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		data, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that has ended
		}
		children = append(children, strings.Fields(string(data))...)
	}
	slices.Sort(children)
	run, err := os.ReadDir("/run/systemd/nspawn")
	if err != nil {
		t.Fatal(err)
	}
	root, err := machines.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cache, err := filepath.Glob(filepath.Join(filepath.Dir(root), "*", ""))
	if err != nil {
		t.Fatal(err)
	}
	machine, err := os.ReadDir(filepath.Join(filepath.Dir(root), "machine"))
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]string{
		"mounts":         strings.Split(readFile(t, "/proc/self/mountinfo"), "\n"),
		"descriptors":    {strconv.Itoa(len(descriptors))},
		"children":       children,
		"control groups": groups(t, fmt.Sprintf("bpfbroker-%d-", os.Getpid())),
		"run-time files": {fmt.Sprint(run)},
		"cache":          cache,
		"mount point":    {fmt.Sprint(machine)},
	}
}

// groups returns the host's control groups whose names begin with prefix.
func groups(t *testing.T, prefix string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, entry os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil {
			return err
		}
		if entry.IsDir() && strings.HasPrefix(entry.Name(), prefix) {
			found = append(found, path)
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// awaitEnd waits until there is no process pid any more.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			return
		}
	}
	t.Fatalf("process %d still exists", pid)
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
