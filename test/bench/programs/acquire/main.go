// SPDX-License-Identifier: Apache-2.0

// Command acquire takes samples (sample.h) of calls on a connection that stands,
// from the call's first byte until the whole answer is there:
//
//	acquire socket SOCKET PROFILE   a token, over the socket
//	acquire bus PROFILE             a token, over the bus
//	acquire list                    the grants of all users, over the bus
//
// For a token it has to be in namespaces of its user's. Nothing but system calls
// is between it and the connection, and what it sends is made beforehand.
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
	args := os.Args[1:]
	var sample func() error
	var err error
	switch {
	case len(args) == 3 && args[0] == "socket":
		sample, err = overSocket(args[1], args[2])
	case len(args) == 2 && args[0] == "bus":
		sample, err = overBus("AcquireToken", args[1], map[string]dbus.Variant{})
	case len(args) == 1 && args[0] == "list":
		sample, err = overBus("ListGrants", map[string]dbus.Variant{"all": dbus.MakeVariant(true)})
	default:
		err = errors.New("see main.go")
	}
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

func overSocket(path, profile string) (func() error, error) {
	c, err := dial(path)
	if err != nil {
		return nil, err
	}
	call := fmt.Appendf(nil, `{"method":"org.bpfbroker.Broker.AcquireToken","parameters":{"profile":%q}}`+"\x00", profile)
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
		return c.token()
	}, nil
}

func overBus(member string, args ...any) (func() error, error) {
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
	call, err := encode("org.bpfbroker.Broker1", "/org/bpfbroker/Broker1", "org.bpfbroker.Broker1.Manager", member, args...)
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
		if member == "AcquireToken" {
			return c.token()
		}
		return nil
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
