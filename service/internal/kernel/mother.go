// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxHelpers is how many helpers there may be at once.
const maxHelpers = 1024

// ErrTooManyHelpers means that there are as many helper processes as there may
// be, because so many targets are slow.
var ErrTooManyHelpers = errors.New("too many targets are slow to answer")

// mother is the process that helpers are copies of. It is a copy of this one as
// it was at its start: small, so that a copy of it is cheap, and without anything
// that a stranger has sent. What it bears are this process's children, not its
// own (CLONE_PARENT).
var mother motherhood

type motherhood struct {
	mu sync.Mutex // held while it bears a child, and for what follows
	c  *child
	p  *motherPage
	// free are the helpers' pages that aren't in use. Those of all helpers that
	// there can be are shared with the mother from the start.
	free []*page
}

// motherPage is what the mother and its parent share.
type motherPage struct {
	page
	// received is what comes with a request: the helper's end of its socket pair,
	// and the namespaces that it is to enter.
	received struct {
		unix.Cmsghdr
		socket, user, mount, _ int32
	}
	helper *page // of the next child
	pid    int32 // of the last, as the kernel wrote it
	errno  uintptr
}

// StartHelpers makes it possible to work in targets, with helper processes: it
// starts the process that they are copies of, which stays as long as this one, and
// calls died if it doesn't. It comes before the first file descriptor of a
// stranger's is received, and is called once.
func StartHelpers(died func()) error {
	size := int(unsafe.Sizeof(motherPage{}) + maxHelpers*unsafe.Sizeof(page{}))
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("cannot map shared memory: %w", err)
	}
	m := &mother
	m.p = (*motherPage)(unsafe.Pointer(&memory[0]))
	pages := unsafe.Slice((*page)(unsafe.Add(unsafe.Pointer(m.p), unsafe.Sizeof(*m.p))), maxHelpers)
	for i := range pages {
		m.free = append(m.free, &pages[maxHelpers-1-i])
	}
	var end int
	if m.c, end, err = equip(&m.p.page); err != nil {
		return err
	}
	m.p.request.Control = (*byte)(unsafe.Pointer(&m.p.received))
	m.p.child = uintptr(end)
	cloned := make(chan unix.Errno)
	go func() {
		// Never unlocked: helpers end with this thread, as if they were its
		// children (PR_SET_PDEATHSIG in prctl(2)).
		runtime.LockOSThread()
		pid, errno := cloneMother(m.p)
		m.c.pid = int(pid)
		cloned <- errno
		if errno == 0 {
			wait(m.c.pid)
			died()
		}
		select {}
	}()
	errno := <-cloned
	_ = unix.Close(end)
	if errno != 0 {
		return fmt.Errorf("cannot clone: %w", errno)
	}
	return nil
}

// bear starts a helper for namespaces, which the caller ends with kill.
func (m *motherhood) bear(n *Namespaces) (*child, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.free) == 0 {
		return nil, ErrTooManyHelpers
	}
	p := m.free[len(m.free)-1]
	c, end, err := equip(p)
	if err != nil {
		return nil, err
	}
	defer unix.Close(end)
	m.p.helper = p
	m.p.errno = 0
	err = unix.Sendmsg(m.c.socket, []byte{0}, unix.UnixRights(end, n.user, n.mount), nil, unix.MSG_NOSIGNAL)
	if err == nil {
		if _, _, err = m.c.hear(); err != nil {
			// Nothing that it still says would make sense.
			_ = unix.Kill(m.c.pid, unix.SIGKILL)
			err = fmt.Errorf("no answer: %v", err)
		}
	}
	if err == nil && m.p.errno != 0 {
		err = os.NewSyscallError("clone", unix.Errno(m.p.errno))
	}
	if err != nil {
		_ = unix.Close(c.socket)
		return nil, err
	}
	m.free = m.free[:len(m.free)-1]
	c.pid = int(m.p.pid)
	c.helper = true
	return c, nil
}

// takeBack takes the page of a helper that has ended.
func (m *motherhood) takeBack(p *page) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.free = append(m.free, p)
}

//go:norace
//go:noinline
func cloneMother(p *motherPage) (uintptr, unix.Errno) {
	blockSignals(&p.page)
	pid, errno := cloneMotherRaw(p)
	unblockSignals(&p.page)
	return pid, errno
}

//go:norace
//go:noinline
//go:nosplit
func cloneMotherRaw(p *motherPage) (uintptr, unix.Errno) {
	pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, 0, 0, 0)
	if errno == 0 && pid == 0 {
		motherLoop(p)
	}
	return pid, errno
}

// motherLoop is all that the mother ever runs. It ends when its parent has gone.
//
//go:norace
//go:noinline
//go:nosplit
func motherLoop(p *motherPage) {
	unix.RawSyscall(unix.SYS_CLOSE_RANGE, 3, p.child-1, 0)
	unix.RawSyscall(unix.SYS_CLOSE_RANGE, p.child+1, math.MaxUint32, 0)
	for {
		p.request.Controllen = uint64(unsafe.Sizeof(p.received))
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, p.child, uintptr(unsafe.Pointer(&p.request)), 0)
		if errno == unix.EINTR {
			continue
		}
		if n != 1 {
			break
		}
		// Once the mother has answered, the parent writes the next one there.
		helper := p.helper
		helper.child = uintptr(p.received.socket)
		helper.user = p.received.user
		helper.mount = p.received.mount
		pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, unix.CLONE_PARENT|unix.CLONE_PARENT_SETTID, 0, uintptr(unsafe.Pointer(&p.pid)))
		if errno == 0 && pid == 0 {
			unix.RawSyscall(unix.SYS_CLOSE, p.child, 0, 0)
			childLoop(helper)
		}
		p.errno = uintptr(errno)
		unix.RawSyscall(unix.SYS_CLOSE, uintptr(p.received.socket), 0, 0)
		unix.RawSyscall(unix.SYS_CLOSE, uintptr(p.received.user), 0, 0)
		unix.RawSyscall(unix.SYS_CLOSE, uintptr(p.received.mount), 0, 0)
		unix.RawSyscall(unix.SYS_SENDMSG, p.child, uintptr(unsafe.Pointer(&p.answers[0])), unix.MSG_NOSIGNAL)
	}
	exit()
}
