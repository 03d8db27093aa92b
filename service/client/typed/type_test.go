// SPDX-License-Identifier: Apache-2.0

package typed

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

var (
	u8       = &btf.Int{Name: "unsigned char", Size: 1}
	s8       = &btf.Int{Name: "signed char", Size: 1, Encoding: btf.Signed}
	char     = &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}
	u16      = &btf.Int{Name: "unsigned short", Size: 2}
	u32      = &btf.Int{Name: "unsigned int", Size: 4}
	s32      = &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	u64      = &btf.Int{Name: "unsigned long", Size: 8}
	s64      = &btf.Int{Name: "long", Size: 8, Encoding: btf.Signed}
	u128     = &btf.Int{Name: "unsigned __int128", Size: 16}
	s128     = &btf.Int{Name: "__int128", Size: 16, Encoding: btf.Signed}
	boolean  = &btf.Int{Name: "_Bool", Size: 1, Encoding: btf.Bool}
	be16     = &btf.Typedef{Name: "__be16", Type: &btf.Typedef{Name: "__u16", Type: u16}}
	be32     = &btf.Typedef{Name: "__be32", Type: u32}
	counter  = &btf.Typedef{Name: "counter", Type: &btf.Const{Type: &btf.Volatile{Type: u64}}}
	colors   = &btf.Enum{Name: "color", Size: 4, Values: []btf.EnumValue{{Name: "RED", Value: 0}, {Name: "GREEN", Value: 7}}}
	negative = &btf.Enum{Name: "n", Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "MINUS", Value: math.MaxUint64}}}
)

func array(t btf.Type, n uint32) btf.Type { return &btf.Array{Index: u32, Type: t, Nelems: n} }

func member(name string, t btf.Type, offset int) btf.Member {
	return btf.Member{Name: name, Type: t, Offset: btf.Bits(offset * 8)}
}

func bits(name string, t btf.Type, offset, size btf.Bits) btf.Member {
	return btf.Member{Name: name, Type: t, Offset: offset, BitfieldSize: size}
}

func structure(size uint32, members ...btf.Member) *btf.Struct {
	return &btf.Struct{Name: "s", Size: size, Members: members}
}

