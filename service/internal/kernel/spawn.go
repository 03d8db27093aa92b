// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Suspended is a process in a new user and mount namespace, both its caller's
// own, that waits to execute a command.
type Suspended struct {
	c          *child
	path       *byte
	argv, envp []*byte
	sibling    bool
	// PidFD is the process's pidfd; it belongs to the Suspended.
	PidFD *os.File
}

// SuspendOptions say how a suspended process differs from a plain child.
type SuspendOptions struct {
	// Root maps root's uid and gid instead of the caller's own.
	Root bool
	// Heir has the variables by which systemd says whom an environment is for
	// name the process where they name the caller: LISTEN_PID, WATCHDOG_PID,
	// SYSTEMD_EXEC_PID.
	Heir bool
	// Sibling makes the process a child of the caller's parent, which the
	// caller cannot wait for.
	Sibling bool
}

// ExitNotExecuted is the exit status of a sibling that was given up.
const ExitNotExecuted = 126

// Suspend clones a process that will execute path with the arguments and the
// environment. Its only uid and gid are those of the caller, or root's. The
// goroutine stays locked to its thread until Exec succeeds or Kill is called,
// from the same goroutine.
func Suspend(path string, argv, env []string, options SuspendOptions) (_ *Suspended, err error) {
	s := &Suspended{sibling: options.Sibling}
	if s.path, err = unix.BytePtrFromString(path); err != nil {
		return nil, fmt.Errorf("cannot execute %q: %w", path, err)
	}
	if s.argv, err = syscall.SlicePtrFromStrings(argv); err != nil {
		return nil, fmt.Errorf("cannot pass the arguments: %w", err)
	}
	if s.envp, err = syscall.SlicePtrFromStrings(env); err != nil {
		return nil, fmt.Errorf("cannot pass the environment: %w", err)
	}
	c, end, err := prepare()
	if err != nil {
		return nil, err
	}
	defer unix.Close(end)
	c.page.child = uintptr(end)
	var heirlooms []string
	if options.Heir {
		heirlooms = s.shareVariables(c.page, env)
	}
	flags := uint64(unix.CLONE_NEWUSER | unix.CLONE_NEWNS)
	if options.Sibling {
		flags |= unix.CLONE_PARENT
		c.parent = uintptr(os.Getppid())
	}
	if err := c.clone(flags); err != nil {
		return nil, fmt.Errorf("cannot make a user namespace: %w", err)
	}
	s.c = c
	for i, name := range heirlooms {
		copy(c.variables[i][:], name+strconv.Itoa(c.pid)+"\x00")
	}
	s.PidFD = os.NewFile(uintptr(c.pidfd), "pidfd")
	defer func() {
		if err != nil {
			s.Kill()
		}
	}()
	first := deathSignal(unix.SIGKILL)
	if options.Sibling {
		// It is told of the caller's end by that of their connection, of which it
		// has a copy of both ends.
		first = call{number: unix.SYS_CLOSE, args: [6]uintptr{uintptr(c.socket)}}
	}
	if _, _, err := c.do(false, first); err != nil {
		return nil, fmt.Errorf("cannot start a process: %w", err)
	}
	return s, s.mapIDs(options.Root)
}

// shareVariables has the environment's variables that name the caller read from
// the shared page, since the process's pid isn't known before it has its copy of
// everything else. It returns their names, in the order of the page.
func (s *Suspended) shareVariables(p *page, env []string) (names []string) {
	own := strconv.Itoa(os.Getpid())
	for i, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		switch name {
		case "LISTEN_PID", "WATCHDOG_PID", "SYSTEMD_EXEC_PID":
			if value == own && len(names) < len(p.variables) {
				s.envp[i] = &p.variables[len(names)][0]
				names = append(names, name+"=")
			}
		}
	}
	return names
}

func deathSignal(signal syscall.Signal) call {
	return call{number: unix.SYS_PRCTL, args: [6]uintptr{unix.PR_SET_PDEATHSIG, uintptr(signal)}}
}

// mapIDs maps one uid and one gid, which needs no privilege once setgroups(2)
// is given up (user_namespaces(7)).
func (s *Suspended) mapIDs(root bool) error {
	uid, gid := os.Geteuid(), os.Getegid()
	insideUID, insideGID := uid, gid
	if root {
		insideUID, insideGID = 0, 0
	}
	for _, file := range []struct{ name, data string }{
		{"uid_map", fmt.Sprintf("%d %d 1\n", insideUID, uid)},
		{"setgroups", "deny\n"},
		{"gid_map", fmt.Sprintf("%d %d 1\n", insideGID, gid)},
	} {
		if err := writeFile(fmt.Sprintf("/proc/%d/%s", s.c.pid, file.name), file.data); err != nil {
			return fmt.Errorf("cannot map ids into the user namespace: %s: %w", file.name, err)
		}
	}
	return nil
}

