// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Credentials is what the kernel says of the process that connected a Unix
// socket, as of that moment (unix(7)).
type Credentials struct {
	UID, GID uint32
	Groups   []uint32
	// Label is the security label, "" where no LSM gives one.
	Label string
	// Process is the receiver's to close.
	Process *Process
}

// PeerCredentials asks the kernel who connected the socket. ErrNotSupported
// means that it can't give a pidfd (SO_PEERPIDFD, Linux 6.5), ErrProcessGone
// that the process has exited already.
func PeerCredentials(conn *net.UnixConn) (*Credentials, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var c *Credentials
	controlErr := raw.Control(func(fd uintptr) { c, err = credentials(int(fd)) })
	return c, errors.Join(controlErr, err)
}

func credentials(socket int) (*Credentials, error) {
	ucred, err := unix.GetsockoptUcred(socket, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("cannot get the peer's credentials: %w", err)
	}
	c := &Credentials{UID: ucred.Uid, GID: ucred.Gid}
	if c.Groups, err = peerGroups(socket); err != nil {
		return nil, fmt.Errorf("cannot get the peer's groups: %w", err)
	}
	c.Label, err = unix.GetsockoptString(socket, unix.SOL_SOCKET, unix.SO_PEERSEC)
	if err != nil && err != unix.ENOPROTOOPT && err != unix.EOPNOTSUPP {
		return nil, fmt.Errorf("cannot get the peer's security label: %w", err)
	}
	pidfd, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch err {
	case nil:
	case unix.ENOPROTOOPT:
		return nil, fmt.Errorf("cannot get the peer's pidfd: %w", ErrNotSupported)
	case unix.ESRCH, unix.EINVAL, unix.ENODATA:
		return nil, ErrProcessGone
	default:
		return nil, fmt.Errorf("cannot get the peer's pidfd: %w", err)
	}
	c.Process, err = NewProcess(os.NewFile(uintptr(pidfd), "pidfd"))
	return c, err
}

// peerGroups asks for the supplementary groups; their number isn't known
// beforehand, and the kernel says it with ERANGE (net/core/sock.c).
func peerGroups(socket int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[: size/4 : size/4], nil
		case errno == unix.ERANGE && int(size/4) > len(groups):
			groups = make([]uint32, size/4)
		default:
			return nil, errno
		}
	}
}
