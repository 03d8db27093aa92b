// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The memory of a packet socket: so many frames of so many bytes each. The rings
// have as many entries.
const (
	PacketFrames    = 1024
	PacketFrameSize = 2048
)

// PacketSocket is an AF_XDP socket that receives, and the memory that the kernel
// copies packets into. Whoever has both files maps them, and the socket's rings,
// and needs no privilege for that.
type PacketSocket struct {
	Socket, Memory *os.File
}

var (
	// ErrQueueUnknown means that an interface has no such queue.
	ErrQueueUnknown = errors.New("the interface has no such queue")
	// ErrQueueTaken means that there is a socket for a queue already.
	ErrQueueTaken = errors.New("somebody receives from that queue already")
)

// NewPacketSocket makes a packet socket for one queue of an interface. It can't be
// bound anew, and sends nothing: a socket gets its rings before it is bound. It
// receives what an XDP program redirects to it. Needs CAP_NET_RAW. The caller
// closes both files.
func NewPacketSocket(ifindex, queue uint32) (_ *PacketSocket, err error) {
	const size = PacketFrames * PacketFrameSize
	if queue > math.MaxUint16 {
		return nil, ErrQueueUnknown // the kernel would take its lower half
	}
	fd, err := unix.MemfdCreate("packets", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return nil, fmt.Errorf("cannot make memory for packets: %w", err)
	}
	p := &PacketSocket{Memory: os.NewFile(uintptr(fd), "packets")}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if err := unix.Ftruncate(fd, size); err != nil {
		return nil, fmt.Errorf("cannot make memory for packets: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, fmt.Errorf("cannot seal the memory for packets: %w", err)
	}
	memory, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("cannot map the memory for packets: %w", err)
	}
	// The socket holds the pages.
	defer func() { _ = unix.Munmap(memory) }()

	socket, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err == unix.EAFNOSUPPORT {
		return nil, fmt.Errorf("cannot make a packet socket: AF_XDP is %w", ErrNotSupported)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a packet socket: %w", err)
	}
	p.Socket = os.NewFile(uintptr(socket), "socket")
	registration := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(&memory[0]))), Len: size, Size: PacketFrameSize}
	if err := setPacketOption(socket, unix.XDP_UMEM_REG, unsafe.Pointer(&registration), unsafe.Sizeof(registration)); err != nil {
		return nil, fmt.Errorf("cannot register the memory for packets: %w", err)
	}
	for _, ring := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_RX_RING} {
		if err := unix.SetsockoptInt(socket, unix.SOL_XDP, ring, PacketFrames); err != nil {
			return nil, fmt.Errorf("cannot make a packet socket's rings: %w", err)
		}
	}
	// XDP_COPY, as not every driver can do without.
	err = unix.Bind(socket, &unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: ifindex, QueueID: queue})
	switch err {
	case nil:
		return p, nil
	case unix.EINVAL:
		return nil, ErrQueueUnknown
	case unix.EBUSY:
		return nil, ErrQueueTaken
	}
	return nil, fmt.Errorf("cannot bind a packet socket: %w", err)
}

func setPacketOption(socket, option int, value unsafe.Pointer, length uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(socket), unix.SOL_XDP, uintptr(option), uintptr(value), length, 0)
	runtime.KeepAlive(value)
	if errno != 0 {
		return errno
	}
	return nil
}

// Close closes both files.
func (p *PacketSocket) Close() {
	for _, file := range []*os.File{p.Socket, p.Memory} {
		if file != nil {
			_ = file.Close()
		}
	}
}
