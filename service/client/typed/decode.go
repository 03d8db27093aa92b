// SPDX-License-Identifier: Apache-2.0

package typed

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Record is the value of a Struct or a Union.
type Record []Member

// Member is a field and its value.
type Member struct {
	Name  string
	Value any
}

// MarshalJSON makes an object of it, in the fields' order.
func (r Record) MarshalJSON() ([]byte, error) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	out.WriteByte('{')
	for i, m := range r {
		if i > 0 {
			out.WriteByte(',')
		}
		if err := encoder.Encode(m.Name); err != nil {
			return nil, err
		}
		out.WriteByte(':')
		if err := encoder.Encode(m.Value); err != nil {
			return nil, err
		}
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

// Decode reads a value, of which the type's Size bytes count and must be there.
// It is
//
//   - of an Integer int64 or uint64, or if it has 16 bytes *big.Int
//   - of a Bool bool, of a Float float64
//   - of an Enum its name, or if it has none the number as an Integer's
//   - of a Pointer, Bytes and an Address a string
//   - of a Text a string, without bytes that aren't UTF-8
//   - of a List []any, of a Struct or a Union Record
func (t *Type) Decode(data []byte) (any, error) {
	if len(data) < t.Size {
		return nil, fmt.Errorf("cannot decode: %d bytes, want %d", len(data), t.Size)
	}
	return t.decode(data), nil
}

func (t *Type) decode(data []byte) any {
	switch t.Kind {
	case List:
		list := make([]any, t.Count)
		for i := range list {
			list[i] = t.Elem.decode(data[i*t.Elem.Size:])
		}
		return list
	case Struct, Union:
		record := make(Record, len(t.Fields))
		for i, f := range t.Fields {
			record[i] = Member{f.Name, f.Type.decode(data[f.Offset:])}
		}
		return record
	case Bool:
		return t.Uint(data) != 0
	case Float:
		f := t.Float(data)
		if math.IsNaN(f) || math.IsInf(f, 0) { // JSON has no number for it
			return strconv.FormatFloat(f, 'g', -1, 64)
		}
		return f
	case Integer:
		switch {
		case t.Size == 16 && t.bits == 0:
			return t.bigInt(data)
		case t.Signed:
			return int64(t.Uint(data))
		}
		return t.Uint(data)
	case Enum:
		v := t.Uint(data)
		if name, ok := t.names[v]; ok {
			return name
		}
		if t.Signed {
			return int64(v)
		}
		return v
	}
	return string(t.AppendText(nil, data))
}

// Uint returns an Integer's, an Enum's, a Bool's or a Pointer's number: a
// negative one as its two's complement, and of one with 16 bytes the lower half.
// data must have the type's Size.
func (t *Type) Uint(data []byte) uint64 {
	if t.bits != 0 {
		return t.bitField(data)
	}
	var order binary.ByteOrder = binary.NativeEndian
	if t.bigEndian {
		order = binary.BigEndian
	}
	switch t.Size {
	case 1:
		if t.Signed {
			return uint64(int8(data[0]))
		}
		return uint64(data[0])
	case 2:
		v := order.Uint16(data)
		if t.Signed {
			return uint64(int16(v))
		}
		return uint64(v)
	case 4:
		v := order.Uint32(data)
		if t.Signed {
			return uint64(int32(v))
		}
		return uint64(v)
	case 8:
		return order.Uint64(data)
	}
	_, low := halves(data)
	return low
}

// littleEndian says which end bit fields start at.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

func (t *Type) bitField(data []byte) uint64 {
	var v uint64
	for i := range t.bits {
		bit := t.bitOffset + i
		if littleEndian {
			v |= uint64(data[bit/8]>>(bit%8)&1) << i
		} else {
			v = v<<1 | uint64(data[bit/8]>>(7-bit%8)&1)
		}
	}
	if t.Signed {
		unused := 64 - t.bits
		v = uint64(int64(v<<unused) >> unused)
	}
	return v
}

// halves are those of an integer of 16 bytes.
func halves(data []byte) (high, low uint64) {
	first, second := binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint64(data[8:])
	if littleEndian {
		return second, first
	}
	return first, second
}

func (t *Type) bigInt(data []byte) *big.Int {
	high, low := halves(data)
	v := new(big.Int).SetUint64(high)
	if t.Signed {
		v.SetInt64(int64(high))
	}
	return v.Add(v.Lsh(v, 64), new(big.Int).SetUint64(low))
}

// Float returns a Float's value. data must have the type's Size.
func (t *Type) Float(data []byte) float64 {
	if t.Size == 4 {
		return float64(math.Float32frombits(binary.NativeEndian.Uint32(data)))
	}
	return math.Float64frombits(binary.NativeEndian.Uint64(data))
}

// AppendText appends what Decode returns, as text for people; of a List, a
// Struct or a Union in JSON. data must have the type's Size.
func (t *Type) AppendText(to, data []byte) []byte {
	switch t.Kind {
	case Integer, Enum:
		v := t.Uint(data)
		if name, ok := t.names[v]; ok {
			return append(to, name...)
		}
		switch {
		case t.Size == 16 && t.bits == 0:
			return t.bigInt(data).Append(to, 10)
		case t.Signed:
			return strconv.AppendInt(to, int64(v), 10)
		}
		return strconv.AppendUint(to, v, 10)
	case Bool:
		return strconv.AppendBool(to, t.Uint(data) != 0)
	case Float:
		return strconv.AppendFloat(to, t.Float(data), 'g', -1, 64)
	case Pointer:
		return strconv.AppendUint(append(to, "0x"...), t.Uint(data), 16)
	case Text:
		return appendPrintable(to, data[:t.Size])
	case Bytes:
		return hex.AppendEncode(to, data[:t.Size])
	case Address:
		address, _ := netip.AddrFromSlice(data[:t.Size])
		return address.Unmap().AppendTo(to)
	}
	return append(to, Format(t.decode(data))...)
}

// appendPrintable appends C's string, with an escape for what isn't UTF-8.
func appendPrintable(to, text []byte) []byte {
	if end := bytes.IndexByte(text, 0); end >= 0 {
		text = text[:end]
	}
	if utf8.Valid(text) {
		return append(to, text...)
	}
	to = slices.Grow(to, len(text))
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		if r == utf8.RuneError && size == 1 {
			to = fmt.Appendf(to, `\x%02x`, text[0])
		} else {
			to = append(to, text[:size]...)
		}
		text = text[size:]
	}
	return to
}

