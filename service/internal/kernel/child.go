// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A multithreaded process may neither enter nor create a user namespace
// (setns(2), unshare(2): EINVAL), and a Go program is always multithreaded. A
// child made by a bare clone has one thread, but no Go runtime either: it may
// not grow its stack, allocate, or be scheduled. So the child is a loop that
// makes the system calls its parent writes into a shared page, and all the
// logic stays in ordinary Go on the parent's side.

// maxCalls is the longest batch: entering the namespaces of a target, or
// raising the ambient capabilities and executing a command.
const maxCalls = 16

// call is one system call for the child.
type call struct {
	number uintptr
	args   [6]uintptr
	// from is 1 + the index of the earlier call in the batch whose result
	// replaces args[to]; 0 is none.
	from, to uintptr
	// store is the offset in the page at which the result is stored as 32
	// bits; 0 is none.
	store  uintptr
	result uintptr
	errno  uintptr
}

// page is what parent and child share. Only integers live in it: the child
// has no garbage collector, and the parent's doesn't look here.
type page struct {
	calls  [maxCalls]call
	count  uintptr
	done   uintptr
	parent uintptr
	child  uintptr // the child's end of the socket pair

	// request is what the child receives: a byte, and a file if it is given one.
	request unix.Msghdr
	given   struct {
		unix.Cmsghdr
		file, _ int32
	}
	// user and mount are the child's descriptors of the namespaces that it is to
	// enter.
	user, mount int32
	// answers are what the child sends: a byte, or a byte and the last
	// result, if that is a file descriptor that the parent asked for.
	answers [2]unix.Msghdr
	send    uintptr // which of them, if the batch succeeds
	byte    [8]byte
	vector  unix.Iovec
	rights  struct {
		unix.Cmsghdr
		fd int32
		_  int32
	}

	// Arguments in memory. A call points into these.
	name  [16]byte
	root  [unix.PathMax]byte
	path  [unix.PathMax]byte
	empty [1]byte
	how   unix.OpenHow
	attr  tokenCreateAttr
	statx unix.Statx_t
	caps  [2]unix.CapUserData
	capsH unix.CapUserHeader
	// variables are those of the command's environment that have its pid.
	variables [4][32]byte
	limit     unix.Rlimit
	mask      uint64 // the signal mask that the parent's thread had
}

// child is a cloned process that executes batches of system calls. Its file
// descriptor table is its own: nothing that it opens can leak into the
// parent's, however it dies.
type child struct {
	*page
	pid    int
	pidfd  int // -1 without new namespaces; otherwise the caller closes it
	socket int // the parent's end
	helper bool
	owner  uint32 // of a helper's target
	hung   bool
}

// childTimeout bounds one batch. Only a file system that the target controls
// can make a call slow.
const childTimeout = 5 * time.Second

// ErrHelperKilled means that the helper process was killed, which the target's
// root can do.
var ErrHelperKilled = errors.New("the helper process was killed")

// ErrTargetHangs means that a call inside the target took too long: a path
// there leads into a file system that doesn't answer, or the helper process was
// stopped.
var ErrTargetHangs = errors.New("the target does not answer")

// newHelper starts a child that will enter namespaces. It has no file
// descriptors but the standard ones: with a copy of its parent's it would also
// close, in the end, what strangers have sent to the parent, and that takes as
// long as the server of a stranger's file system likes (FUSE_FLUSH), whoever the
// helper works for. The caller ends it with kill.
//
// owner is the uid that owns the user namespace. If too many of its helpers hang
// already, the answer is ErrTargetHangs.
func newHelper(n *Namespaces, owner uint32) (*child, error) {
	if !hanging.room(owner) {
		return nil, ErrTargetHangs
	}
	c, err := mother.bear(n)
	if err != nil {
		return nil, fmt.Errorf("cannot start a helper process: %w", err)
	}
	c.owner = owner
	return c, nil
}

