// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// tokenPath is where libbpf and bpftool look for a BPF file system by
// themselves, and cilium/ebpf finds it among the mounts.
const tokenPath = "/sys/fs/bpf"

// Command is a command that runs with a profile: in a user and a mount
// namespace of its own, with a BPF file system for tokens at /sys/fs/bpf and
// the environment variable LIBBPF_BPF_TOKEN_PATH for it, and with the profile's
// capabilities as ambient ones. It has the caller's standard input, output and
// error, working directory, process group and terminal, and costs nothing while
// it runs.
type Command struct {
	// Profile is the profile's name.
	Profile string
	// Path is the program's path. It is not looked for.
	Path string
	// Args are the arguments, the program's name first.
	Args []string
	// Env is the environment; nil is the caller's.
	Env []string
	// Root has the command run as uid and gid 0 of its user namespace, which
	// are the caller's own outside. Otherwise it keeps the caller's.
	Root bool
	// Heir has the command get what systemd meant for the caller: where Env says
	// by the caller's pid whom it is for, as LISTEN_PID (sd_listen_fds(3)) and
	// WATCHDOG_PID do, it says the command's instead.
	Heir bool
	// Sibling makes the command a child of the caller's parent, which sees its
	// exit. Signal works, Wait doesn't. If Start fails, it exits with 126.
	Sibling bool
	// Granted, if not nil, is called when the broker has granted the profile,
	// before the command runs. An error keeps it from running, and is Start's.
	Granted func(*Grant) error

	client  *Client
	process *kernel.Suspended
	pid     int
}

// Command returns a command for Start.
func (c *Client) Command(profile, path string, args ...string) *Command {
	return &Command{Profile: profile, Path: path, Args: append([]string{path}, args...), client: c}
}

// Start has the profile granted to a new process and executes the command in
// it. An *Error is the broker's refusal, and an *fs.PathError says why the
// command cannot be executed. If it fails, nothing of the command has run, and
// no process and no grant is left. Otherwise the caller calls Wait.
//
// Ending the context ends the request, but not a command that has started.
func (c *Command) Start(ctx context.Context) (err error) {
	if c.process != nil {
		return errors.New("cannot start a command twice")
	}
	process, err := kernel.Suspend(c.Path, c.Args, c.environment(), kernel.SuspendOptions{Root: c.Root, Heir: c.Heir, Sibling: c.Sibling})
	if err != nil {
		return err
	}
	c.pid = process.PID()
	defer func() {
		if err != nil {
			process.Kill()
		}
	}()
	grant, err := c.client.MountToken(ctx, c.Profile, process.PidFD, tokenPath)
	if err != nil {
		return err
	}
	capabilities, err := capabilityNumbers(grant.Capabilities)
	if err != nil {
		return err
	}
	if c.Granted != nil {
		if err := c.Granted(grant); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return canceled(ctx)
	}
	err = process.Exec(capabilities)
	if errno, ok := err.(syscall.Errno); ok {
		return &fs.PathError{Op: "exec", Path: c.Path, Err: errno}
	}
	if err != nil {
		return err
	}
	c.process = process
	return nil
}

// PID is the command's pid, which it has from before Granted is called.
func (c *Command) PID() int { return c.pid }

// Wait waits for the command to end, and is called once. Its exit is no error,
// whatever the status.
func (c *Command) Wait() (syscall.WaitStatus, error) {
	return c.process.Wait()
}

// Signal sends a signal to the command, also while another goroutine waits for
// it. It returns os.ErrProcessDone when the command has ended.
func (c *Command) Signal(signal syscall.Signal) error {
	raw, err := c.process.PidFD.SyscallConn()
	if err != nil {
		return os.ErrProcessDone
	}
	// Within Control the pidfd's number can't come to mean another process, and
	// Control fails if the pidfd is closed.
	closed := raw.Control(func(uintptr) { err = c.process.Signal(signal) })
	if closed != nil || errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

const tokenVariable = "LIBBPF_BPF_TOKEN_PATH="

func (c *Command) environment() []string {
	env := c.Env
	if env == nil {
		env = os.Environ()
	}
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		// LISTEN_PIDFDID confirms LISTEN_PID where it is there, and would be the
		// caller's.
		return strings.HasPrefix(v, tokenVariable) || c.Heir && strings.HasPrefix(v, "LISTEN_PIDFDID=")
	})
	return append(env, tokenVariable+tokenPath)
}

// capabilityNumbers are those of include/uapi/linux/capability.h that tokens
// have to do with.
func capabilityNumbers(names []string) ([]int, error) {
	numbers := map[string]int{"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
	var capabilities []int
	for _, name := range names {
		number, ok := numbers[name]
		if !ok {
			return nil, fmt.Errorf("cannot give the command %.64q: not a capability that is known", name)
		}
		capabilities = append(capabilities, number)
	}
	return capabilities, nil
}
