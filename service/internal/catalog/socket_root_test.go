// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

package catalog

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func init() { ops["receive"] = receive }

// receive waits for a packet with a text, and tries what else could be done with
// the socket. It needs no capability.
func receive(args []string, files []*os.File) (string, []*os.File, error) {
	socket, memory := int(files[0].Fd()), int(files[1].Fd())
	if err := unix.Bind(socket, &unix.SockaddrXDP{Ifindex: 1}); err == nil {
		return "", nil, errors.New("the socket was bound anew")
	}
	if err := unix.SetsockoptInt(socket, unix.SOL_XDP, unix.XDP_TX_RING, 64); err == nil {
		return "", nil, errors.New("the socket can send")
	}
	if err := unix.Ftruncate(memory, 4096); err == nil {
		return "", nil, errors.New("the memory was cut")
	}
	reader, err := kernel.NewPacketReader(files[0], files[1], kernel.PacketFrames, kernel.PacketFrameSize)
	if err != nil {
		return "", nil, err
	}
	defer reader.Close()
	if err := reader.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return "", nil, err
	}
	// More than there are frames, so that they go round.
	packet := make([]byte, kernel.PacketFrameSize)
	for seen := 0; seen < 2*kernel.PacketFrames; {
		n, err := reader.Read(packet)
		if err != nil {
			return "", nil, fmt.Errorf("after %d packets: %w", seen, err)
		}
		if bytes.Contains(packet[:n], []byte(args[0])) {
			seen++
		}
	}
	// One that is longer than the room for it.
	if n, err := reader.Read(packet[:4]); n != 4 || err != nil {
		return "", nil, fmt.Errorf("into 4 bytes: %d, %w", n, err)
	}
	return "received", nil, nil
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
	packets, device, err := f.OpenSocket("xsk", "sockets", 0, f.self(), 0)
	f.check(err)
	if device != "bbkt1" {
		t.Errorf("it receives from %s", device)
	}
	if _, _, err := f.OpenSocket("xsk", "sockets", 0, f.self(), 0); !errors.Is(err, kernel.ErrQueueTaken) {
		t.Errorf("twice: got %v", err)
	}
	for _, queue := range []uint32{2, 1000, 1 << 31} {
		if _, _, err := f.OpenSocket("xsk", "sockets", queue, f.self(), 0); !errors.Is(err, kernel.ErrQueueUnknown) {
			t.Errorf("queue %d: got %v", queue, err)
		}
	}
	if _, err := kernel.NewPacketReader(packets.Memory, packets.Memory, kernel.PacketFrames, kernel.PacketFrameSize); err == nil {
		t.Error("memory is taken for a socket")
	}
	if _, err := kernel.NewPacketReader(packets.Socket, packets.Memory, 2*kernel.PacketFrames, kernel.PacketFrameSize); !errors.Is(err, kernel.ErrBadMemory) {
		t.Errorf("more frames than there are: got %v", err)
	}
	if _, _, err := f.OpenSocket("xsk", "nonesuch", 0, f.self(), 0); !errors.Is(err, ErrNoSuchMap) {
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
			case <-time.After(100 * time.Microsecond):
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
	var again *kernel.PacketSocket
	testtarget.Eventually(t, "the queue is free", func() bool {
		again, _, err = f.OpenSocket("xsk", "sockets", 0, f.self(), 0)
		return err == nil
	})

	// Who waits for packets is not kept waiting.
	reader, err := kernel.NewPacketReader(again.Socket, again.Memory, kernel.PacketFrames, kernel.PacketFrameSize)
	f.check(err)
	again.Close()
	f.check(reader.SetReadDeadline(time.Now().Add(10 * time.Millisecond)))
	for err == nil {
		_, err = reader.Read(make([]byte, 64)) // the interfaces have things to say of their own
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: got %v", err)
	}
	f.check(reader.SetReadDeadline(time.Time{}))
	time.AfterFunc(10*time.Millisecond, func() { _ = reader.Close() })
	for err = nil; err == nil; {
		_, err = reader.Read(make([]byte, 64))
	}
	if !errors.Is(err, os.ErrClosed) {
		t.Errorf("when it is closed: got %v", err)
	}

	// What can't be handed out is given up.
	f.object("xsk", "[Object]\nFile=ELF/xsk.bpf.o\nKeep=while-used\n[Map sockets]\nAccess=receive\n[Program on_packet]\nAttach=bbkt1\n")
	f.owners[7] = maxUsersOfOwner
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which gives up what is forgotten
	testtarget.Eventually(t, "a user too many is refused", func() bool {
		_, _, err := f.OpenSocket("xsk", "sockets", 0, f.self(), 7)
		return errors.Is(err, ErrTooManyUsers) // and not that the queue is taken
	})
	testtarget.Eventually(t, "the queue is free again", func() bool {
		again, _, err := f.OpenSocket("xsk", "sockets", 0, f.self(), 0)
		if err == nil {
			again.Close()
		}
		return err == nil
	})

	run(t, "ip", "link", "set", "bbkt1", "name", "bbkt2")
	if _, _, err := f.OpenSocket("xsk", "sockets", 0, f.self(), 0); !errors.Is(err, ErrNotAttached) {
		t.Errorf("without its interface: got %v", err)
	}
}