// prepare makes what parent and child share. It also returns the child's end
// of the socket pair, the caller's to close.
func prepare() (*child, int, error) {
	memory, err := unix.Mmap(-1, 0, int(unsafe.Sizeof(page{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, -1, fmt.Errorf("cannot map shared memory: %w", err)
	}
	c, end, err := equip((*page)(unsafe.Pointer(&memory[0])))
	if err != nil {
		_ = unix.Munmap(memory)
	}
	return c, end, err
}

// equip is prepare with memory that is there.
func equip(p *page) (*child, int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("cannot make a socket pair: %w", err)
	}
	c := &child{page: p, pid: -1, pidfd: -1, socket: pair[0]}
	c.parent = uintptr(os.Getpid())
	c.vector = unix.Iovec{Base: &c.byte[0]}
	c.vector.SetLen(1)
	c.request.Iov = &c.vector
	c.request.SetIovlen(1)
	c.request.Control = (*byte)(unsafe.Pointer(&c.given))
	for i := range c.answers {
		c.answers[i].Iov = &c.vector
		c.answers[i].SetIovlen(1)
	}
	c.answers[1].Control = (*byte)(unsafe.Pointer(&c.rights))
	c.answers[1].SetControllen(unix.CmsgSpace(4))
	c.rights.Level = unix.SOL_SOCKET
	c.rights.Type = unix.SCM_RIGHTS
	c.rights.SetLen(unix.CmsgLen(4))
	return c, pair[1], nil
}

// clone clones the child, or frees what was prepared for it. flags are
// those of the namespaces, and CLONE_PARENT. The calling goroutine is locked to
// its thread until kill, which it calls itself, because the child's parent-death
// signal follows the thread.
func (c *child) clone(flags uint64) error {
	runtime.LockOSThread()
	pid, pidfd, errno := clone(flags, c.page)
	if errno != 0 {
		runtime.UnlockOSThread()
		c.free()
		return fmt.Errorf("cannot clone: %w", errno)
	}
	c.pid, c.pidfd = int(pid), int(pidfd)
	return nil
}

// cloneArgs is struct clone_args of include/uapi/linux/sched.h, version 0
// (Linux 5.3).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls uint64
}

// clone clones. In the parent it returns the child's pid and pidfd; in the child
// it doesn't return. Signals stay blocked in the child: a handler would need the
// runtime that it hasn't got. It will execute a command and take signals then, so
// its handlers are reset, which only clone3(2) can do.
//
//go:norace
//go:noinline
func clone(flags uint64, p *page) (pid uintptr, pidfd int32, errno unix.Errno) {
	pidfd = -1
	args := cloneArgs{
		flags:      flags | unix.CLONE_PIDFD | unix.CLONE_CLEAR_SIGHAND,
		pidfd:      uint64(uintptr(unsafe.Pointer(&pidfd))),
		exitSignal: uint64(unix.SIGCHLD),
	}
	if flags&unix.CLONE_PARENT != 0 {
		args.exitSignal = 0 // it has its parent's (clone(2))
	}
	blockSignals(p)
	pid, errno = cloneRaw(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), p)
	unblockSignals(p)
	return pid, pidfd, errno
}

//go:norace
func blockSignals(p *page) {
	all := ^uint64(0)
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&p.mask)), unsafe.Sizeof(all), 0, 0)
}

//go:norace
func unblockSignals(p *page) {
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, unsafe.Sizeof(p.mask), 0, 0)
}

//go:norace
//go:noinline
//go:nosplit
func cloneRaw(number, arg0, arg1 uintptr, p *page) (uintptr, unix.Errno) {
	pid, _, errno := unix.RawSyscall(number, arg0, arg1, 0)
	if errno == 0 && pid == 0 {
		childLoop(p)
	}
	return pid, errno
}

// childLoop is all that the child ever runs: wait for a batch, make its calls
// up to the first that fails, answer. It ends by SIGKILL, by execve(2), or by
// itself when the parent has gone.
//
//go:norace
//go:noinline
//go:nosplit
func childLoop(p *page) {
	for {
		p.request.Controllen = uint64(unsafe.Sizeof(p.given))
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, p.child, uintptr(unsafe.Pointer(&p.request)), 0)
		if errno == unix.EINTR {
			continue
		}
		parent, _, _ := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0)
		if n != 1 || parent != p.parent {
			break
		}
		p.done = 0
		for p.done < p.count {
			c := &p.calls[p.done]
			if c.from != 0 {
				c.args[c.to] = p.calls[c.from-1].result
			}
			c.result, _, errno = unix.RawSyscall6(c.number, c.args[0], c.args[1], c.args[2], c.args[3], c.args[4], c.args[5])
			c.errno = uintptr(errno)
			if errno != 0 {
				break
			}
			if c.store != 0 {
				*(*uint32)(unsafe.Add(unsafe.Pointer(p), c.store)) = uint32(c.result)
			}
			p.rights.fd = int32(c.result)
			p.done++
		}
		answer := &p.answers[0]
		if p.send != 0 && p.done == p.count {
			answer = &p.answers[1]
		}
		unix.RawSyscall(unix.SYS_SENDMSG, p.child, uintptr(unsafe.Pointer(answer)), unix.MSG_NOSIGNAL)
	}
	exit()
}

