// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/godbus/dbus/v5"
)

const (
	// headLen is the length of a message's fixed head, in bytes.
	headLen = 16
	// maxMessage is the protocol's own limit, in bytes.
	maxMessage = 128 << 20
	// maxText is the longest text that is read of a header field, in bytes.
	// Names have 255 at most; a longer path is none of ours and is read as "".
	maxText = 512
)

// MaxBody is the longest body of a call that is read, in bytes. The longest
// path, in MountToken, is half of it.
const MaxBody = 8 << 10

// maxReply is the same for answers, and the bus's own messages: its credentials of
// a connection have up to 65536 groups.
const maxReply = 512 << 10

// A Message is a message that came in.
type Message struct {
	Type  dbus.Type
	Flags dbus.Flags
	// Path, Interface, Member, ErrorName, Sender and Signature are header
	// fields, "" for those that aren't there.
	Path, Interface, Member, ErrorName, Sender, Signature string
	// Size is the length in bytes.
	Size int
	// TooLarge says that the body was thrown away.
	TooLarge bool

	serial, replySerial uint32
	order               binary.ByteOrder
	body                []byte
}

// Decode reads the arguments, as dbus.Store does. Whoever called it chose the
// signature, so that is to be looked at first.
func (m *Message) Decode(into ...any) error {
	signature, err := dbus.ParseSignature(m.Signature)
	if err != nil {
		return fmt.Errorf("cannot read a signature: %w", err)
	}
	// godbus decodes a body only behind a header.
	head := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(uint32(1)),
		dbus.FieldSignature:   dbus.MakeVariant(signature),
	}}
	var data bytes.Buffer
	if err := head.EncodeTo(&data, m.order); err != nil {
		return err
	}
	m.order.PutUint32(data.Bytes()[4:], uint32(len(m.body)))
	data.Write(m.body)
	message, err := dbus.DecodeMessage(&data)
	if err != nil {
		return fmt.Errorf("cannot decode arguments: %w", err)
	}
	return dbus.Store(message.Body, into...)
}

// head is the fixed part of a message.
type head struct {
	Message
	fields, body int // their lengths in bytes
}

// parseHead reads the fixed part. A message that isn't D-Bus ends it all.
func parseHead(data []byte) (*head, error) {
	h := &head{}
	switch data[0] {
	case 'l':
		h.order = binary.LittleEndian
	case 'B':
		h.order = binary.BigEndian
	default:
		return nil, errors.New("cannot read a message: not D-Bus")
	}
	h.Type = dbus.Type(data[1])
	h.Flags = dbus.Flags(data[2])
	h.serial = h.order.Uint32(data[8:])
	body, fields := uint64(h.order.Uint32(data[4:])), uint64(h.order.Uint32(data[12:]))
	size := headLen + (fields+7)&^7 + body
	if size > maxMessage {
		return nil, errors.New("cannot read a message: longer than the protocol allows")
	}
	h.Size, h.fields, h.body = int(size), int(fields), int(body)
	return h, nil
}

// limit is how much of a body is read.
func (h *head) limit() int {
	switch {
	case h.Type == dbus.TypeMethodCall:
		return MaxBody
	case h.Type != dbus.TypeSignal, h.Sender == busName:
		return maxReply
	}
	return 0
}

// errUnreadable means that the header fields can't be made out. Unknown fields
// can be of any type, and strangers can send them.
var errUnreadable = errors.New("cannot read a message's header fields")

// readRest reads what follows the fixed part, and no more.
func (h *head) readRest(r *bufio.Reader) error {
	fields := fieldReader{r: r, order: h.order, end: h.fields}
	if err := fields.readInto(&h.Message); err != nil {
		return err
	}
	if err := fields.align(8); err != nil {
		return err
	}
	if h.TooLarge = h.body > h.limit(); h.TooLarge {
		return nil // the caller discards it
	}
	h.Message.body = make([]byte, h.body)
	_, err := io.ReadFull(r, h.Message.body)
	return err
}

// fieldReader reads header fields, an a(yv), without holding more than maxText
// of any.
type fieldReader struct {
	r        *bufio.Reader
	order    binary.ByteOrder
	pos, end int
	buffer   [maxText]byte
}

func (f *fieldReader) readInto(m *Message) error {
	seen := [256]bool{}
	for f.pos < f.end {
		if err := f.align(8); err != nil {
			return err
		}
		code, err := f.take(1)
		if err != nil {
			return err
		}
		field := code[0]
		if seen[field] {
			return errUnreadable
		}
		seen[field] = true
		text, number, err := f.variant()
		if err != nil {
			return err
		}
		switch dbus.HeaderField(field) {
		case dbus.FieldPath:
			m.Path = text
		case dbus.FieldInterface:
			m.Interface = text
		case dbus.FieldMember:
			m.Member = text
		case dbus.FieldErrorName:
			m.ErrorName = text
		case dbus.FieldSender:
			m.Sender = text
		case dbus.FieldSignature:
			m.Signature = text
		case dbus.FieldReplySerial:
			m.replySerial = number
		}
	}
	return nil
}

// variant reads a variant of the types that known fields have.
func (f *fieldReader) variant() (text string, number uint32, err error) {
	signature, err := f.text(1)
	if err != nil {
		return "", 0, err
	}
	switch signature {
	case "s", "o":
		text, err = f.text(4)
	case "g":
		text, err = f.text(1)
	case "u":
		number, err = f.number(4)
	default:
		err = errUnreadable
	}
	return text, number, err
}

// text reads a text with a length of so many bytes before it and a NUL behind.
func (f *fieldReader) text(lengthSize int) (string, error) {
	length, err := f.number(lengthSize)
	if err != nil {
		return "", err
	}
	if length >= maxText {
		return "", f.skip(int64(length) + 1)
	}
	data, err := f.take(int(length) + 1)
	if err != nil {
		return "", err
	}
	return string(data[:length]), nil
}

func (f *fieldReader) number(size int) (uint32, error) {
	if err := f.align(size); err != nil {
		return 0, err
	}
	data, err := f.take(size)
	if err != nil {
		return 0, err
	}
	if size == 1 {
		return uint32(data[0]), nil
	}
	return f.order.Uint32(data), nil
}

// take returns the next n bytes, until the next call.
func (f *fieldReader) take(n int) ([]byte, error) {
	if f.pos+n > f.end {
		return nil, errUnreadable
	}
	f.pos += n
	_, err := io.ReadFull(f.r, f.buffer[:n])
	return f.buffer[:n], err
}

func (f *fieldReader) skip(n int64) error {
	if int64(f.pos)+n > int64(f.end) {
		return errUnreadable
	}
	f.pos += int(n)
	_, err := f.r.Discard(int(n))
	return err
}

// align goes on to a multiple of n, which may be beyond the end: the fields as a
// whole are padded too.
func (f *fieldReader) align(n int) error {
	padding := (n - f.pos%n) % n
	f.pos += padding
	_, err := f.r.Discard(padding)
	return err
}