// The figures are those of little-endian machines.
func TestDecode(t *testing.T) {
	t.Parallel()
	if !littleEndian {
		t.Log("a big-endian machine: not compared")
		return
	}
	big128, _ := new(big.Int).SetString("-1208925819614629174706176", 10) // -2^80
	for _, test := range []struct {
		name string
		t    btf.Type
		data string
		want any
		text string
	}{
		{"u8", u8, "\xff", uint64(255), "255"},
		{"s8", s8, "\xff", int64(-1), "-1"},
		{"char", char, "A", int64(65), "65"},
		{"u16", u16, "\x01\x02", uint64(0x0201), "513"},
		{"s32", s32, "\xfe\xff\xff\xff", int64(-2), "-2"},
		{"u32", u32, "\xfe\xff\xff\xff", uint64(0xfffffffe), "4294967294"},
		{"u64", u64, "\xff\xff\xff\xff\xff\xff\xff\xff", uint64(math.MaxUint64), "18446744073709551615"},
		{"s64", s64, "\xff\xff\xff\xff\xff\xff\xff\xff", int64(-1), "-1"},
		{"u128", u128, "\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00", new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 64), big.NewInt(1)), "18446744073709551617"},
		{"s128", s128, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff", big128, "-1208925819614629174706176"},
		{"be16", be16, "\x01\x02", uint64(0x0102), "258"},
		{"be32", be32, "\x00\x00\x01\x02", uint64(0x0102), "258"},
		{"bool", boolean, "\x02", true, "true"},
		{"float", &btf.Float{Size: 4}, "\x00\x00\x80\x3f", 1.0, "1"},
		{"large double", &btf.Float{Size: 8}, "\x00\x00\x00\x00\xd0\x12\x63\x41", 1e7, "1e+07"},
		{"double", &btf.Float{Size: 8}, "\x00\x00\x00\x00\x00\x00\xf8\x7f", "NaN", "NaN"},
		{"enum", colors, "\x07\x00\x00\x00", "GREEN", "GREEN"},
		{"enum without a name", colors, "\x01\x00\x00\x00", uint64(1), "1"},
		{"signed enum", negative, "\xff\xff\xff\xff", "MINUS", "MINUS"},
		{"signed enum without a name", negative, "\xfe\xff\xff\xff", int64(-2), "-2"},
		{"pointer", &btf.Pointer{Target: &btf.Void{}}, "\x00\x10\x00\x00\x00\x80\xff\xff", "0xffff800000001000", "0xffff800000001000"},
		{"text", array(char, 8), "bash\x00xyz", "bash", "bash"},
		{"text without end", array(char, 4), "bash", "bash", "bash"},
		{"text of a typedef", array(&btf.Typedef{Name: "letter", Type: char}, 2), "é", "é", "é"},
		{"no text", array(char, 3), "a\xff\x01", "a\\xff\x01", "a\\xff\x01"},
		{"bytes", array(u8, 3), "\x00\xab\x01", "00ab01", "00ab01"},
		{"no bytes", array(s8, 2), "\xff\x01", []any{int64(-1), int64(1)}, "[-1,1]"},
		{"nothing", array(u32, 0), "", []any{}, "[]"},
		{"list of lists", array(array(u16, 2), 2), "\x01\x00\x02\x00\x03\x00\x04\x00", []any{[]any{uint64(1), uint64(2)}, []any{uint64(3), uint64(4)}}, "[[1,2],[3,4]]"},
		{"IPv4", &btf.Struct{Name: "in_addr", Size: 4, Members: []btf.Member{member("s_addr", be32, 0)}}, "\x7f\x00\x00\x01", "127.0.0.1", "127.0.0.1"},
		{"IPv6", &btf.Struct{Name: "in6_addr", Size: 16}, "\xfe\x80" + strings.Repeat("\x00", 13) + "\x01", "fe80::1", "fe80::1"},
		{"mapped", &btf.Struct{Name: "in6_addr", Size: 16}, strings.Repeat("\x00", 10) + "\xff\xff\x0a\x00\x00\x01", "10.0.0.1", "10.0.0.1"},
		{
			"struct", structure(16, member("z", u32, 0), member("a", array(char, 4), 4), member("inner", structure(8, member("c", counter, 0)), 8)),
			"\x01\x00\x00\x00<b>\x00\x02\x00\x00\x00\x00\x00\x00\x00",
			Record{{"z", uint64(1)}, {"a", "<b>"}, {"inner", Record{{"c", uint64(2)}}}}, `{"z":1,"a":"<b>","inner":{"c":2}}`,
		},
		{"empty struct", structure(0), "", Record{}, "{}"},
		{
			"bit fields", structure(4, bits("a", u32, 0, 3), bits("b", s32, 3, 5), bits("c", colors, 8, 3), bits("d", u32, 12, 20)),
			"\xfa\xf7\xff\x7f",
			Record{{"a", uint64(2)}, {"b", int64(-1)}, {"c", "GREEN"}, {"d", uint64(0x7ffff)}}, `{"a":2,"b":-1,"c":"GREEN","d":524287}`,
		},
		{
			"a bit field of nine bytes", structure(9, bits("a", u64, 4, 64)), "\xf0\xff\xff\xff\xff\xff\xff\xff\x07",
			Record{{"a", uint64(0x7fffffffffffffff)}}, `{"a":9223372036854775807}`,
		},
		{
			"nameless", structure(8, member("a", u32, 0), member("", &btf.Union{Size: 4, Members: []btf.Member{member("b", u32, 0), member("", structure(4, member("c", u16, 2)), 0)}}, 4)),
			"\x01\x00\x00\x00\x02\x00\x03\x00",
			Record{{"a", uint64(1)}, {"b", uint64(0x30002)}, {"c", uint64(3)}}, `{"a":1,"b":196610,"c":3}`,
		},
		{
			"union", &btf.Union{Name: "u", Size: 4, Members: []btf.Member{member("n", u32, 0), member("b", array(u8, 4), 0)}}, "\x01\x02\x03\x04",
			Record{{"n", uint64(0x04030201)}, {"b", "01020304"}}, `{"n":67305985,"b":"01020304"}`,
		},
		{
			"data", &btf.Datasec{Name: ".bss", Size: 8, Vars: []btf.VarSecinfo{{Type: &btf.Var{Name: "n", Type: u32}, Offset: 4, Size: 4}}},
			"\x00\x00\x00\x00\x05\x00\x00\x00", Record{{"n", uint64(5)}}, `{"n":5}`,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			typ, err := New(test.t, len(test.data))
			if err != nil {
				t.Fatal(err)
			}
			got, err := typ.Decode([]byte(test.data))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.Comparer(func(a, b *big.Int) bool { return a.Cmp(b) == 0 })); diff != "" {
				t.Error(diff)
			}
			if text := string(typ.AppendText(nil, []byte(test.data))); text != test.text || Format(got) != test.text {
				t.Errorf("as text %q and %q, want %q", text, Format(got), test.text)
			}
			if len(test.data) > 0 {
				if _, err := typ.Decode([]byte(test.data[1:])); err == nil {
					t.Error("decoded too little")
				}
			}
		})
	}
}

