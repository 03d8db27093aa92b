// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

// Limits of an object file, beyond those of package config.
const (
	// maxFile is how large the ELF file may be, in bytes.
	maxFile = 16 << 20
	// maxMapBytes is what the maps of an object may need together, in bytes,
	// unless MaxMapBytes= says something else.
	maxMapBytes = 64 << 20
	// maxSections is how many maps, and programs, an object may have.
	maxSections = 64
	// maxTargets is how many places a program may be attached to.
	maxTargets = 64
	// maxData is how many variables may be set.
	maxData = 256
	// maxIdentifier is how long a name in the ELF file may be, in bytes.
	maxIdentifier = 127
)

// Object is what its files say of an object. It isn't changed after Load, so it
// may be shared between goroutines.
type Object struct {
	// Name is the file's name without ".object".
	Name string
	// Description is one line of printable text, or empty.
	Description string
	// File is the path of the ELF file.
	File string
	// AtBoot says that the object is loaded when the daemon starts, not by its
	// first user.
	AtBoot bool
	// Keep is how long the object stays after its last user has gone; negative
	// is for good.
	Keep time.Duration
	// MaxMapBytes bounds the memory of all its maps together.
	MaxMapBytes uint64
	// Data are the values of global variables, by name.
	Data map[string]string
	// Maps and Programs are by the names under which they are published.
	Maps     map[string]*Map
	Programs map[string]*Program
	// Files are the paths that were read, in the order in which they count.
	Files []string
}

// forever is the Keep of an object that stays.
const forever = time.Duration(-1)

// LoadText gives Load= as it is written: "boot" or "first-use".
func (o *Object) LoadText() string {
	if o.AtBoot {
		return "boot"
	}
	return "first-use"
}

// KeepText gives Keep= as it is written: "always", "while-used" or a time span.
func (o *Object) KeepText() string {
	switch o.Keep {
	case forever:
		return "always"
	case 0:
		return "while-used"
	}
	return config.FormatSpan(o.Keep)
}

// MapNames gives the names of the maps that it publishes, in order.
func (o *Object) MapNames() []string { return slices.Sorted(maps.Keys(o.Maps)) }