//go:norace
//go:noinline
//go:nosplit
func exit() {
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	}
}

// do executes a batch and waits for it. send asks for the last call's result,
// a file descriptor, which is then returned and the caller's to close;
// otherwise -1 is. An error is the errno of the first call that failed, whose
// index is returned as well.
func (c *child) do(send bool, calls ...call) (fd int, failed int, err error) {
	if err := c.post(send, calls...); err != nil {
		return -1, 0, err
	}
	return c.hear()
}

// hear waits for the answer to a batch, as do does.
func (c *child) hear() (fd int, failed int, err error) {
	deadline := time.Now().Add(childTimeout)
	poll := []unix.PollFd{{Fd: int32(c.socket), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, int(time.Until(deadline).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, 0, fmt.Errorf("cannot poll: %w", err)
		}
		if n == 0 {
			c.hung = true
			return -1, int(c.done), ErrTargetHangs
		}
		break
	}
	var answer [1]byte
	control := make([]byte, unix.CmsgSpace(4))
	n, controlLen, _, _, err := unix.Recvmsg(c.socket, answer[:], control, unix.MSG_CMSG_CLOEXEC)
	if err == unix.ECONNRESET { // it had not read the batch
		return -1, 0, ErrHelperKilled
	}
	if err != nil {
		return -1, 0, fmt.Errorf("cannot hear from the helper process: %w", err)
	}
	fd = -1
	if controlLen > 0 {
		messages, err := unix.ParseSocketControlMessage(control[:controlLen])
		if err != nil {
			return -1, 0, err
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return -1, 0, err
		}
		fd = fds[0]
	}
	if n == 0 {
		return -1, int(c.done), ErrHelperKilled
	}
	if c.done < c.count {
		return -1, int(c.done), unix.Errno(c.calls[c.done].errno)
	}
	return fd, int(c.count), nil
}

// post hands a batch to the child without waiting for it.
func (c *child) post(send bool, calls ...call) error {
	if len(calls) > maxCalls {
		return errors.New("cannot make so many system calls at once")
	}
	copy(c.calls[:], calls)
	c.count = uintptr(len(calls))
	c.send = 0
	if send {
		c.send = 1
	}
	if err := unix.Sendto(c.socket, []byte{0}, unix.MSG_NOSIGNAL, nil); err != nil {
		return ErrHelperKilled
	}
	return nil
}

// give gives the child a file, and returns the child's number of it.
func (c *child) give(fd int) (uintptr, error) {
	c.count, c.send = 0, 0
	if err := unix.Sendmsg(c.socket, []byte{0}, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL); err != nil {
		return 0, ErrHelperKilled
	}
	_, _, err := c.hear()
	return uintptr(c.given.file), err
}

// kill ends the child, and frees what it shared with the parent once it is
// dead.
//
// A child that hangs in a file system of the target's can outlive SIGKILL (a
// FUSE server that doesn't answer). Nobody waits for that, but it counts against
// the target's owner.
func (c *child) kill() {
	_ = unix.Kill(c.pid, unix.SIGKILL)
	if c.hung {
		hanging.add(c.owner, 1)
	}
	go func() {
		c.reap()
		if c.hung {
			hanging.add(c.owner, -1)
		}
	}()
}

func (c *child) reap() {
	wait(c.pid)
	c.free()
}

func wait(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != unix.EINTR {
			return
		}
	}
}

// maxHanging is how many helpers may hang in the namespaces of one owner, each
// with a thread of ours that waits for it: as many as requests under way.
const maxHanging = 32

// hanging counts them, by owner.
var hanging = hangCount{perOwner: map[uint32]int{}}

type hangCount struct {
	mu       sync.Mutex
	perOwner map[uint32]int
}

func (h *hangCount) room(owner uint32) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.perOwner[owner] < maxHanging
}

func (h *hangCount) add(owner uint32, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.perOwner[owner] += n; h.perOwner[owner] == 0 {
		delete(h.perOwner, owner)
	}
}

func (c *child) free() {
	_ = unix.Close(c.socket)
	if c.helper {
		mother.takeBack(c.page)
		return
	}
	_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(c.page)), unsafe.Sizeof(page{})))
}
