// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/bpfbroker/bpfbroker/test/machines/internal/agent"
)

// Command returns a command for user of the machine, with the user's groups and a clean environment, in "/". It belongs to
// a system service and to no session, like a cron job; see Login for the other. The exit code is the command's own, 127 if
// there is no such program. What it starts ends with it only if it sees to that. Cancelling ctx kills the command.
// If the user doesn't exist, the command fails.
func (m *Machine) Command(ctx context.Context, user string, name string, args ...string) *exec.Cmd {
	return m.command(ctx, m.commands, user, nil, name, args)
}

// command returns a command that runs in the given control group, with env added to the user's environment.
func (m *Machine) command(ctx context.Context, group commandGroup, user string, env []string, name string, args []string) *exec.Cmd {
	line := append([]string{name}, args...)
	var cmd *exec.Cmd
	if m.emulated {
		cmd = m.emulatedCommand(ctx, agent.Command{User: user, Group: group.path, Env: env, Line: line})
	} else {
		cmd = m.containedCommand(ctx, group, user, env, line)
	}
	cmd.Dir = "/"
	cmd.Cancel = func() error { return Signal(cmd, syscall.SIGKILL) }
	cmd.WaitDelay = closeTime // what the command started may hold its output open for good
	select {
	case <-m.ended:
		cmd.Err = errors.New("the test machine is closed")
	default:
	}
	return cmd
}

