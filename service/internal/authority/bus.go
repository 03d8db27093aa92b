// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	defaultAddress = "unix:path=/run/dbus/system_bus_socket"

	// dialTimeout is for the connection, the authentication and Hello together.
	dialTimeout = 5 * time.Second
	// writeTimeout is how long a bus that doesn't read may hold up one message.
	writeTimeout = 5 * time.Second

	// maxReply is the largest reply, in bytes, that is read. polkit sends the
	// details back with an entry or two of its own.
	maxReply = 64 << 10
	// maxMessage is the protocol's own limit, in bytes.
	maxMessage = 128 << 20
	// headLen is the length of a message's fixed head, in bytes.
	headLen = 16
)

var errDisconnected = errors.New("the connection to the bus ended")

// A conn is a connection to a message bus that can call methods, and nothing
// else. godbus encodes and decodes, but the socket isn't left to it: its
// connections receive every fd that anybody on the bus sends in a signal and
// close none, and decode signals of up to 32 MiB. Here the socket is read by
// read(2), with which the kernel closes what fds came along (unix(7)), and only
// replies are decoded; the bus passes on only those that were asked for.
type conn struct {
	socket *net.UnixConn

	writing sync.Mutex

	mu     sync.Mutex
	serial uint32
	calls  map[uint32]chan<- *dbus.Message // nil when the connection has ended
}

// dial connects to the first address of a D-Bus address list that answers.
func dial(ctx context.Context, addresses string) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()

	var failed error
	for address := range strings.SplitSeq(addresses, ";") {
		c, err := dialOne(ctx, address)
		if err == nil {
			return c, nil
		}
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

func dialOne(ctx context.Context, address string) (*conn, error) {
	name, err := socketName(address)
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	socket, err := dialer.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	c := &conn{socket: socket.(*net.UnixConn), calls: make(map[uint32]chan<- *dbus.Message)}
	stop := context.AfterFunc(ctx, c.close)

	reader := bufio.NewReader(c.socket)
	if err := authenticate(c.socket, reader); err != nil {
		c.close()
		return nil, err
	}
	go c.read(reader)

	hello := methodCall("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
	replies, err := c.call(hello)
	if err != nil {
		c.close()
		return nil, err
	}
	reply, ok := <-replies
	switch {
	case !stop():
		err = ctx.Err()
	case !ok:
		err = errDisconnected
	case reply.Type != dbus.TypeMethodReply:
		err = replyError(reply)
	default:
		return c, nil
	}
	c.close()
	return nil, err
}

// socketName gives the name of a unix socket, as package net has it, from one
// D-Bus address such as unix:path=/run/dbus/system_bus_socket,guid=...
func socketName(address string) (string, error) {
	pairs, ok := strings.CutPrefix(address, "unix:")
	if !ok {
		return "", fmt.Errorf("cannot use bus address %q: not a unix socket", address)
	}
	for pair := range strings.SplitSeq(pairs, ",") {
		key, value, _ := strings.Cut(pair, "=")
		prefix, ok := map[string]string{"path": "", "abstract": "@"}[key]
		if !ok {
			continue
		}
		value, err := dbus.UnescapeBusAddressValue(value)
		if err != nil {
			return "", fmt.Errorf("cannot use bus address %q: %w", address, err)
		}
		return prefix + value, nil
	}
	return "", fmt.Errorf("cannot use bus address %q: neither path nor abstract", address)
}

// authenticate tells the bus who we are and that we pass fds, in one go: the
// protocol allows it, and sd-bus does the same.
func authenticate(socket *net.UnixConn, reader *bufio.Reader) error {
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	if _, err := socket.Write([]byte("\x00AUTH EXTERNAL " + uid + "\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")); err != nil {
		return err
	}
	for _, want := range []string{"OK ", "AGREE_UNIX_FD"} {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return err
		}
		if !bytes.HasPrefix(line, []byte(want)) {
			return fmt.Errorf("cannot authenticate to the bus: got %.64q where %q should be", line, want)
		}
	}
	return nil
}

func methodCall(destination string, path dbus.ObjectPath, iface, member string, body ...any) *dbus.Message {
	headers := map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(destination),
		dbus.FieldPath:        dbus.MakeVariant(path),
		dbus.FieldInterface:   dbus.MakeVariant(iface),
		dbus.FieldMember:      dbus.MakeVariant(member),
	}
	if len(body) != 0 {
		headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	return &dbus.Message{Type: dbus.TypeMethodCall, Headers: headers, Body: body}
}

// call sends a method call and returns the channel that its reply, of type
// TypeMethodReply or TypeError, will come by. The channel is closed without a
// reply when the connection ends. fds in the message may be closed when call
// returns. An error is about this call only; the connection lives.
func (c *conn) call(message *dbus.Message) (<-chan *dbus.Message, error) {
	reply := make(chan *dbus.Message, 1)
	c.mu.Lock()
	if c.calls == nil {
		c.mu.Unlock()
		close(reply)
		return reply, nil
	}
	serial := c.nextSerial()
	c.calls[serial] = reply
	c.mu.Unlock()

	if err := c.write(message, serial); err != nil {
		c.mu.Lock()
		delete(c.calls, serial)
		c.mu.Unlock()
		return nil, err
	}
	return reply, nil
}

// send sends a method call without fds to which no reply is wanted.
func (c *conn) send(message *dbus.Message) {
	message.Flags |= dbus.FlagNoReplyExpected
	c.mu.Lock()
	serial := c.nextSerial()
	c.mu.Unlock()
	// Only fds give an error here; a dead connection shows in the pending call.
	_ = c.write(message, serial)
}

// nextSerial needs mu. A serial is never 0, nor that of a call that still waits.
func (c *conn) nextSerial() uint32 {
	for {
		c.serial++
		if _, used := c.calls[c.serial]; c.serial != 0 && !used {
			return c.serial
		}
	}
}

// write sends one message. It returns an error when nothing of this message
// could be sent because of what is in it, and ends the connection when it is the
// connection that fails.
func (c *conn) write(message *dbus.Message, serial uint32) error {
	var buffer bytes.Buffer
	fds, err := message.EncodeToWithFDs(&buffer, binary.LittleEndian)
	if err != nil {
		return err
	}
	data := buffer.Bytes()
	// godbus keeps the serial to itself; its place is fixed.
	binary.LittleEndian.PutUint32(data[8:], serial)
	var rights []byte
	if len(fds) != 0 {
		rights = syscall.UnixRights(fds...)
	}

	c.writing.Lock()
	defer c.writing.Unlock()
	err = c.socket.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		var n int
		n, _, err = c.socket.WriteMsgUnix(data, rights, nil)
		if errors.Is(err, syscall.EBADF) || errors.Is(err, syscall.ETOOMANYREFS) {
			return err
		}
		if err == nil && n < len(data) {
			_, err = c.socket.Write(data[n:])
		}
	}
	if err != nil {
		c.close()
	}
	return nil
}

