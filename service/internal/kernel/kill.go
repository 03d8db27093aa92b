// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// UserNamespace is a user namespace held by its file descriptor.
type UserNamespace struct {
	fd int
	id identity
}

// UserNamespace finds the namespace with a number (Relation.Inode) among the
// process's own and those above it: processes move down, never up. It needs
// CAP_SYS_PTRACE. ErrProcessGone also means that it is none of them. The caller
// closes it.
func (p *Process) UserNamespace(inode uint64) (*UserNamespace, error) {
	fd, err := p.namespace(pidfdGetUserNamespace)
	if err != nil {
		return nil, err
	}
	u, err := above(fd, func(_ int, id identity) bool { return id.inode == inode })
	if err == nil && u == nil {
		err = ErrProcessGone
	}
	return u, err
}

// above goes from a namespace, whose fd passes to it, upwards to the first that
// is wanted, and returns nil if there is none below the broker's own.
func above(fd int, wanted func(fd int, id identity) bool) (*UserNamespace, error) {
	own, err := ownUserNamespace()
	for err == nil {
		var id identity
		if id, err = identify(fd); err != nil || id == own {
			break
		}
		if wanted(fd, id) {
			return &UserNamespace{fd, id}, nil
		}
		var parent int
		if parent, err = unix.IoctlRetInt(fd, unix.NS_GET_PARENT); err != nil {
			break
		}
		_ = unix.Close(fd)
		fd = parent
	}
	_ = unix.Close(fd)
	if err == unix.EPERM { // there is none below the broker's own
		err = nil
	}
	return nil, err
}

// Close gives the namespace up.
func (u *UserNamespace) Close() { _ = unix.Close(u.fd) }

// Kill ends all processes in the namespace and in those below it, whoever they
// belong to and whatever pid namespace they are in: as long as there are any, or
// until the context ends. It returns how many are left. Nobody who owns the
// namespace can do less (CAP_KILL, capabilities(7)). It needs CAP_KILL and
// CAP_SYS_PTRACE, and a /proc with all processes.
func (u *UserNamespace) Kill(ctx context.Context) (left int, err error) {
	for {
		if left, err = u.killOnce(); left == 0 {
			return 0, err
		}
		select {
		case <-ctx.Done():
			return left, err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// ahead is how many ids after that of a process of the namespace are tried for
// its children: the kernel gives them out in turn. Who forks and exits again
// and again is faster than a list of processes, but not faster than that.
const ahead = 1024

func (u *UserNamespace) killOnce() (found int, err error) {
	pids, err := processes()
	if err != nil {
		return 0, err
	}
	next := 0
	for _, listed := range pids {
		if listed < next {
			continue
		}
		for pid, misses := listed, 0; misses < ahead; pid++ {
			what, oneErr := u.killProcess(pid)
			// One process mustn't save the others.
			err = cmp.Or(err, oneErr)
			next = pid + 1
			if what == stranger && pid == listed {
				break
			}
			misses++
			if what == killed {
				found++
				misses = 0
			}
		}
	}
	return found, err
}

// processes returns the ids of all processes, in order.
func processes() ([]int, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("cannot list processes: %w", err)
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("cannot list processes: %w", err)
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// What a process turns out to be.
type quarry int

const (
	stranger quarry = iota
	gone
	killed
)

// killProcess ends a process if it is in the namespace.
func (u *UserNamespace) killProcess(pid int) (quarry, error) {
	what, headless, err := u.killBy(pid, 0)
	if !headless {
		return what, err
	}
	// The main thread has gone, and leads nowhere. There may be others, which are
	// all in the same user namespace (setns(2), unshare(2)).
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return gone, nil
	}
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread.Name())
		if err != nil || tid == pid {
			continue
		}
		if what, _, err = u.killBy(tid, unix.PIDFD_THREAD); what != gone {
			return what, err
		}
	}
	return gone, nil
}

// killBy ends the process of a pid, or of a thread's id, if it is in the
// namespace. That is checked and done by the same pidfd. headless says that the
// thread has exited and that the process may still be there.
func (u *UserNamespace) killBy(pid, flags int) (what quarry, headless bool, err error) {
	fd, err := unix.PidfdOpen(pid, flags)
	switch err {
	case nil:
	case unix.ESRCH, unix.EINVAL, unix.ENOENT:
		return gone, false, nil
	default:
		return stranger, false, fmt.Errorf("cannot open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	namespace, err := unix.IoctlRetInt(fd, pidfdGetUserNamespace)
	switch err {
	case nil:
	case unix.ESRCH:
		return gone, true, nil
	case unix.EPERM, unix.EACCES: // above the broker, where it is in a container
		return stranger, false, nil
	default:
		return stranger, false, fmt.Errorf("cannot get the namespaces of process %d: %w", pid, err)
	}
	found, err := above(namespace, func(_ int, id identity) bool { return id == u.id })
	if err != nil || found == nil {
		return stranger, false, err
	}
	found.Close()
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return killed, false, fmt.Errorf("cannot end process %d: %w", pid, err)
	}
	return killed, false, nil
}