// containedCommand returns a process that enters a container and is the command there.
func (m *Machine) containedCommand(ctx context.Context, group commandGroup, user string, env, command []string) *exec.Cmd {
	// Few programs, as each costs a millisecond: root needs no change of user.
	line := []string{"--target", strconv.Itoa(m.leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"}
	account, err := m.account(user)
	if user != "root" {
		line = append(line, "setpriv", "--reuid", strconv.Itoa(int(account.UID)), "--regid", strconv.Itoa(int(account.GID)),
			"--init-groups", "--inh-caps=-all", "--")
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(line, command...)...)
	cmd.Env = append(account.Env(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.dir.Fd())}
	if err != nil {
		cmd.Err = err
	}
	return cmd
}

// commandGroup is a control group of the machine's.
type commandGroup struct {
	path string
	dir  *os.File // which an emulated machine's has not
}

// openGroup returns the control group at a path below the machine's /sys/fs/cgroup.
func (m *Machine) openGroup(path string) (group commandGroup, err error) {
	group.path = path
	if !m.emulated {
		group.dir, err = os.Open(m.inside("/sys/fs/cgroup" + path))
	}
	return group, err
}

func (g commandGroup) close() {
	if g.dir != nil {
		g.dir.Close()
	}
}

// Signal sends a signal to the program that a started command of a machine runs. The command's own Process is not that
// program: it waits for it on the host.
func Signal(cmd *exec.Cmd, signal syscall.Signal) error {
	if cmd.Args[0] == commandName {
		if signal == syscall.SIGKILL {
			signal = agent.Kill
		}
		return cmd.Process.Signal(signal) // which passes it on
	}
	pid := strconv.Itoa(cmd.Process.Pid)
	children, err := os.ReadFile(filepath.Join("/proc", pid, "task", pid, "children"))
	if err != nil {
		return err
	}
	child := strings.Fields(string(children))
	if len(child) == 0 {
		// It has not got that far, or has just ended.
		return cmd.Process.Signal(signal)
	}
	number, err := strconv.Atoi(child[0])
	if err != nil {
		return err
	}
	return syscall.Kill(number, signal)
}

// account looks a user of a container up.
func (m *Machine) account(user string) (agent.Account, error) {
	data, err := os.ReadFile(m.inside("/etc/passwd"))
	if err != nil {
		return agent.Account{}, err
	}
	return agent.FindAccount(data, user)
}

// output runs a command as the machine's root and returns its standard output, or an error with its standard error.
func (m *Machine) output(ctx context.Context, input []byte, name string, args ...string) ([]byte, error) {
	cmd := m.Command(ctx, "root", name, args...)
	if input != nil {
		cmd.Stdin = bytes.NewReader(input)
	}
	data, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return data, err
}

// Journal returns what journalctl prints with these arguments, after everything sent to the journal so far has got there.
func (m *Machine) Journal(ctx context.Context, args ...string) (string, error) {
	if _, err := m.output(ctx, nil, "journalctl", "--sync"); err != nil {
		return "", fmt.Errorf("cannot write out the test machine's journal: %w", err)
	}
	output, err := m.output(ctx, nil, "journalctl", append([]string{"--no-pager", "--quiet"}, args...)...)
	if err != nil {
		return "", fmt.Errorf("cannot read the test machine's journal: %w", err)
	}
	return string(output), nil
}

// ReadFile returns the content of a file of the machine.
func (m *Machine) ReadFile(ctx context.Context, path string) ([]byte, error) {
	data, err := m.output(ctx, nil, "cat", "--", path)
	if err != nil {
		return nil, fmt.Errorf("cannot read a file of the test machine: %w", err)
	}
	return data, nil
}

// WriteFile makes or replaces a file of the machine, root's, with the given mode, and the directories that it needs.
func (m *Machine) WriteFile(ctx context.Context, path string, mode os.FileMode, data []byte) error {
	if data == nil {
		data = []byte{}
	}
	if _, err := m.output(ctx, data, "install", "-D", "--mode", strconv.FormatUint(uint64(mode.Perm()), 8), "--", "/dev/stdin", path); err != nil {
		return fmt.Errorf("cannot write a file of the test machine: %w", err)
	}
	return nil
}

// Session is a user's login session at the machine's seat.
type Session struct {
	machine *Machine
	user    string
	unit    string
	group   commandGroup
	env     []string
}

// Login opens a session for user and makes it the active one of the machine's seat: local and active to polkit, with a user
// manager and a session bus. A user has at most one; close it before the next.
func (m *Machine) Login(ctx context.Context, user string) (*Session, error) {
	s := &Session{machine: m, user: user, unit: "machine-session@" + user + ".service"}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot log %s in: %w", user, err), s.Close(context.WithoutCancel(ctx)))
	}
	return s, nil
}

// open starts the session's leader and finds the session that logind made for it.
func (s *Session) open(ctx context.Context) error {
	m := s.machine
	passwd, err := m.ReadFile(ctx, "/etc/passwd")
	if err != nil {
		return err
	}
	account, err := agent.FindAccount(passwd, s.user)
	if err != nil {
		return err
	}
	if _, err := m.output(ctx, nil, "systemctl", "start", s.unit); err != nil {
		return err
	}
	leader, err := m.output(ctx, nil, "systemctl", "show", "--property=MainPID", "--value", s.unit)
	if err != nil {
		return err
	}
	data, err := m.ReadFile(ctx, "/proc/"+strings.TrimSpace(string(leader))+"/cgroup")
	if err != nil {
		return err
	}
	group, err := unifiedGroup(data)
	if err != nil {
		return err
	}
	id, ok := strings.CutPrefix(strings.TrimSuffix(filepath.Base(group), ".scope"), "session-")
	if !ok {
		return fmt.Errorf("the leader is in %s, which is no session's", group)
	}
	if _, err := m.output(ctx, nil, "loginctl", "activate", id); err != nil {
		return err
	}
	runtimeDir := "/run/user/" + strconv.Itoa(int(account.UID))
	s.env = []string{
		"XDG_SESSION_ID=" + id, "XDG_SEAT=seat0", "XDG_RUNTIME_DIR=" + runtimeDir,
		"DBUS_SESSION_BUS_ADDRESS=unix:path=" + runtimeDir + "/bus",
	}
	s.group, err = m.openGroup(group)
	return err
}

// Command is Machine.Command for the session's user, in the session.
func (s *Session) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return s.machine.command(ctx, s.group, s.user, s.env, name, args)
}

// Close ends the session and what runs in it.
func (s *Session) Close(ctx context.Context) error {
	s.group.close()
	_, err := s.machine.output(ctx, nil, "systemctl", "stop", s.unit)
	return err
}

// consoleSize is how much of a machine's console is kept.
const consoleSize = 64 << 10

// console keeps the end of what is written to it.
type console struct {
	mutex sync.Mutex
	data  []byte
}

func (c *console) Write(data []byte) (int, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.data = append(c.data, data...)
	c.data = c.data[max(0, len(c.data)-consoleSize):]
	return len(data), nil
}

func (c *console) String() string {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return string(c.data)
}
