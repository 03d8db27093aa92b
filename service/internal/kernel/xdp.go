// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
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

// PacketReader takes packets out of a packet socket. It needs no privilege.
type PacketReader struct {
	socket   *os.File
	conn     syscall.RawConn
	closed   atomic.Bool
	mapped   [][]byte
	memory   []byte
	size     int // of a frame
	received ring
	fill     ring
}

// ring is one of a socket's rings: of descriptors of so many bytes each.
type ring struct {
	producer, consumer *uint32
	descriptors        []byte
	entries            uint32
}

// at returns the descriptor with that running number.
func (r *ring) at(n uint32, size int) []byte {
	return r.descriptors[int(n%r.entries)*size:][:size]
}

// The sizes of descriptors (struct xdp_desc of linux/if_xdp.h, and an address).
const (
	packetDescriptor = 16
	fillDescriptor   = 8
)

// ErrBadMemory means that the memory isn't as large as was said.
var ErrBadMemory = errors.New("the memory for packets has another size")

// NewPacketReader maps a packet socket's rings, with that many entries, and its
// memory, of so many frames of that size, and gives all of it to the kernel for
// packets. There is one reader for a socket. Both files stay the caller's; the
// caller closes the reader.
func NewPacketReader(socket, memory *os.File, frames, frameSize int) (_ *PacketReader, err error) {
	const most = 1 << 20
	if frames <= 0 || frames > most || frames&(frames-1) != 0 || frameSize <= 0 || frameSize > most || frameSize&(frameSize-1) != 0 {
		return nil, ErrBadMemory
	}
	info, err := memory.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot look at the memory for packets: %w", err)
	}
	if info.Size() != int64(frames)*int64(frameSize) {
		return nil, ErrBadMemory // beyond its end there is no memory
	}
	fd, err := Dup(socket)
	if err != nil {
		return nil, err
	}
	r := &PacketReader{size: frameSize}
	defer func() {
		if err != nil {
			_ = r.Close()
		}
	}()
	// So that the runtime waits for packets, and not a thread.
	err = unix.SetNonblock(fd, true)
	r.socket = os.NewFile(uintptr(fd), "packets")
	if err != nil {
		return nil, fmt.Errorf("cannot use a packet socket: %w", err)
	}
	if r.conn, err = r.socket.SyscallConn(); err != nil {
		return nil, fmt.Errorf("cannot use a packet socket: %w", err)
	}
	var offsets unix.XDPMmapOffsets
	length := uint32(unsafe.Sizeof(offsets))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&offsets)), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return nil, fmt.Errorf("cannot use a packet socket: %w", errno)
	}
	if r.memory, err = r.mmap(int(memory.Fd()), 0, frames*frameSize, unix.PROT_READ); err != nil {
		return nil, err
	}
	if r.received, err = r.ring(fd, unix.XDP_PGOFF_RX_RING, offsets.Rx, frames, packetDescriptor); err != nil {
		return nil, err
	}
	if r.fill, err = r.ring(fd, unix.XDP_UMEM_PGOFF_FILL_RING, offsets.Fr, frames, fillDescriptor); err != nil {
		return nil, err
	}
	for i := range frames {
		r.give(uint64(i * frameSize))
	}
	return r, nil
}

func (r *PacketReader) mmap(fd int, offset int64, size, protection int) ([]byte, error) {
	data, err := unix.Mmap(fd, offset, size, protection, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("cannot map a packet socket's memory: %w", err)
	}
	r.mapped = append(r.mapped, data)
	return data, nil
}

func (r *PacketReader) ring(fd int, at int64, offset unix.XDPRingOffset, entries, size int) (ring, error) {
	data, err := r.mmap(fd, at, int(offset.Desc)+entries*size, unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return ring{}, err
	}
	return ring{
		producer:    (*uint32)(unsafe.Pointer(&data[offset.Producer])),
		consumer:    (*uint32)(unsafe.Pointer(&data[offset.Consumer])),
		descriptors: data[offset.Desc:],
		entries:     uint32(entries),
	}, nil
}

// give gives a frame to the kernel. There is room for all of them.
func (r *PacketReader) give(frame uint64) {
	next := atomic.LoadUint32(r.fill.producer)
	binary.NativeEndian.PutUint64(r.fill.at(next, fillDescriptor), frame)
	atomic.StoreUint32(r.fill.producer, next+1)
}

// take copies a packet out of the memory, if there is one.
func (r *PacketReader) take(packet []byte) (n int, ok bool, err error) {
	next := atomic.LoadUint32(r.received.consumer)
	if next == atomic.LoadUint32(r.received.producer) {
		return 0, false, nil
	}
	descriptor := r.received.at(next, packetDescriptor)
	address, length := binary.NativeEndian.Uint64(descriptor), uint64(binary.NativeEndian.Uint32(descriptor[8:]))
	end := uint64(len(r.memory))
	if address > end || length > end-address {
		return 0, true, ErrBadMemory
	}
	n = copy(packet, r.memory[address:address+length])
	atomic.StoreUint32(r.received.consumer, next+1)
	r.give(address &^ uint64(r.size-1))
	return n, true, nil
}

// Read waits for a packet and copies as much of it as there is room for; the rest
// is lost. The error is os.ErrClosed, os.ErrDeadlineExceeded, or what keeps the
// socket from being used.
func (r *PacketReader) Read(packet []byte) (n int, err error) {
	waited := r.conn.Read(func(uintptr) (ok bool) {
		n, ok, err = r.take(packet)
		return ok
	})
	if waited != nil && r.closed.Load() {
		waited = os.ErrClosed // which it doesn't say by itself
	}
	return n, cmp.Or(waited, err)
}

// SetReadDeadline is the time after which Read fails; the zero time is never.
func (r *PacketReader) SetReadDeadline(t time.Time) error { return r.socket.SetReadDeadline(t) }

// Close ends a Read that is under way, and gives the rings and the memory up.
func (r *PacketReader) Close() error {
	r.closed.Store(true)
	err := r.socket.Close() // waits for Read
	for _, data := range r.mapped {
		err = errors.Join(err, unix.Munmap(data))
	}
	r.mapped = nil
	return err
}
