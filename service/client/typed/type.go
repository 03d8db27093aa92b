// SPDX-License-Identifier: Apache-2.0

// Package typed reads what is in BPF maps and ring buffers by its BTF types.
package typed

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// Types come from whoever wrote the object, and nobody has to have checked
// them. These bound what they cost; a leaf is a value that has no parts.
const (
	maxBlob  = 1 << 20 // of base64
	maxDepth = 32
	maxNodes = 4096
	maxLeafs = 1 << 16
	maxSize  = 1 << 20
)

// Kind is what values of a type are.
type Kind int

// The kinds of types.
const (
	Integer Kind = iota
	Bool
	Float
	Enum
	Pointer
	Text    // array of char, up to its NUL
	Bytes   // array of unsigned char
	Address // struct in_addr, struct in6_addr
	List    // any other array
	Struct
	Union
)

// Type is a type whose values can be read.
type Type struct {
	Kind Kind
	// Name is that of the outermost typedef, or else of the type itself, "" if
	// it has neither.
	Name string
	// Size is that of a value, in bytes.
	Size int
	// Fields are those of a Struct or a Union; those of nameless ones in it are
	// among them.
	Fields []Field
	// Elem is the type of a List's elements, of which there are Count.
	Elem  *Type
	Count int
	// Signed says of an Integer or an Enum that it can be negative.
	Signed bool

	bigEndian bool
	bitOffset int // of a bit field, in the byte where it starts
	bits      int // of a bit field; 0: it is none
	names     map[uint64]string
}

// Field is a part of a Struct or a Union.
type Field struct {
	Name string
	Type *Type
	// Offset is in bytes, from the start of the value.
	Offset int
}

var errTooComplex = errors.New("the type is too complex")

// Parse finds the type that a typedef stands for in encoded BTF: base64, as the
// broker describes a map. The typedef's own name isn't the type's. Values are
// size bytes long; 0: as long as the type says.
func Parse(encoded, typedef string, size int) (*Type, error) {
	if len(encoded) > maxBlob {
		return nil, errTooComplex
	}
	data, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return nil, fmt.Errorf("cannot decode BTF: %w", err)
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("cannot read BTF: %w", err)
	}
	var t *btf.Typedef
	if err := spec.TypeByName(typedef, &t); err != nil {
		return nil, fmt.Errorf("cannot find type %q: %w", typedef, err)
	}
	return New(t.Type, size)
}

// Raw is the type of values of which nothing is known but their size.
func Raw(size int) *Type { return &Type{Kind: Bytes, Size: size} }

// New prepares the reading of values of a type. They are size bytes long; 0: as
// long as the type says.
func New(t btf.Type, size int) (*Type, error) {
	var c compiler
	compiled, err := c.compile(t, 0)
	if err == nil && compiled.leafs() > maxLeafs {
		err = errTooComplex
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read values of this type: %w", err)
	}
	if size != 0 && compiled.Size != size {
		return nil, fmt.Errorf("cannot read values of this type: it has %d bytes, the values have %d", compiled.Size, size)
	}
	return compiled, nil
}

// compiler counts what a type costs.
type compiler struct{ nodes int }

func (c *compiler) compile(t btf.Type, depth int) (*Type, error) {
	c.nodes++
	if depth > maxDepth || c.nodes > maxNodes {
		return nil, errTooComplex
	}
	switch t := t.(type) {
	case *btf.Typedef:
		named, err := c.compile(t.Type, depth+1)
		if err != nil {
			return nil, err
		}
		named.Name = t.Name
		if named.Kind == Integer && (t.Name == "__be16" || t.Name == "__be32" || t.Name == "__be64") {
			named.bigEndian = true
		}
		return named, nil
	case *btf.Const:
		return c.compile(t.Type, depth+1)
	case *btf.Volatile:
		return c.compile(t.Type, depth+1)
	case *btf.Restrict:
		return c.compile(t.Type, depth+1)
	case *btf.TypeTag:
		return c.compile(t.Type, depth+1)
	case *btf.Pointer:
		return &Type{Kind: Pointer, Size: 8}, nil
	case *btf.Int:
		return compileInt(t)
	case *btf.Float:
		if t.Size != 4 && t.Size != 8 {
			return nil, fmt.Errorf("floating point of %d bytes", t.Size)
		}
		return &Type{Kind: Float, Name: t.Name, Size: int(t.Size)}, nil
	case *btf.Enum:
		return compileEnum(t)
	case *btf.Array:
		return c.compileArray(t, depth)
	case *btf.Struct:
		return c.compileMembers(Struct, t.Name, t.Size, t.Members, depth)
	case *btf.Union:
		return c.compileMembers(Union, t.Name, t.Size, t.Members, depth)
	case *btf.Datasec:
		var members []btf.Member
		for _, v := range t.Vars {
			variable, ok := v.Type.(*btf.Var)
			if !ok || v.Offset > maxSize {
				return nil, errors.New("data that is no variable")
			}
			members = append(members, btf.Member{Name: variable.Name, Type: variable.Type, Offset: btf.Bits(v.Offset) * 8})
		}
		return c.compileMembers(Struct, t.Name, t.Size, members, depth)
	}
	return nil, fmt.Errorf("no values are %T", t)
}

