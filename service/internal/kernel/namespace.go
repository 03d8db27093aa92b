// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotPidFD means that a file descriptor is no pidfd.
	ErrNotPidFD = errors.New("not a pidfd")
	// ErrProcessGone means that the process of a pidfd has exited.
	ErrProcessGone = errors.New("the process has exited")
)

// Process is a process held by its pidfd, which names it for good: pids come
// round again, pidfds don't.
type Process struct {
	file *os.File
	// PID is the process's id in the broker's pid namespace. It is for
	// messages and for finding the process again, never for acting on it.
	PID int
	// Inode is the process's number in pidfs, unique until the next boot
	// (Linux 6.9, fs/pidfs.c).
	Inode uint64
}

// NewProcess takes a pidfd, whose ownership passes to it: also on error, when
// it is closed. ErrNotPidFD and ErrProcessGone say what was wrong with it.
func NewProcess(pidfd *os.File) (_ *Process, err error) {
	defer func() {
		if err != nil {
			_ = pidfd.Close()
		}
	}()
	fd := int(pidfd.Fd())
	// The link is made up by the kernel. Asking the file itself, by fstat or
	// ioctl, would ask a file system that a stranger may serve.
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil, fmt.Errorf("cannot look at the file descriptor: %w", err)
	}
	if link != "anon_inode:[pidfd]" && !strings.HasPrefix(link, "pidfd:[") {
		return nil, ErrNotPidFD
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, fmt.Errorf("cannot stat the pidfd: %w", err)
	}
	if fs.Type != unix.PID_FS_MAGIC {
		return nil, fmt.Errorf("cannot tell processes apart: pidfs is %w", ErrNotSupported)
	}
	// A thread's (PIDFD_THREAD is O_EXCL) can end before its process, and isn't
	// found again by FindProcess.
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot get the pidfd's flags: %w", err)
	}
	if flags&unix.O_EXCL != 0 {
		return nil, ErrNotPidFD
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("cannot stat the pidfd: %w", err)
	}
	values, err := fdinfo(fd, "Pid:")
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(values[0])
	if err != nil {
		return nil, fmt.Errorf("cannot read a pid from %q: %w", values[0], err)
	}
	if pid <= 0 { // -1: exited; 0: in a pid namespace beside the broker's
		return nil, ErrProcessGone
	}
	return &Process{file: pidfd, PID: pid, Inode: stat.Ino}, nil
}

// OpenProcess opens a process by its id, or returns ErrProcessGone. Whose process
// that is, is only known afterwards. The caller closes it.
func OpenProcess(pid int) (*Process, error) {
	pidfd, err := OpenPidFD(pid)
	if err != nil {
		return nil, err
	}
	return NewProcess(pidfd)
}

// OpenPidFD opens a process by its id, or returns ErrProcessGone. The caller
// closes the pidfd.
func OpenPidFD(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	switch err {
	case nil:
		return os.NewFile(uintptr(fd), "pidfd"), nil
	case unix.ESRCH, unix.EINVAL, unix.ENOENT:
		// A thread has the id now: EINVAL, ENOENT on newer kernels.
		return nil, ErrProcessGone
	}
	return nil, fmt.Errorf("cannot open process %d: %w", pid, err)
}

// FindProcess opens a process again by what an earlier Process said of it.
// ErrProcessGone means that it isn't there any more, also when its pid now
// belongs to another. The caller closes the process.
func FindProcess(pid int, inode uint64) (*Process, error) {
	p, err := OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	if p.Inode != inode {
		_ = p.Close()
		return nil, ErrProcessGone
	}
	return p, nil
}

// Clone returns a second, independent hold on the process.
func (p *Process) Clone() (*Process, error) {
	fd, err := Dup(p.file)
	if err != nil {
		return nil, err
	}
	return &Process{file: os.NewFile(uintptr(fd), "pidfd"), PID: p.PID, Inode: p.Inode}, nil
}

