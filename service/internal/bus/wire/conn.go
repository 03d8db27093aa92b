// SPDX-License-Identifier: Apache-2.0

// Package wire is a connection to a message bus that strangers can do no harm to.
//
// godbus encodes and decodes, but the socket isn't left to it: its connections
// decode calls and signals of up to 32 MiB before anybody can refuse them, start
// a goroutine for each call, and close none of the fds that come along. Here one
// goroutine reads, bodies have a limit that is looked at before they are read,
// and the only fd that is ever kept is one that was asked for.
package wire

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
)

// defaultAddress is the system bus's usual place.
const defaultAddress = "unix:path=/run/dbus/system_bus_socket"

const (
	busName      = "org.freedesktop.DBus"
	busPath      = "/org/freedesktop/DBus"
	busInterface = "org.freedesktop.DBus"

	// dialTimeout is for the connection, the authentication and Hello together.
	dialTimeout = 5 * time.Second
	// writeTimeout is how long a bus that doesn't read may hold up one message.
	writeTimeout = 5 * time.Second
)

// ErrDisconnected means that the connection to the bus has ended.
var ErrDisconnected = errors.New("the connection to the bus ended")

// A Handler gets what comes in unasked, one message after the other. It must not
// wait: nothing is read meanwhile, no replies either.
type Handler interface {
	// Call gets each method call.
	Call(*Message)
	// Signal gets the bus's own signals. Those of strangers are thrown away.
	Signal(*Message)
}

// A Conn is a connection to a message bus. Its methods may be called
// concurrently, and those that wait for the bus only while Serve runs.
type Conn struct {
	socket *net.UnixConn
	rest   *bufio.Reader
	name   string

	writing sync.Mutex

	mu      sync.Mutex
	serial  uint32
	pending map[uint32]pending // nil when Serve has ended
}

// pending is a call that waits for its answer.
type pending struct {
	done func(*reply)
	// stranger says that the call is to somebody else than the bus, who answers
	// under a name of its own. The bus passes on no answers but those to calls.
	stranger bool
}

// reply is an answer of the bus's. The receiver closes the file, which is nil
// if there was none.
type reply struct {
	*Message
	file *os.File
}