// What would take all memory or time, or would read beyond the value.
func TestHostileTypes(t *testing.T) {
	t.Parallel()
	loop := &btf.Typedef{Name: "loop"}
	loop.Type = &btf.Const{Type: loop}
	inside := structure(8)
	inside.Members = []btf.Member{member("a", inside, 0)}
	var doubled btf.Type = u8
	for range 31 {
		doubled = &btf.Union{Name: "u", Size: 1, Members: []btf.Member{member("a", doubled, 0), member("b", doubled, 0)}}
	}
	many := structure(8)
	for i := range 5000 {
		many.Members = append(many.Members, member(strings.Repeat("m", i+1), u64, 0))
	}
	overlapping := structure(1<<19, member("a", array(u64, 1<<16), 0), member("b", array(u64, 1<<16), 0))
	for name, hostile := range map[string]btf.Type{
		"typedef of itself":      loop,
		"struct in itself":       inside,
		"2^31 ways":              doubled,
		"members":                many,
		"2^32 elements":          array(u8, math.MaxUint32),
		"2^31 structs":           array(structure(1<<20), 1<<31),
		"2^31 times nothing":     array(structure(0), 1<<31),
		"a million numbers":      array(u8, 1<<20+1),
		"numbers twice":          overlapping,
		"a huge struct":          structure(math.MaxUint32, member("a", u8, 1<<24)),
		"member outside":         structure(8, member("a", u64, 1)),
		"member far outside":     structure(8, btf.Member{Name: "a", Type: u8, Offset: math.MaxUint32 &^ 7}),
		"half a byte":            structure(8, btf.Member{Name: "a", Type: u8, Offset: 4}),
		"bit field outside":      structure(4, bits("a", u32, 30, 3)),
		"bit field too large":    structure(8, bits("a", u32, 0, 33)),
		"bit field of a pointer": structure(8, bits("a", &btf.Pointer{}, 0, 3)),
		"names twice":            structure(8, member("a", u32, 0), member("a", u32, 4)),
		"integer of 3 bytes":     &btf.Int{Size: 3},
		"integer of 2^32 bytes":  &btf.Int{Size: math.MaxUint32},
		"float of 16 bytes":      &btf.Float{Size: 16},
		"enum of 3 bytes":        &btf.Enum{Size: 3},
		"void":                   &btf.Void{},
		"unknown struct":         &btf.Fwd{Name: "task_struct"},
		"function":               &btf.FuncProto{Return: u32},
		"data of functions":      &btf.Datasec{Size: 8, Vars: []btf.VarSecinfo{{Type: &btf.Func{Name: "f"}}}},
		"data outside":           &btf.Datasec{Size: 8, Vars: []btf.VarSecinfo{{Type: &btf.Var{Name: "n", Type: u32}, Offset: math.MaxUint32}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			if got, err := New(hostile, 0); err == nil {
				t.Errorf("got %+v", got)
			}
			if d := time.Since(start); d > time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	if _, err := New(u64, 4); err == nil {
		t.Error("took a type of another size than the values")
	}
}

// encode makes what the broker sends.
func encode(t testing.TB, types map[string]btf.Type) string {
	t.Helper()
	b, err := btf.NewBuilder(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, typ := range types {
		if _, err := b.Add(&btf.Typedef{Name: name, Type: typ}); err != nil {
			t.Fatal(err)
		}
	}
	data, err := b.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(data)
}

func TestParse(t *testing.T) {
	t.Parallel()
	encoded := encode(t, map[string]btf.Type{"key": colors, "value": counter})
	key, err := Parse(encoded, "key", 4)
	if err != nil || key.Kind != Enum || key.Name != "color" {
		t.Errorf("got %+v, %v", key, err)
	}
	value, err := Parse(encoded, "value", 8)
	if err != nil || value.Kind != Integer || value.Name != "counter" {
		t.Errorf("got %+v, %v", value, err)
	}
	for _, bad := range []string{"", "?", "AAAA", encoded[:len(encoded)/2], strings.Repeat("A", maxBlob+4)} {
		if _, err := Parse(bad, "key", 4); err == nil {
			t.Errorf("parsed %.20q", bad)
		}
	}
	if _, err := Parse(encoded, "other", 4); err == nil {
		t.Error("found a type that isn't there")
	}
}

func FuzzParse(f *testing.F) {
	for _, t := range []btf.Type{
		u8, u128, be16, boolean, &btf.Float{Size: 8}, negative, array(char, 16), array(array(u16, 2), 2),
		&btf.Pointer{Target: &btf.Struct{Name: "later"}},
		structure(4, bits("a", u32, 0, 3), bits("b", s32, 3, 5), bits("c", colors, 8, 3)),
		structure(8, member("", &btf.Union{Size: 8, Members: []btf.Member{member("b", counter, 0)}}, 0)),
	} {
		data, err := base64.StdEncoding.DecodeString(encode(f, map[string]btf.Type{"value": t}))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, []byte("0123456789abcdef"))
	}
	f.Fuzz(func(t *testing.T, blob, data []byte) {
		typ, err := Parse(base64.StdEncoding.EncodeToString(blob), "value", 0)
		if err != nil {
			return
		}
		if typ.Size > maxSize || typ.leafs() > maxLeafs {
			t.Fatalf("%d bytes, %d leafs", typ.Size, typ.leafs())
		}
		value, err := typ.Decode(data)
		if (err == nil) != (len(data) >= typ.Size) {
			t.Fatal(err)
		}
		if err != nil {
			return
		}
		if _, err := json.Marshal(value); err != nil {
			t.Fatal(err)
		}
		if string(typ.AppendText(nil, data)) != Format(value) {
			t.Fatalf("%s is not %s", typ.AppendText(nil, data), Format(value))
		}
	})
}