// Format writes a value that Decode returned as text for people: strings as
// they are, and what has parts in JSON.
func Format(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	case []any, Record:
		var out strings.Builder
		encoder := json.NewEncoder(&out)
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(v) // it is made of what can be
		return strings.TrimSuffix(out.String(), "\n")
	}
	return fmt.Sprint(value)
}

// Compare orders decoded values of one type: numbers by size, strings by their
// bytes, what has parts by the first part that differs.
func Compare(a, b any) int {
	switch a := a.(type) {
	case uint64:
		if b, ok := b.(uint64); ok {
			return cmp.Compare(a, b)
		}
	case int64:
		if b, ok := b.(int64); ok {
			return cmp.Compare(a, b)
		}
	case float64:
		if b, ok := b.(float64); ok {
			return cmp.Compare(a, b)
		}
	case *big.Int:
		if b, ok := b.(*big.Int); ok {
			return a.Cmp(b)
		}
	case []any:
		if b, ok := b.([]any); ok {
			return slices.CompareFunc(a, b, Compare)
		}
	case Record:
		if b, ok := b.(Record); ok {
			return slices.CompareFunc(a, b, func(a, b Member) int { return Compare(a.Value, b.Value) })
		}
	}
	// Enums have names and numbers.
	return cmp.Compare(Format(a), Format(b))
}

// Sum decodes a value of a per-CPU map, adding up what the processors have. ok
// says that it has only integers, and structures and lists of them; else there
// is no sum. Each of values must have the type's Size, and there is at least
// one.
func (t *Type) Sum(values [][]byte) (sum any, ok bool) {
	if !t.summable() {
		return nil, false
	}
	sum = t.decode(values[0])
	for _, v := range values[1:] {
		sum = add(sum, t.decode(v))
	}
	return sum, true
}

func (t *Type) summable() bool {
	switch t.Kind {
	case Integer:
		return t.Size <= 8
	case List:
		return t.Elem.summable()
	case Struct:
		for _, f := range t.Fields {
			if !f.Type.summable() {
				return false
			}
		}
		return true
	}
	return false
}

func add(a, b any) any {
	switch a := a.(type) {
	case uint64:
		return a + b.(uint64)
	case int64:
		return a + b.(int64)
	case []any:
		for i := range a {
			a[i] = add(a[i], b.([]any)[i])
		}
	case Record:
		for i := range a {
			a[i].Value = add(a[i].Value, b.(Record)[i].Value)
		}
	}
	return a
}