// SystemBus returns the addresses of the system bus: those that
// DBUS_SYSTEM_BUS_ADDRESS has, or its usual place.
func SystemBus() string { return cmp.Or(os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"), defaultAddress) }

// Dial connects to the first address of a D-Bus address list that answers. The
// caller closes the connection.
func Dial(ctx context.Context, addresses string) (*Conn, error) {
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
	return nil, fmt.Errorf("cannot connect to the bus: %w", failed)
}

func dialOne(ctx context.Context, address string) (*Conn, error) {
	name, err := socketName(address)
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	socket, err := dialer.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	c := newConn(socket.(*net.UnixConn))
	stop := context.AfterFunc(ctx, c.Close)
	err = c.begin()
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func newConn(socket *net.UnixConn) *Conn {
	return &Conn{socket: socket, rest: bufio.NewReader(nil), pending: map[uint32]pending{}}
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

// begin authenticates and says Hello, before which the bus sends nothing but its
// answers.
func (c *Conn) begin() error {
	if err := c.authenticate(); err != nil {
		return err
	}
	var hello *reply
	if _, err := c.send(busCall("Hello", nil), pending{done: func(r *reply) { hello = r }}); err != nil {
		return err
	}
	for hello == nil {
		if err := c.receive(nil); err != nil {
			return err
		}
	}
	closeFile(hello.file)
	if hello.Type != dbus.TypeMethodReply {
		return hello.Err()
	}
	return hello.Decode(&c.name)
}

// authenticate tells the bus who we are and that we pass fds, in one go: the
// protocol allows it, and sd-bus does the same.
func (c *Conn) authenticate() error {
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	if _, err := c.socket.Write([]byte("\x00AUTH EXTERNAL " + uid + "\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")); err != nil {
		return err
	}
	for _, want := range []string{"OK ", "AGREE_UNIX_FD"} {
		line, err := c.readLine()
		if err != nil {
			return err
		}
		if !strings.HasPrefix(line, want) {
			return fmt.Errorf("cannot authenticate to the bus: got %.64q where %q should be", line, want)
		}
	}
	return nil
}

// readLine reads no further than the line's end, where messages begin.
func (c *Conn) readLine() (string, error) {
	var line [256]byte
	for n := range line {
		if _, err := io.ReadFull(c.socket, line[n:n+1]); err != nil {
			return "", err
		}
		if line[n] == '\n' {
			return string(line[:n]), nil
		}
	}
	return "", errors.New("cannot authenticate to the bus: a line without end")
}

// Name returns the connection's unique name.
func (c *Conn) Name() string { return c.name }

// Serve reads until the connection ends, and returns why. A nil handler is for
// connections that only call.
func (c *Conn) Serve(h Handler) error {
	for {
		err := c.receive(h)
		if err == nil {
			continue
		}
		c.Close()
		c.mu.Lock()
		pending := c.pending
		c.pending = nil
		c.mu.Unlock()
		for _, p := range pending {
			p.done(nil)
		}
		return fmt.Errorf("%w: %v", ErrDisconnected, err)
	}
}

// Close ends the connection, and so Serve. It may be called again.
func (c *Conn) Close() {
	// What a failing close of a socket could say is of no use to anybody.
	_ = c.socket.Close()
}

// receive reads one message and hands it on.
func (c *Conn) receive(h Handler) error {
	var data [headLen]byte
	file, err := c.readHead(data[:])
	// Closed here unless somebody takes it.
	defer func() { closeFile(file) }()
	if err != nil {
		return err
	}
	m, err := parseHead(data[:])
	if err != nil {
		return err
	}
	// Of this message and no other: the next one's fds come with its first byte.
	rest := &io.LimitedReader{R: c.socket, N: int64(m.Size - headLen)}
	c.rest.Reset(rest)
	unreadable := m.readRest(c.rest)
	if unreadable != nil && !errors.Is(unreadable, errUnreadable) {
		return unreadable
	}
	if _, err := io.Copy(io.Discard, rest); err != nil {
		return err
	}
	if rest.N > 0 {
		return io.ErrUnexpectedEOF
	}
	switch {
	case unreadable != nil || h == nil && m.Type != dbus.TypeMethodReply && m.Type != dbus.TypeError:
	case m.Type == dbus.TypeMethodCall:
		h.Call(&m.Message)
	case m.Type != dbus.TypeSignal:
		if done := c.answered(&m.Message); done != nil {
			done(&reply{&m.Message, file})
			file = nil
		}
	case m.Sender == busName:
		h.Signal(&m.Message)
	}
	return nil
}

// readHead reads a message's fixed part. The fds that come with a message come
// with its first byte (libdbus and dbus-broker send them so); those beyond the
// room for them the kernel closes (unix(7)), and all but the first are closed
// here. The rest of a message is read by read(2), with which the kernel closes
// all of them.
func (c *Conn) readHead(head []byte) (file *os.File, err error) {
	control := make([]byte, syscall.CmsgSpace(4))
	for n := 0; n < len(head); {
		read, controlLen, _, _, err := c.socket.ReadMsgUnix(head[n:], control)
		if taken := takeFile(control[:controlLen]); file == nil {
			file = taken
		} else {
			closeFile(taken)
		}
		if err != nil {
			return file, err
		}
		n += read
	}
	return file, nil
}

// takeFile returns the first of the fds in control messages, and closes the
// others. They are close-on-exec (Go sets MSG_CMSG_CLOEXEC).
func takeFile(control []byte) (file *os.File) {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, message := range messages {
		// An error is another kind of message.
		fds, _ := syscall.ParseUnixRights(&message)
		for _, fd := range fds {
			if file == nil {
				file = os.NewFile(uintptr(fd), "from the bus")
			} else {
				_ = syscall.Close(fd)
			}
		}
	}
	return file
}

// closeFile closes a file that may be nil. It came from the bus, which has no
// error to tell.
func closeFile(file *os.File) {
	if file != nil {
		_ = file.Close()
	}
}

func busCall(member string, args []any) *dbus.Message {
	return newMessage(dbus.TypeMethodCall, args, map[dbus.HeaderField]any{
		dbus.FieldDestination: busName,
		dbus.FieldPath:        dbus.ObjectPath(busPath),
		dbus.FieldInterface:   busInterface,
		dbus.FieldMember:      member,
	})
}

// Start calls a method of the bus's own and lets done have the answer, or nil
// when there is none but an error. done is called by Serve, which it must not
// hold up; it isn't called when Start returns an error.
func (c *Conn) Start(member string, done func(*Message), args ...any) error {
	return c.start(busCall(member, args), false, func(m *Message) {
		if m != nil && m.Type != dbus.TypeMethodReply {
			m = nil
		}
		done(m)
	})
}

// Method is a method of another connection's.
type Method struct {
	Destination       string
	Path              dbus.ObjectPath
	Interface, Member string
}

// Ask calls a method and lets done have the answer, an error too (Err), or nil
// when the connection ends. done is called as by Start. Files among the arguments,
// as dbus.UnixFD, stay the caller's.
func (c *Conn) Ask(method Method, done func(*Message), args ...any) error {
	return c.start(newMessage(dbus.TypeMethodCall, args, map[dbus.HeaderField]any{
		dbus.FieldDestination: method.Destination,
		dbus.FieldPath:        method.Path,
		dbus.FieldInterface:   method.Interface,
		dbus.FieldMember:      method.Member,
	}), true, done)
}

// start sends a call whose answer comes without files.
func (c *Conn) start(call *dbus.Message, stranger bool, done func(*Message)) error {
	_, err := c.send(call, pending{stranger: stranger, done: func(r *reply) {
		if r == nil {
			done(nil)
			return
		}
		closeFile(r.file)
		done(r.Message)
	}})
	return err
}

// Tell calls a method of the bus's own whose answer doesn't matter.
func (c *Conn) Tell(member string, args ...any) {
	call := busCall(member, args)
	call.Flags |= dbus.FlagNoReplyExpected
	// A connection that has ended shows elsewhere.
	_, _ = c.send(call, pending{})
}

// Call calls a method of the bus's own. The error may be ErrDisconnected.
func (c *Conn) Call(member string, args ...any) (*Message, error) {
	m, file, err := c.CallForFile(member, args...)
	closeFile(file)
	return m, err
}

// CallForFile is Call for an answer that has a file descriptor. The caller closes
// the file; it is nil if there was none.
func (c *Conn) CallForFile(member string, args ...any) (*Message, *os.File, error) {
	replies := make(chan *reply, 1)
	if _, err := c.send(busCall(member, args), pending{done: func(r *reply) { replies <- r }}); err != nil {
		return nil, nil, err
	}
	r := <-replies
	switch {
	case r == nil:
		return nil, nil, ErrDisconnected
	case r.Type != dbus.TypeMethodReply:
		closeFile(r.file)
		return nil, nil, r.Err()
	}
	return r.Message, r.file, nil
}

// Err returns an error reply as an error, and nil for other messages.
func (m *Message) Err() error {
	if m.Type != dbus.TypeError {
		return nil
	}
	var text string
	if strings.HasPrefix(m.Signature, "s") {
		// Without a text there is still the name.
		_ = m.Decode(&text)
	}
	return fmt.Errorf("%.128s: %.512q", m.ErrorName, text)
}

// Reply answers a call. What is wrong with the values is an error, after which
// another answer can be sent.
func (c *Conn) Reply(to *Message, values ...any) error {
	_, err := c.send(replyTo(to, values), pending{})
	return err
}

// Deliver is Reply for an answer that must arrive. It returns when the bus has
// passed it on, and it is an error if it could not. Files among the values, as
// dbus.UnixFD, stay the caller's.
func (c *Conn) Deliver(to *Message, values ...any) error {
	var refused error
	serial, err := c.send(replyTo(to, values), pending{done: func(r *reply) {
		if r != nil {
			closeFile(r.file)
			refused = r.Err()
		}
	}})
	if err != nil {
		return err
	}
	// The bus takes one message after the other, so its answer to this call comes
	// after what it has to say of the one before.
	_, err = c.Call("GetId")
	c.forget(serial)
	return errors.Join(refused, err)
}

// ReplyError answers a call with an error.
func (c *Conn) ReplyError(to *Message, name, text string) {
	// Nobody hears of a text that can't be sent, or after the connection's end.
	_, _ = c.send(newMessage(dbus.TypeError, []any{text}, map[dbus.HeaderField]any{
		dbus.FieldDestination: to.Sender,
		dbus.FieldReplySerial: to.serial,
		dbus.FieldErrorName:   name,
	}), pending{})
}

// Signal sends a signal to one connection.
func (c *Conn) Signal(destination string, path dbus.ObjectPath, iface, member string, values ...any) error {
	_, err := c.send(newMessage(dbus.TypeSignal, values, map[dbus.HeaderField]any{
		dbus.FieldDestination: destination,
		dbus.FieldPath:        path,
		dbus.FieldInterface:   iface,
		dbus.FieldMember:      member,
	}), pending{})
	return err
}

func replyTo(to *Message, values []any) *dbus.Message {
	return newMessage(dbus.TypeMethodReply, values, map[dbus.HeaderField]any{
		dbus.FieldDestination: to.Sender,
		dbus.FieldReplySerial: to.serial,
	})
}

func newMessage(kind dbus.Type, body []any, fields map[dbus.HeaderField]any) *dbus.Message {
	m := &dbus.Message{Type: kind, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{}}
	for field, value := range fields {
		m.Headers[field] = dbus.MakeVariant(value)
	}
	if len(body) == 0 {
		return m
	}
	if a, ok := body[0].(*Array); ok {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.ParseSignatureMust(a.signature))
	} else {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	return m
}

// send sends a message. If it has done, that gets the answer, or nil when Serve
// ends, by which it is called. After an error it isn't called, and nothing was
// sent.
func (c *Conn) send(message *dbus.Message, p pending) (serial uint32, err error) {
	data, fds, err := encode(message)
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	if c.pending == nil {
		c.mu.Unlock()
		return 0, ErrDisconnected
	}
	serial = c.nextSerial()
	if p.done != nil {
		c.pending[serial] = p
	}
	c.mu.Unlock()
	// godbus keeps the serial to itself; its place is fixed.
	binary.LittleEndian.PutUint32(data[8:], serial)
	if err := c.write(data, fds); err != nil {
		c.forget(serial)
		return 0, err
	}
	return serial, nil
}

// encode gives a message's bytes and its fds, which are the UnixFDs among its
// values. godbus panics on some values that it can't encode.
func encode(message *dbus.Message) (data []byte, fds []int, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("cannot encode a message: %v", v)
		}
	}()
	if len(message.Body) == 1 {
		if a, ok := message.Body[0].(*Array); ok {
			data, err = a.encode(message)
			return data, nil, err
		}
	}
	var buffer bytes.Buffer
	fds, err = message.EncodeToWithFDs(&buffer, binary.LittleEndian)
	if err == nil && len(fds) > 0 {
		// Their number stands before them.
		message.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(len(fds)))
		buffer.Reset()
		fds, err = message.EncodeToWithFDs(&buffer, binary.LittleEndian)
	}
	return buffer.Bytes(), fds, err
}

// nextSerial needs mu. A serial is never 0, nor that of a call that still waits.
func (c *Conn) nextSerial() uint32 {
	for {
		c.serial++
		if _, used := c.pending[c.serial]; c.serial != 0 && !used {
			return c.serial
		}
	}
}

// answered returns what gets an answer, nil if nobody waits for one of its sender.
func (c *Conn) answered(m *Message) func(*reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pending[m.replySerial]
	if !p.stranger && m.Sender != busName {
		return nil
	}
	delete(c.pending, m.replySerial)
	return p.done
}

// forget has an answer thrown away.
func (c *Conn) forget(serial uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, serial)
}

// write sends one message. It returns an error when nothing of it could be sent
// because of its fds, and ends the connection when it is the connection that
// fails.
func (c *Conn) write(data []byte, fds []int) error {
	var rights []byte
	if len(fds) != 0 {
		rights = syscall.UnixRights(fds...)
	}
	c.writing.Lock()
	err := c.socket.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		var n int
		n, _, err = c.socket.WriteMsgUnix(data, rights, nil)
		if errors.Is(err, syscall.EBADF) || errors.Is(err, syscall.ETOOMANYREFS) {
			c.writing.Unlock()
			return err
		}
		if err == nil && n < len(data) {
			_, err = c.socket.Write(data[n:])
		}
	}
	c.writing.Unlock()
	if err != nil {
		c.Close()
	}
	return nil
}