// Dup returns another descriptor of a file, which ends at an exec. It is the
// caller's to close.
func Dup(file *os.File) (int, error) {
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("cannot duplicate a file descriptor: %w", err)
	}
	return fd, nil
}

// FD lends the pidfd. It stays the process's own.
func (p *Process) FD() int { return int(p.file.Fd()) }

// Close gives up the hold on the process.
func (p *Process) Close() error { return p.file.Close() }

// Alive says whether the process has not exited yet.
func (p *Process) Alive() bool {
	poll := []unix.PollFd{{Fd: int32(p.FD()), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	return err != nil || n == 0
}

// Cgroup returns the process's path in the unified hierarchy, "/" for its
// root, or "" where there is none.
func (p *Process) Cgroup() (string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
	// The pid was this process's all the while if it still is now.
	if !p.Alive() {
		return "", ErrProcessGone
	}
	if err != nil {
		return "", fmt.Errorf("cannot read the cgroup of process %d: %w", p.PID, err)
	}
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n"), nil
		}
	}
	return "", nil
}

// Namespaces is a process's user and mount namespace, held by file
// descriptors, so that what was checked is what is entered.
type Namespaces struct {
	user, mount int
}

// Namespaces takes hold of the process's namespaces (Linux 6.11,
// PIDFD_GET_USER_NAMESPACE in ioctl_pidfd(2)). It needs CAP_SYS_PTRACE. The
// caller closes them.
func (p *Process) Namespaces() (*Namespaces, error) {
	n := &Namespaces{user: -1, mount: -1}
	var err error
	if n.user, err = p.namespace(pidfdGetUserNamespace); err != nil {
		return nil, err
	}
	if n.mount, err = p.namespace(pidfdGetMountNamespace); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// The requests of include/uapi/linux/pidfd.h: _IO(0xFF, n), with the
// direction bits that the architecture gives to _IO.
const (
	pidfdGetMountNamespace = unix.NS_GET_USERNS&^0xffff | 0xff03
	pidfdGetUserNamespace  = unix.NS_GET_USERNS&^0xffff | 0xff09
)

func (p *Process) namespace(request uint) (int, error) {
	fd, err := unix.IoctlRetInt(p.FD(), request)
	switch err {
	case nil:
		return fd, nil
	case unix.ESRCH:
		return -1, ErrProcessGone
	case unix.ENOTTY, unix.EINVAL:
		return -1, fmt.Errorf("cannot get a namespace from a pidfd: %w", ErrNotSupported)
	}
	return -1, fmt.Errorf("cannot get the namespaces of process %d: %w", p.PID, err)
}

// Clone returns a second, independent hold on the namespaces.
func (n *Namespaces) Clone() (*Namespaces, error) {
	c := &Namespaces{user: -1, mount: -1}
	var err error
	if c.user, err = unix.FcntlInt(uintptr(n.user), unix.F_DUPFD_CLOEXEC, 3); err == nil {
		c.mount, err = unix.FcntlInt(uintptr(n.mount), unix.F_DUPFD_CLOEXEC, 3)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("cannot duplicate a namespace's descriptor: %w", err)
	}
	return c, nil
}

// Close gives the namespaces up.
func (n *Namespaces) Close() {
	for _, fd := range []int{n.user, n.mount} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// Same says whether both are the same pair of namespaces.
func (n *Namespaces) Same(o *Namespaces) (bool, error) {
	user, err := sameFile(n.user, o.user)
	if err != nil || !user {
		return false, err
	}
	return sameFile(n.mount, o.mount)
}

// Relation is what the kernel says of a user namespace as seen from the
// broker's, and of the mount namespace that goes with it.
type Relation struct {
	// Owner is the uid that made the user namespace.
	Owner uint32
	// Initial: it is the broker's own user namespace.
	Initial bool
	// Unmixed: it lies below the broker's own user namespace, and those
	// between the two, if any, belong to Owner as well.
	Unmixed bool
	// OwnsMount: the mount namespace belongs to it.
	OwnsMount bool
	// Inode is the user namespace's number in nsfs.
	Inode uint64
}

// Relation asks the kernel (ioctl_nsfs(2)).
func (n *Namespaces) Relation() (Relation, error) {
	var r Relation
	own, err := ownUserNamespace()
	if err != nil {
		return r, err
	}
	id, err := identify(n.user)
	if err != nil {
		return r, err
	}
	r.Inode = id.inode
	if id == own {
		r.Initial = true
		return r, nil
	}
	owner, err := unix.IoctlGetUint32(n.user, unix.NS_GET_OWNER_UID)
	if err != nil {
		return r, fmt.Errorf("cannot get a user namespace's owner: %w", err)
	}
	r.Owner = owner
	if r.Unmixed, err = unmixed(n.user, owner, own); err != nil {
		return r, fmt.Errorf("cannot get a user namespace's parents: %w", err)
	}
	if r.OwnsMount, err = relative(n.mount, unix.NS_GET_USERNS, id); err != nil {
		return r, fmt.Errorf("cannot get a mount namespace's owner: %w", err)
	}
	return r, nil
}

// unmixed says whether the user namespaces from fd's up to the wanted one, which
// are 32 at most, belong to owner.
func unmixed(fd int, owner uint32, want identity) (bool, error) {
	child := fd
	for {
		parent, err := unix.IoctlRetInt(child, unix.NS_GET_PARENT)
		if child != fd {
			_ = unix.Close(child)
		}
		if err == unix.EPERM { // there is none below the broker's own
			return false, nil
		}
		if err != nil {
			return false, err
		}
		child = parent
		id, err := identify(parent)
		if err == nil && id != want {
			var uid uint32
			if uid, err = unix.IoctlGetUint32(parent, unix.NS_GET_OWNER_UID); err == nil && uid == owner {
				continue
			}
		}
		_ = unix.Close(parent)
		return id == want, err
	}
}

// relative says whether the namespace that request leads to is the wanted
// one. EPERM means that it lies beyond the broker's own: not that one.
func relative(fd int, request uint, want identity) (bool, error) {
	relative, err := unix.IoctlRetInt(fd, request)
	if err == unix.EPERM {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(relative)
	got, err := identify(relative)
	return got == want, err
}

// identity names a file for as long as it is open somewhere.
type identity struct{ device, inode uint64 }

func identify(fd int) (identity, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return identity{}, fmt.Errorf("cannot stat a namespace: %w", err)
	}
	return identity{uint64(stat.Dev), stat.Ino}, nil
}

func sameFile(a, b int) (bool, error) {
	x, err := identify(a)
	if err != nil {
		return false, err
	}
	y, err := identify(b)
	return x == y, err
}

var ownUserNamespace = sync.OnceValues(func() (identity, error) {
	file, err := os.Open("/proc/self/ns/user")
	if err != nil {
		return identity{}, err
	}
	defer file.Close()
	return identify(int(file.Fd()))
})

// initialUserNamespace is PROC_USER_INIT_INO of include/linux/proc_ns.h.
const initialUserNamespace = 0xEFFFFFFD

// InInitialUserNamespace says whether the calling process is in the initial
// user namespace, the only one from which rights can be delegated.
func InInitialUserNamespace() (bool, error) {
	own, err := ownUserNamespace()
	return own.inode == initialUserNamespace, err
}

// fdinfo returns the values of fields of /proc/self/fdinfo (proc(5)), in their
// order.
func fdinfo(fd int, fields ...string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return nil, err
	}
	values := make([]string, len(fields))
	found := 0
	for line := range bytes.Lines(data) {
		for i, field := range fields {
			if value, ok := bytes.CutPrefix(line, []byte(field)); ok {
				values[i] = string(bytes.TrimSpace(value))
				found++
			}
		}
	}
	if found != len(fields) {
		return nil, fmt.Errorf("cannot find %q in fdinfo", fields)
	}
	return values, nil
}