// writeFile writes a file of procfs, which needs no poller.
func writeFile(path, data string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(data))
	return err
}

// Exec gives the process the capabilities as ambient ones, and its caller's
// signal mask and limits, and executes the command. An error is execve(2)'s,
// and then nothing of the command has run.
func (s *Suspended) Exec(capabilities []int) error {
	c := s.c
	c.capsH = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	for i := range c.caps {
		c.caps[i] = unix.CapUserData{Effective: ^uint32(0), Permitted: ^uint32(0)}
	}
	c.limit = startLimit()
	batch := []call{
		{number: unix.SYS_PRLIMIT64, args: [6]uintptr{0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&c.limit))}},
		{number: unix.SYS_CAPSET, args: [6]uintptr{uintptr(unsafe.Pointer(&c.capsH)), uintptr(unsafe.Pointer(&c.caps))}},
	}
	for _, capability := range capabilities {
		c.caps[capability/32].Inheritable |= 1 << (capability % 32)
		batch = append(batch, call{number: unix.SYS_PRCTL,
			args: [6]uintptr{unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(capability)}})
	}
	batch = append(batch,
		deathSignal(0),
		call{number: unix.SYS_RT_SIGPROCMASK, args: [6]uintptr{unix.SIG_SETMASK, uintptr(unsafe.Pointer(&c.mask)), 0, 8}},
		call{number: unix.SYS_EXECVE, args: [6]uintptr{uintptr(unsafe.Pointer(s.path)),
			uintptr(unsafe.Pointer(&s.argv[0])), uintptr(unsafe.Pointer(&s.envp[0]))}},
	)
	_, failed, err := c.do(false, batch...)
	// A successful execve closes the child's end of the socket pair and has
	// no result to send.
	if err == ErrHelperKilled {
		runtime.UnlockOSThread()
		c.free()
		return nil
	}
	if err == nil || failed != len(batch)-1 {
		return fmt.Errorf("cannot prepare the process: %w", err)
	}
	return err
}

// startLimit is the limit on open files that this process was started with. Go
// raises the soft limit to the hard one, which isn't for programs that use
// select(2), and gives the old one only to what it executes itself. So it is
// made to try: an exec that fails leaves the old limit in place.
var startLimit = sync.OnceValue(func() unix.Rlimit {
	var raised, start unix.Rlimit
	// None of this can fail, but for the exec, which has no file to execute.
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &raised)
	_ = syscall.Exec("", nil, nil)
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &start)
	_, _, _ = unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&raised)), 0, 0, 0)
	return start
})

// PID is the process's pid.
func (s *Suspended) PID() int { return s.c.pid }

// Signal sends a signal to the process.
func (s *Suspended) Signal(signal syscall.Signal) error {
	return unix.PidfdSendSignal(int(s.PidFD.Fd()), signal, nil, 0)
}

// Wait waits for an executed command to end and gives the process up. That of a
// sibling is ECHILD at once.
func (s *Suspended) Wait() (syscall.WaitStatus, error) {
	defer s.PidFD.Close()
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(s.c.pid, &status, 0, nil)
		if err != unix.EINTR {
			return syscall.WaitStatus(status), err
		}
	}
}

// Kill ends a process whose Exec did not succeed, and gives it up. A sibling
// exits, with ExitNotExecuted: its parent may judge by that.
func (s *Suspended) Kill() {
	defer s.PidFD.Close()
	if !s.sibling {
		_ = unix.Kill(s.c.pid, unix.SIGKILL)
		runtime.UnlockOSThread()
		s.c.reap() // it has nothing that could hold it up
		return
	}
	if s.c.post(false, call{number: unix.SYS_EXIT_GROUP, args: [6]uintptr{ExitNotExecuted}}) == nil {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.PidFD.Fd()), Events: unix.POLLIN}}, int(childTimeout.Milliseconds()))
	}
	_ = s.Signal(unix.SIGKILL) // not by its pid, which its parent may have freed
	runtime.UnlockOSThread()
	s.c.free()
}
