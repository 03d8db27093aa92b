// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"

	"github.com/godbus/dbus/v5"
)

// An Array is an array of structs that is encoded as it is made. godbus looks at
// each field of each by reflection, which takes most of the time of a long list.
// It can be the only value of a reply.
type Array struct {
	signature string
	data      []byte
}

// arrayHead is the length of an array's own length, and the padding before a
// struct (https://dbus.freedesktop.org/doc/dbus-specification.html, "Marshaling").
const arrayHead = 8

// NewArray makes an array of structs with fields of these types, of which the
// caller then adds exactly those, in their order. There are strings, object paths,
// and unsigned numbers of 32 and 64 bits. size is about how many bytes there will
// be.
func NewArray(fields string, size int) *Array {
	return &Array{signature: "a(" + fields + ")", data: make([]byte, arrayHead, arrayHead+size)}
}

// Struct begins the next struct.
func (a *Array) Struct() { a.align(8) }

// String adds a string or an object path, which must be one that D-Bus has: UTF-8
// without NUL.
func (a *Array) String(s string) {
	a.Uint32(uint32(len(s)))
	a.data = append(append(a.data, s...), 0)
}

// Uint32 adds a number.
func (a *Array) Uint32(n uint32) {
	a.align(4)
	a.data = binary.LittleEndian.AppendUint32(a.data, n)
}

// Uint64 adds a number.
func (a *Array) Uint64(n uint64) {
	a.align(8)
	a.data = binary.LittleEndian.AppendUint64(a.data, n)
}

func (a *Array) align(n int) {
	a.data = append(a.data, make([]byte, -len(a.data)&(n-1))...)
}

// encode gives the bytes of a message whose only value is the array.
func (a *Array) encode(message *dbus.Message) ([]byte, error) {
	body := message.Body
	message.Body = nil
	data, _, err := encode(message)
	message.Body = body
	if err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint32(data[4:], uint32(len(a.data)))
	binary.LittleEndian.PutUint32(a.data, uint32(len(a.data)-arrayHead))
	return append(data, a.data...), nil
}