// ProgramNames gives the names of the programs that it publishes, in order.
func (o *Object) ProgramNames() []string {
	var names []string
	for name, p := range o.Programs {
		if p.Publish {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Map is a map that an object publishes.
type Map struct {
	// From is its name in the ELF file.
	From string
	// Access is what may be asked for.
	Access []Access
	// MaxEntries is how many entries it has, 0 for what the ELF file says.
	MaxEntries uint32
	// Record is the type, in the ELF file, of what is in a ring buffer, or empty.
	Record string
}

// Program is what an object file says of a program.
type Program struct {
	// From is its name in the ELF file.
	From string
	// Publish says that it may be asked for.
	Publish bool
	// Attach is where it is attached to; nil is where the ELF file says, and
	// without elements it is nowhere.
	Attach []string
}

// Access is what a file descriptor of a map is good for.
type Access string

// The kinds of access.
const (
	ReadOnly  Access = "read-only"
	ReadWrite Access = "read-write"
	WriteOnly Access = "write-only"
	// Consume is to take records out of a ring buffer.
	Consume Access = "consume"
	// Receive is to have a packet socket in an XSKMAP.
	Receive Access = "receive"
)

// The errors of names that nothing has.
var (
	ErrNoSuchObject  = errors.New("no such object")
	ErrNoSuchMap     = errors.New("the object publishes no such map")
	ErrNoSuchProgram = errors.New("the object publishes no such program")
	ErrNoSuchLink    = errors.New("the object has no such link")
	// ErrNotOffered is an access that the object file doesn't have.
	ErrNotOffered = errors.New("the map is not offered with that access")
	// ErrNotAttached means that there is nothing to receive from.
	ErrNotAttached = errors.New("the object is attached to no interface now")
)

// Set is the objects that Load found. It isn't changed afterwards.
type Set = config.Set[Object]

// DefaultDirs are those of an installed system.
func DefaultDirs() config.Dirs { return config.DefaultDirs("objects.d") }

// Load reads the objects in NAME.object and NAME.object.d/*.conf. It doesn't look
// into their ELF files.
func Load(dirs config.Dirs) *Set { return config.Load(dirs, &format) }

var format = config.Format[Object]{
	Suffix:  ".object",
	Noun:    "an object",
	Missing: ErrNoSuchObject,
	Section: func(section string) bool { return keysOf(section) != nil },
	Key:     keyOf,
	New: func(name string) *Object {
		return &Object{Name: name, Keep: forever, MaxMapBytes: maxMapBytes,
			Data: map[string]string{}, Maps: map[string]*Map{}, Programs: map[string]*Program{}}
	},
	Finish: finish,
}

type setter = config.Setter[Object]

// keys are all that may be written, but for [Data], where the keys are
// variables. Repeated lists append, everything else is replaced; an empty value
// takes back what was said before, as in systemd.
var (
	objectKeys = map[string]setter{
		"Description": setDescription,
		"File":        setFile,
		"Load":        setLoad,
		"Keep":        setKeep,
		"MaxMapBytes": setMaxMapBytes,
	}
	mapKeys = map[string]func(*Map, string) error{
		"From":       func(m *Map, value string) error { return setFrom(&m.From, value) },
		"Access":     setAccess,
		"MaxEntries": setMaxEntries,
		"Record":     func(m *Map, value string) error { return setFrom(&m.Record, value) },
	}
	programKeys = map[string]func(*Program, string) error{
		"From":    func(p *Program, value string) error { return setFrom(&p.From, value) },
		"Publish": setPublish,
		"Attach":  setAttach,
	}
)

// keysOf gives what finds the setter of a key in a section, or nil.
func keysOf(section string) func(key string) setter {
	kind, name, _ := strings.Cut(section, " ")
	switch {
	case section == "Object":
		return func(key string) setter { return objectKeys[key] }
	case section == "Data":
		return setData
	case kind == "Map" && validPin(name):
		return func(key string) setter { return inSection(mapKeys[key], name, mapOf) }
	case kind == "Program" && validPin(name):
		return func(key string) setter { return inSection(programKeys[key], name, programOf) }
	}
	return nil
}

func keyOf(section, key string) setter { return keysOf(section)(key) }

func inSection[T any](set func(*T, string) error, name string, in func(*Object, string) (*T, error)) setter {
	if set == nil {
		return nil
	}
	return func(o *Object, _ config.Source, value string) error {
		t, err := in(o, name)
		if err != nil {
			return err
		}
		return set(t, value)
	}
}

func mapOf(o *Object, name string) (*Map, error)         { return sectionOf(o.Maps, name) }
func programOf(o *Object, name string) (*Program, error) { return sectionOf(o.Programs, name) }

func sectionOf[T any](all map[string]*T, name string) (*T, error) {
	if all[name] == nil {
		if len(all) >= maxSections {
			return nil, fmt.Errorf("more than %d sections of its kind", maxSections)
		}
		all[name] = new(T)
	}
	return all[name], nil
}

// validPin keeps names fit for a BPF file system, which has no dots, and for
// polkit's details.
func validPin(name string) bool {
	return name != "" && len(name) <= config.MaxName && name[0] != '-' &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") == ""
}

// validIdentifier is for names in ELF files: those of C, and sections with their
// dots.
func validIdentifier(name string) bool {
	return name != "" && len(name) <= maxIdentifier &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.") == ""
}

// finish computes what follows from all the files together.
func finish(o *Object, files []string) error {
	o.Files = files
	if o.File == "" {
		return errors.New("it has no File=")
	}
	if o.AtBoot && o.Keep != forever {
		return errors.New("what is loaded at boot stays: Load=boot needs Keep=always")
	}
	from := map[string]string{}
	for name, m := range o.Maps {
		if m.From == "" {
			m.From = name
		}
		if len(m.Access) == 0 {
			return fmt.Errorf("[Map %s] has no Access=", name)
		}
		if other, twice := from[m.From]; twice {
			return fmt.Errorf("[Map %s] and [Map %s] are the same map", min(name, other), max(name, other))
		}
		from[m.From] = name
	}
	clear(from)
	for name, p := range o.Programs {
		if p.From == "" {
			p.From = name
		}
		if other, twice := from[p.From]; twice {
			return fmt.Errorf("[Program %s] and [Program %s] are the same program", min(name, other), max(name, other))
		}
		from[p.From] = name
		if p.Publish && o.Maps[name] != nil {
			return fmt.Errorf("[Map %s] and [Program %s] are published under the same name", name, name)
		}
	}
	return nil
}

func setDescription(o *Object, _ config.Source, value string) error {
	o.Description = value
	return config.CheckDescription(value)
}

func setFile(o *Object, _ config.Source, value string) error {
	if value != "" && (!path.IsAbs(value) || path.Clean(value) != value) {
		return fmt.Errorf("%.64q is not an absolute, normalized path", value)
	}
	o.File = value
	return nil
}

func setLoad(o *Object, _ config.Source, value string) error {
	switch value {
	case "boot":
		o.AtBoot = true
	case "", "first-use":
		o.AtBoot = false
	default:
		return fmt.Errorf("%.64q is neither boot nor first-use", value)
	}
	return nil
}

func setKeep(o *Object, _ config.Source, value string) (err error) {
	switch value {
	case "", "always":
		o.Keep = forever
	case "while-used":
		o.Keep = 0
	default:
		if o.Keep, err = config.ParseSpan(value); err == nil && o.Keep < time.Second {
			err = errors.New("shorter than a second; while-used is the shortest")
		}
	}
	return err
}

func setMaxMapBytes(o *Object, _ config.Source, value string) (err error) {
	if value == "" {
		o.MaxMapBytes = maxMapBytes
		return nil
	}
	o.MaxMapBytes, err = config.ParseSize(value)
	return err
}

func setData(variable string) setter {
	if !validIdentifier(variable) {
		return nil
	}
	return func(o *Object, _ config.Source, value string) error {
		if value == "" {
			delete(o.Data, variable)
			return nil
		}
		o.Data[variable] = value
		if len(o.Data) > maxData {
			return fmt.Errorf("more than %d variables", maxData)
		}
		return nil
	}
}

func setFrom(field *string, value string) error {
	if value != "" && !validIdentifier(value) {
		return fmt.Errorf("%.64q is no name in an ELF file", value)
	}
	*field = value
	return nil
}

func setAccess(m *Map, value string) error {
	if value == "" {
		m.Access = nil
	}
	for _, word := range config.Words(value) {
		a := Access(word)
		if !slices.Contains([]Access{ReadOnly, ReadWrite, WriteOnly, Consume, Receive}, a) {
			return fmt.Errorf("%.64q is none of %s, %s, %s, %s and %s", word, ReadOnly, ReadWrite, WriteOnly, Consume, Receive)
		}
		if !slices.Contains(m.Access, a) {
			m.Access = append(m.Access, a)
		}
	}
	return nil
}

func setMaxEntries(m *Map, value string) error {
	if value == "" {
		m.MaxEntries = 0
		return nil
	}
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil || n == 0 {
		return fmt.Errorf("%.64q is no number from 1 to %d", value, uint32(math.MaxUint32))
	}
	m.MaxEntries = uint32(n)
	return nil
}

func setPublish(p *Program, value string) error {
	switch value {
	case "yes":
		p.Publish = true
	case "", "no":
		p.Publish = false
	default:
		return fmt.Errorf("%.64q is neither yes nor no", value)
	}
	return nil
}

func setAttach(p *Program, value string) error {
	switch value {
	case "":
		p.Attach = nil
	case "none":
		p.Attach = []string{}
	default:
		p.Attach = append(p.Attach, config.Words(value)...)
		if len(p.Attach) > maxTargets {
			return fmt.Errorf("more than %d targets", maxTargets)
		}
	}
	return nil
}
