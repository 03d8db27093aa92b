// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

// plan is an object made ready to be loaded: what its files and its ELF file say
// together.
type plan struct {
	*Object
	// digest changes when the object has to be loaded anew.
	digest string
	// attachments are in the order in which they are made.
	attachments []attachment
	maps        []MapInfo
	programs    []ProgramInfo
}

// MapInfo describes a published map.
type MapInfo struct {
	// Name is the one that it is published under, Type the kernel's.
	Name, Type string
	Access     []Access
	// KeySize and ValueSize are in bytes; a ring buffer has neither.
	KeySize, ValueSize, MaxEntries uint32
	// KeyType and ValueType are in C's spelling, empty if nothing tells.
	KeyType, ValueType string
	// BTF is a blob in which typedefs named "key" and "value" stand for the
	// types, nil if nothing tells them.
	BTF []byte
}

// ProgramInfo describes a published program.
type ProgramInfo struct {
	Name, Type, AttachType string
}

// plan reads the ELF file of an object. An error is a *config.FileError.
func (c *Catalog) plan(o *Object) (*plan, *ebpf.CollectionSpec, error) {
	data, fileError := c.files.ReadFile(o.File, maxFile)
	if fileError != nil {
		return nil, nil, fileError
	}
	file := config.Source{Path: o.File}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(data))
	if err != nil {
		return nil, nil, file.Fail(0, "not an ELF file of BPF programs: %v", printable(err.Error()))
	}
	p := &plan{Object: o, digest: digest(o, data)}
	if err := p.apply(spec); err != nil {
		// What is wrong is what the object says of the ELF file.
		return nil, nil, config.Source{Path: o.Files[0]}.Fail(0, "%v", err)
	}
	if p.attachments, err = attachments(o, spec); err != nil {
		return nil, nil, config.Source{Path: o.Files[0]}.Fail(0, "%v", err)
	}
	return p, spec, nil
}

