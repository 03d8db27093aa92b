// SPDX-License-Identifier: Apache-2.0

// Command acquire takes samples (sample.h) of calls on a connection that stands,
// from the call's first byte until the whole answer is there:
//
//	acquire token FRONT PROFILE   a token
//	acquire map FRONT             the map "packets" of the object "bench"
//	acquire ping FRONT            an answer
//	acquire list bus              the grants of all users
//
// FRONT is socket or bus. For a token it has to be in namespaces of its user's.
// Nothing but system calls is between it and the connection, and what it sends is
// made beforehand.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"time"
	"unsafe"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 3 {
		log.Fatal("see main.go")
	}
	sample, err := sampler(os.Args[1], os.Args[2], strings.Join(os.Args[3:], " "))
	input := bufio.NewScanner(os.Stdin)
	for err == nil && input.Scan() {
		start := time.Now()
		err = sample()
		fmt.Println(time.Since(start).Nanoseconds())
	}
	if err != nil {
		log.Fatal(err)
	}
}

const (
	brokerSocket  = "/run/bpfbroker/org.bpfbroker.Broker"
	brokerName    = "org.bpfbroker.Broker1"
	brokerPath    = "/org/bpfbroker/Broker1"
	brokerManager = "org.bpfbroker.Broker1.Manager"
)

// sampler returns what makes a call and takes the file that comes with its answer.
func sampler(what, front, profile string) (func() error, error) {
	none := map[string]dbus.Variant{}
	switch what + " " + front {
	case "token socket":
		return overSocket((*conn).token, "org.bpfbroker.Broker.AcquireToken", fmt.Sprintf(`{"profile":%q}`, profile))
	case "token bus":
		return overBus((*conn).token, brokerManager, "AcquireToken", profile, none)
	case "map socket":
		return overSocket((*conn).closeFile, "org.bpfbroker.Broker.OpenMap", `{"object":"bench","map":"packets","access":"read-only"}`)
	case "map bus":
		return overBus((*conn).closeFile, brokerManager, "OpenMap", "bench", "packets", "read-only", none)
	case "ping socket":
		return overSocket((*conn).nothing, "org.varlink.service.GetInfo", "{}")
	case "ping bus":
		return overBus((*conn).nothing, "org.freedesktop.DBus.Peer", "Ping")
	case "list bus":
		return overBus((*conn).nothing, brokerManager, "ListGrants", map[string]dbus.Variant{"all": dbus.MakeVariant(true)})
	}
	return nil, errors.New("see main.go")
}

// conn is a connection with one call under way.
type conn struct {
	fd     int
	buffer []byte
	length int
	file   int // that came with the answer, or -1
}

func dial(path string) (*conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &conn{fd: fd, buffer: make([]byte, 8<<20), file: -1}, unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// receive reads until enough says that the answer is whole.
func (c *conn) receive(enough func([]byte) bool) error {
	var control [64]byte
	for c.length = 0; !enough(c.buffer[:c.length]); {
		n, controlLen, _, _, err := unix.Recvmsg(c.fd, c.buffer[c.length:], control[:], unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return fmt.Errorf("no answer: %d, %w", n, err)
		}
		c.length += n
		if controlLen > 0 {
			c.file = int(*(*int32)(unsafe.Pointer(&control[unix.CmsgLen(0)])))
		}
	}
	return nil
}

// token makes a token of the file that came, and gives both up.
func (c *conn) token() error {
	directory, err := unix.Openat(c.file, ".", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	attr := struct{ flags, bpffs uint32 }{0, uint32(directory)}
	const tokenCreate = 36
	token, _, errno := unix.Syscall(unix.SYS_BPF, tokenCreate, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return fmt.Errorf("cannot create a token: %w", errno)
	}
	return errors.Join(unix.Close(int(token)), unix.Close(directory), unix.Close(c.file))
}

// closeFile gives up the file that came.
func (c *conn) closeFile() error { return unix.Close(c.file) }

// nothing is for answers that have no file.
func (c *conn) nothing() error { return nil }

func overSocket(take func(*conn) error, method, parameters string) (func() error, error) {
	c, err := dial(brokerSocket)
	if err != nil {
		return nil, err
	}
	call := fmt.Appendf(nil, `{"method":%q,"parameters":%s}`+"\x00", method, parameters)
	return func() error {
		if _, err := unix.Write(c.fd, call); err != nil {
			return err
		}
		if err := c.receive(func(b []byte) bool { return len(b) > 0 && b[len(b)-1] == 0 }); err != nil {
			return err
		}
		if bytes.Contains(c.buffer[:c.length], []byte(`"error"`)) {
			return fmt.Errorf("refused: %s", c.buffer[:c.length])
		}
		return take(c)
	}, nil
}

func overBus(take func(*conn) error, iface, member string, args ...any) (func() error, error) {
	c, err := dial("/run/dbus/system_bus_socket")
	if err != nil {
		return nil, err
	}
	// Without a uid, which is another one in here, the bus takes that of the
	// connection.
	for _, step := range []struct{ say, hear string }{{"\x00AUTH EXTERNAL\r\n", "DATA"}, {"DATA\r\n", "OK"}, {"NEGOTIATE_UNIX_FD\r\n", "AGREE_UNIX_FD"}} {
		if _, err := unix.Write(c.fd, []byte(step.say)); err != nil {
			return nil, err
		}
		if err := c.receive(func(b []byte) bool { return bytes.HasSuffix(b, []byte("\r\n")) }); err != nil {
			return nil, err
		}
		if !strings.HasPrefix(string(c.buffer[:c.length]), step.hear) {
			return nil, fmt.Errorf("the bus says %q", c.buffer[:c.length])
		}
	}
	hello, err := encode("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
	if err != nil {
		return nil, err
	}
	if _, err := unix.Write(c.fd, append([]byte("BEGIN\r\n"), hello...)); err != nil {
		return nil, err
	}
	// Its answer, and the signal that we have a name.
	if err := c.receive(func(b []byte) bool { return len(b) >= size(b) && len(b) >= size(b)+size(b[size(b):]) }); err != nil {
		return nil, err
	}
	call, err := encode(brokerName, brokerPath, iface, member, args...)
	if err != nil {
		return nil, err
	}
	return func() error {
		if _, err := unix.Write(c.fd, call); err != nil {
			return err
		}
		if err := c.receive(func(b []byte) bool { return len(b) >= size(b) }); err != nil {
			return err
		}
		if dbus.Type(c.buffer[1]) != dbus.TypeMethodReply {
			return fmt.Errorf("refused: %q", c.buffer[:c.length])
		}
		return take(c)
	}, nil
}

// size is a message's length, as far as its beginning says it.
func size(b []byte) int {
	if len(b) < 16 {
		return 16
	}
	return 16 + (int(binary.LittleEndian.Uint32(b[12:]))+7)&^7 + int(binary.LittleEndian.Uint32(b[4:]))
}

func encode(destination string, path dbus.ObjectPath, iface, member string, args ...any) ([]byte, error) {
	m := &dbus.Message{Type: dbus.TypeMethodCall, Body: args, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(destination),
		dbus.FieldPath:        dbus.MakeVariant(path),
		dbus.FieldInterface:   dbus.MakeVariant(iface),
		dbus.FieldMember:      dbus.MakeVariant(member),
	}}
	if len(args) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(args...))
	}
	var data bytes.Buffer
	err := m.EncodeTo(&data, binary.LittleEndian)
	// The serial, which godbus keeps to itself; one call at a time needs no other.
	if err == nil {
		binary.LittleEndian.PutUint32(data.Bytes()[8:], 1)
	}
	return data.Bytes(), err
}
