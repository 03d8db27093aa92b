// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

package catalog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func init() { ops["receive"] = receive }

// receive waits for a packet with a text, and tries what else could be done with
// the socket. It needs no capability.
func receive(args []string, files []*os.File) (string, []*os.File, error) {
	socket, memory := int(files[0].Fd()), int(files[1].Fd())
	frames, err := unix.Mmap(memory, 0, kernel.PacketFrames*kernel.PacketFrameSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return "", nil, err
	}
	var offsets unix.XDPMmapOffsets
	length := uint32(unsafe.Sizeof(offsets))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&offsets)), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return "", nil, errno
	}
	fill, err := unix.Mmap(socket, unix.XDP_UMEM_PGOFF_FILL_RING, int(offsets.Fr.Desc)+kernel.PacketFrames*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return "", nil, err
	}
	received, err := unix.Mmap(socket, unix.XDP_PGOFF_RX_RING, int(offsets.Rx.Desc)+kernel.PacketFrames*16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return "", nil, err
	}
	at := func(ring []byte, offset uint64) *uint32 { return (*uint32)(unsafe.Pointer(&ring[offset])) }
	for i := range kernel.PacketFrames {
		binary.NativeEndian.PutUint64(fill[int(offsets.Fr.Desc)+8*i:], uint64(i*kernel.PacketFrameSize))
	}
	atomic.StoreUint32(at(fill, offsets.Fr.Producer), kernel.PacketFrames)

	if err := unix.Bind(socket, &unix.SockaddrXDP{Ifindex: 1}); err == nil {
		return "", nil, errors.New("the socket was bound anew")
	}
	if err := unix.SetsockoptInt(socket, unix.SOL_XDP, unix.XDP_TX_RING, 64); err == nil {
		return "", nil, errors.New("the socket can send")
	}
	if err := unix.Ftruncate(memory, 4096); err == nil {
		return "", nil, errors.New("the memory was cut")
	}

	for seen, deadline := uint32(0), time.Now().Add(10*time.Second); time.Now().Before(deadline); {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(socket), Events: unix.POLLIN}}, 100); err != nil && err != unix.EINTR {
			return "", nil, err
		}
		for ; seen != atomic.LoadUint32(at(received, offsets.Rx.Producer)); seen++ {
			descriptor := received[offsets.Rx.Desc+uint64(seen%kernel.PacketFrames)*16:]
			address, size := binary.NativeEndian.Uint64(descriptor), binary.NativeEndian.Uint32(descriptor[8:])
			if packet := frames[address : address+uint64(size)]; bytes.Contains(packet, []byte(args[0])) {
				return "received", nil, nil
			}
		}
	}
	return "", nil, errors.New("no such packet")
}

// A process without capabilities receives real packets, and can do no more.
func TestOpenSocket(t *testing.T) {
	testtarget.NoLeaks(t)
	run(t, "ip", "link", "add", "bbkt0", "type", "veth", "peer", "name", "bbkt1")
	t.Cleanup(func() { run(t, "ip", "link", "del", "bbkt0") })
	for _, args := range []string{"link set bbkt0 up", "link set bbkt1 up", "addr add 198.51.100.1/24 dev bbkt0", "neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev bbkt0"} {
		run(t, "ip", strings.Fields(args)...)
	}
	f := newFixture(t)
	f.object("xsk", "[Object]\nFile=ELF/xsk.bpf.o\n[Map sockets]\nAccess=receive\n[Program on_packet]\nAttach=bbkt1\n")
	packets, device, err := f.OpenSocket("xsk", "sockets", 0, f.self())
	f.check(err)
	if device != "bbkt1" {
		t.Errorf("it receives from %s", device)
	}
	if _, _, err := f.OpenSocket("xsk", "sockets", 0, f.self()); !errors.Is(err, kernel.ErrQueueTaken) {
		t.Errorf("twice: got %v", err)
	}
	for _, queue := range []uint32{2, 1000, 1 << 31} {
		if _, _, err := f.OpenSocket("xsk", "sockets", queue, f.self()); !errors.Is(err, kernel.ErrQueueUnknown) {
			t.Errorf("queue %d: got %v", queue, err)
		}
	}
	if _, _, err := f.OpenSocket("xsk", "nonesuch", 0, f.self()); !errors.Is(err, ErrNoSuchMap) {
		t.Errorf("another map: got %v", err)
	}

	alice := testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})
	stop := make(chan struct{})
	sent := make(chan error, 1)
	go func() {
		conn, err := net.Dial("udp", "198.51.100.2:9")
		for err == nil {
			select {
			case <-stop:
				sent <- conn.Close()
				return
			case <-time.After(time.Millisecond):
				_, err = fmt.Fprint(conn, "over the wire")
			}
		}
		sent <- err
	}()
	answer, _, err := alice.Do("receive", []string{"over the wire"}, packets.Socket, packets.Memory)
	close(stop)
	if err != nil || answer != "received" {
		t.Errorf("%q, %v", answer, err)
	}
	f.check(<-sent)

	// The queue is free when the last holder has closed the socket.
	packets.Close()
	alice.Kill() // which has mapped it
	testtarget.Eventually(t, "the queue is free", func() bool {
		again, _, err := f.OpenSocket("xsk", "sockets", 0, f.self())
		if err == nil {
			again.Close()
		}
		return err == nil
	})
	run(t, "ip", "link", "set", "bbkt1", "name", "bbkt2")
	if _, _, err := f.OpenSocket("xsk", "sockets", 0, f.self()); !errors.Is(err, ErrNotAttached) {
		t.Errorf("without its interface: got %v", err)
	}
}