// Check returns everything that is wrong with the objects, as far as can be seen
// without loading them.
func Check(set *Set) []error {
	errs := set.Errors()
	c := &Catalog{}
	for _, o := range set.All() {
		if _, _, err := c.plan(o); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// digest is of all that is loaded. What is only offered differently isn't in it.
func digest(o *Object, elf []byte) string {
	type named struct {
		From       string
		MaxEntries uint32   `json:",omitempty"`
		Attach     []string `json:",omitempty"`
		Nowhere    bool     `json:",omitempty"`
	}
	said := struct {
		ELF      [sha256.Size]byte
		Data     map[string]string
		Maps     map[string]named
		Programs map[string]named
	}{sha256.Sum256(elf), o.Data, map[string]named{}, map[string]named{}}
	for name, m := range o.Maps {
		said.Maps[name] = named{From: m.From, MaxEntries: m.MaxEntries}
	}
	for name, p := range o.Programs {
		said.Programs[name] = named{From: p.From, Attach: p.Attach, Nowhere: p.Attach != nil && len(p.Attach) == 0}
	}
	text, err := json.Marshal(said)
	if err != nil {
		panic(err) // there is nothing in it that JSON doesn't have
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}

// apply puts what the object says into spec, and describes what is published.
func (p *plan) apply(spec *ebpf.CollectionSpec) error {
	for _, name := range slices.Sorted(maps.Keys(p.Data)) {
		if err := setVariable(spec.Variables[name], p.Data[name]); err != nil {
			return fmt.Errorf("[Data] %s=: %w", name, err)
		}
	}
	for _, m := range spec.Maps {
		// Where maps are found again is said here, not in the ELF file.
		m.Pinning = ebpf.PinNone
	}
	for _, name := range slices.Sorted(maps.Keys(p.Maps)) {
		info, err := describeMap(name, p.Maps[name], spec)
		if err != nil {
			return fmt.Errorf("[Map %s]: %w", name, err)
		}
		p.maps = append(p.maps, info)
	}
	if need := memory(spec); need > p.MaxMapBytes {
		return fmt.Errorf("its maps need %d bytes, and MaxMapBytes= is %d", need, p.MaxMapBytes)
	}
	for _, name := range slices.Sorted(maps.Keys(p.Programs)) {
		program := spec.Programs[p.Programs[name].From]
		if program == nil {
			return fmt.Errorf("[Program %s]: the ELF file has no program %q", name, p.Programs[name].From)
		}
		if p.Programs[name].Publish {
			info := ProgramInfo{Name: name, Type: strings.ToLower(program.Type.String())}
			if program.AttachType != ebpf.AttachNone {
				info.AttachType = strings.ToLower(program.AttachType.String())
			}
			p.programs = append(p.programs, info)
		}
	}
	for name := range spec.Programs {
		if !validPin(name) {
			return fmt.Errorf("the program %.64q has a name that no BPF file system takes", name)
		}
	}
	return nil
}

func describeMap(name string, m *Map, spec *ebpf.CollectionSpec) (info MapInfo, err error) {
	s := spec.Maps[m.From]
	if s == nil {
		return info, fmt.Errorf("the ELF file has no map %q", m.From)
	}
	ring := s.Type == ebpf.RingBuf
	for _, a := range m.Access {
		if (s.Type == ebpf.XSKMap) != (a == Receive) {
			return info, fmt.Errorf("the access %s is for maps of packet sockets and nothing else is, and this is a map of type %s", Receive, s.Type)
		}
		if ring != (a == Consume) {
			return info, fmt.Errorf("the access %s is for ring buffers and nothing else is, and this is a map of type %s", Consume, s.Type)
		}
	}
	if m.MaxEntries != 0 {
		s.MaxEntries = m.MaxEntries
	}
	key, value := s.Key, s.Value
	if m.Record != "" {
		if !ring {
			return info, errors.New("a type of records (Record=) is for ring buffers")
		}
		types, err := spec.Types.AnyTypesByName(m.Record)
		if err != nil || len(types) != 1 {
			return info, fmt.Errorf("the ELF file has not one type %q (Record=)", m.Record)
		}
		value = types[0]
	}
	if section, ok := value.(*btf.Datasec); ok {
		value = structOf(section)
	}
	return MapInfo{
		Name: name, Type: strings.ToLower(s.Type.String()), Access: m.Access,
		KeySize: s.KeySize, ValueSize: s.ValueSize, MaxEntries: s.MaxEntries,
		KeyType: spell(key), ValueType: spell(value), BTF: blob(key, value),
	}, nil
}

// memory is roughly what the maps need, in bytes.
func memory(spec *ebpf.CollectionSpec) uint64 {
	var sum uint64
	for _, m := range spec.Maps {
		each := uint64(m.KeySize+7)&^7 + uint64(m.ValueSize+7)&^7*copies(m.Type)
		over, bytes := bits.Mul64(max(each, 1), uint64(m.MaxEntries))
		if over != 0 || sum+bytes < sum {
			return ^uint64(0)
		}
		sum += bytes
	}
	return sum
}

// copies is how many copies of a value a map has.
func copies(t ebpf.MapType) uint64 {
	switch t {
	case ebpf.PerCPUHash, ebpf.PerCPUArray, ebpf.LRUCPUHash, ebpf.PerCPUCGroupStorage:
		return uint64(max(ebpf.MustPossibleCPU(), 1))
	}
	return 1
}

// setVariable sets a global variable to a value as it is written: a number, a
// truth value, or text for an array of characters.
func setVariable(v *ebpf.VariableSpec, value string) error {
	if v == nil {
		return errors.New("the ELF file has no such variable")
	}
	if v.Type == nil {
		return errors.New("the ELF file doesn't say of which type it is")
	}
	size := int(v.Size())
	switch t := btf.UnderlyingType(v.Type.Type).(type) {
	case *btf.Array:
		if c, ok := btf.UnderlyingType(t.Type).(*btf.Int); ok && c.Size == 1 {
			if len(value) >= size {
				return fmt.Errorf("the text is longer than the %d bytes that it may have", size-1)
			}
			return v.Set(append([]byte(value), make([]byte, size-len(value))...))
		}
	case *btf.Int:
		if t.Encoding == btf.Bool {
			switch value {
			case "yes", "true", "1":
				return v.Set([]byte{1})
			case "no", "false", "0":
				return v.Set([]byte{0})
			}
			return fmt.Errorf("%.64q is neither yes nor no", value)
		}
		return setNumber(v, size, t.Encoding == btf.Signed, value)
	case *btf.Enum:
		for _, e := range t.Values {
			if e.Name == value {
				return setNumber(v, size, t.Signed, strconv.FormatInt(int64(e.Value), 10))
			}
		}
		return setNumber(v, size, t.Signed, value)
	}
	return errors.New("it is neither a number, nor a truth value, nor text")
}

func setNumber(v *ebpf.VariableSpec, size int, signed bool, value string) error {
	var n uint64
	var err error
	if signed {
		var i int64
		i, err = strconv.ParseInt(value, 0, size*8)
		n = uint64(i)
	} else {
		n, err = strconv.ParseUint(value, 0, size*8)
	}
	if err != nil {
		return fmt.Errorf("%.64q is no number of %d bits", value, size*8)
	}
	switch size {
	case 1:
		return v.Set(uint8(n))
	case 2:
		return v.Set(uint16(n))
	case 4:
		return v.Set(uint32(n))
	case 8:
		return v.Set(n)
	}
	return fmt.Errorf("a number of %d bytes can't be set", size)
}

// structOf makes a type of a section with variables.
func structOf(section *btf.Datasec) btf.Type {
	s := &btf.Struct{Name: strings.TrimLeft(section.Name, "."), Size: section.Size}
	for _, info := range section.Vars {
		if v, ok := info.Type.(*btf.Var); ok {
			s.Members = append(s.Members, btf.Member{Name: v.Name, Type: v.Type, Offset: btf.Bits(info.Offset * 8)})
		}
	}
	return s
}

// maxBlob bounds the types that a description has, in bytes.
const maxBlob = 64 << 10

// blob makes BTF of a key and a value, either of which may be nil.
func blob(key, value btf.Type) []byte {
	var types []btf.Type
	for name, t := range map[string]btf.Type{"key": key, "value": value} {
		if known(t) {
			types = append(types, &btf.Typedef{Name: name, Type: t})
		}
	}
	if types == nil {
		return nil
	}
	slices.SortFunc(types, func(a, b btf.Type) int { return strings.Compare(a.TypeName(), b.TypeName()) })
	builder, err := btf.NewBuilder(types, nil)
	if err != nil {
		return nil
	}
	data, err := builder.Marshal(nil, nil)
	if err != nil || len(data) > maxBlob {
		return nil
	}
	return data
}

func known(t btf.Type) bool {
	_, void := t.(*btf.Void)
	return t != nil && !void
}

// spell spells a type as in C, for people.
func spell(t btf.Type) string {
	if !known(t) {
		return ""
	}
	named := func(kind, name string) string {
		if name == "" {
			return kind + " {…}"
		}
		return kind + " " + name
	}
	switch t := t.(type) {
	case *btf.Struct:
		return named("struct", t.Name)
	case *btf.Union:
		return named("union", t.Name)
	case *btf.Enum:
		return named("enum", t.Name)
	case *btf.Pointer:
		return "void *"
	case *btf.Array:
		return spell(t.Type) + "[" + strconv.FormatUint(uint64(t.Nelems), 10) + "]"
	case *btf.Const:
		return spell(t.Type)
	case *btf.Volatile:
		return spell(t.Type)
	case *btf.Restrict:
		return spell(t.Type)
	}
	return t.TypeName()
}

// printable makes a text, in which an ELF file may have a say, one for journals
// and terminals.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !strconv.IsPrint(r) {
			return '\ufffd'
		}
		return r
	}, text)
}

// exists says whether a pin is there.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