// read hands out replies until the connection ends, and ends it when what comes
// isn't D-Bus.
func (c *conn) read(reader *bufio.Reader) {
	defer c.close()
	for {
		head, err := reader.Peek(headLen)
		if err != nil {
			return
		}
		size, ok := messageSize(head)
		if !ok {
			return
		}
		kind := dbus.Type(head[1])
		if kind != dbus.TypeMethodReply && kind != dbus.TypeError {
			if _, err := reader.Discard(size); err != nil {
				return
			}
			continue
		}
		if size > maxReply {
			return
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(reader, data); err != nil {
			return
		}
		message, err := dbus.DecodeMessage(bytes.NewReader(data))
		if err != nil {
			return
		}
		c.deliver(message)
	}
}

// messageSize gives the length of a message in bytes, from its head.
func messageSize(head []byte) (size int, ok bool) {
	var order binary.ByteOrder
	switch head[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return 0, false
	}
	body := uint64(order.Uint32(head[4:]))
	fields := uint64(order.Uint32(head[12:]))
	total := headLen + (fields+7)&^7 + body
	return int(min(total, math.MaxInt32)), total <= maxMessage
}

func (c *conn) deliver(message *dbus.Message) {
	serial, ok := message.Headers[dbus.FieldReplySerial].Value().(uint32)
	if !ok {
		return
	}
	c.mu.Lock()
	reply, ok := c.calls[serial]
	delete(c.calls, serial)
	c.mu.Unlock()
	if ok {
		reply <- message
	}
}

// close ends the connection and every call on it. It may be called again.
func (c *conn) close() {
	c.mu.Lock()
	calls := c.calls
	c.calls = nil
	c.mu.Unlock()
	// What a failing close of a socket could say is of no use to anybody.
	_ = c.socket.Close()
	for _, reply := range calls {
		close(reply)
	}
}

func (c *conn) alive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls != nil
}

// replyError makes an error of a reply of type TypeError.
func replyError(reply *dbus.Message) error {
	name, _ := reply.Headers[dbus.FieldErrorName].Value().(string)
	var text string
	if len(reply.Body) != 0 {
		text, _ = reply.Body[0].(string)
	}
	return fmt.Errorf("%.128s: %.512q", name, text)
}