func compileInt(t *btf.Int) (*Type, error) {
	i := &Type{Kind: Integer, Name: t.Name, Size: int(t.Size), Signed: t.Encoding == btf.Signed}
	switch {
	case t.Encoding == btf.Bool && t.Size == 1:
		i.Kind = Bool
	case t.Size == 1, t.Size == 2, t.Size == 4, t.Size == 8, t.Size == 16:
	default:
		return nil, fmt.Errorf("integer of %d bytes", t.Size)
	}
	return i, nil
}

func compileEnum(t *btf.Enum) (*Type, error) {
	switch t.Size {
	case 1, 2, 4, 8:
	default:
		return nil, fmt.Errorf("enum of %d bytes", t.Size)
	}
	e := &Type{Kind: Enum, Name: t.Name, Size: int(t.Size), Signed: t.Signed, names: make(map[uint64]string, len(t.Values))}
	for _, v := range t.Values {
		// As Decode finds it: without what doesn't fit.
		value := v.Value
		if !t.Signed && t.Size < 8 {
			value &= 1<<(8*t.Size) - 1
		}
		if _, ok := e.names[value]; !ok {
			e.names[value] = strings.ToValidUTF8(v.Name, "?")
		}
	}
	return e, nil
}

func (c *compiler) compileArray(t *btf.Array, depth int) (*Type, error) {
	elem, err := c.compile(t.Type, depth+1)
	if err != nil {
		return nil, err
	}
	count := int(t.Nelems)
	switch {
	case elem.Size == 0 && count > 0:
		return nil, errors.New("array of nothing")
	case count > 0 && elem.Size > maxSize/count:
		return nil, errTooComplex
	}
	a := &Type{Kind: List, Size: count * elem.Size, Elem: elem, Count: count}
	if elem.Kind == Integer && elem.Size == 1 {
		switch {
		case isChar(t.Type):
			a.Kind = Text
		case !elem.Signed:
			a.Kind = Bytes
		}
	}
	return a, nil
}

// isChar says whether text is made of the type: unlike "unsigned char" and
// "signed char".
func isChar(t btf.Type) bool {
	i, ok := btf.UnderlyingType(t).(*btf.Int)
	return ok && (i.Name == "char" || i.Encoding == btf.Char)
}

func (c *compiler) compileMembers(kind Kind, name string, size uint32, members []btf.Member, depth int) (*Type, error) {
	if size > maxSize {
		return nil, errTooComplex
	}
	s := &Type{Kind: kind, Name: name, Size: int(size)}
	if name == "in_addr" && size == 4 || name == "in6_addr" && size == 16 {
		s.Kind = Address
		return s, nil
	}
	seen := make(map[string]bool)
	for _, m := range members {
		t, err := c.compile(m.Type, depth+1)
		if err != nil {
			return nil, err
		}
		offset, end := int(m.Offset), int(m.Offset)+8*t.Size
		if m.BitfieldSize != 0 {
			if t.Kind != Integer && t.Kind != Enum && t.Kind != Bool || int(m.BitfieldSize) > min(8*t.Size, 64) {
				return nil, fmt.Errorf("bit field %q is of a type that has none", m.Name)
			}
			t.bits, t.bitOffset, t.bigEndian = int(m.BitfieldSize), offset%8, false
			end = offset + t.bits
		} else if offset%8 != 0 {
			return nil, fmt.Errorf("%q does not start at a byte", m.Name)
		}
		if end > 8*s.Size {
			return nil, fmt.Errorf("%q does not fit", m.Name)
		}
		fields := []Field{{Name: m.Name, Type: t, Offset: offset / 8}}
		if m.Name == "" && (t.Kind == Struct || t.Kind == Union) {
			fields = t.Fields
			for i := range fields {
				fields[i].Offset += offset / 8
			}
		}
		for _, f := range fields {
			if seen[f.Name] {
				return nil, fmt.Errorf("%q is there twice", f.Name)
			}
			seen[f.Name] = true
		}
		s.Fields = append(s.Fields, fields...)
	}
	return s, nil
}

// leafs counts the values without parts that are in one of the type, if they
// aren't far too many.
func (t *Type) leafs() int {
	switch t.Kind {
	case List:
		if n := t.Elem.leafs(); n <= maxLeafs {
			return n * t.Count // Count is at most maxSize
		}
		return maxLeafs + 1
	case Struct, Union:
		sum := 1
		for _, f := range t.Fields {
			sum += f.Type.leafs()
		}
		return sum
	}
	return 1
}
