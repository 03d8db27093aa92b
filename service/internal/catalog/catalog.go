// SPDX-License-Identifier: Apache-2.0

// Package catalog loads, attaches and pins the objects that the administrator
// publishes, and opens what is published.
//
// An object that is loaded is a directory NAME@DIGEST in a BPF file system, with
// its maps, programs and links. It is put together under another name and then
// renamed, so that it is there as a whole or not at all, whenever the daemon is
// killed; the digest says which version of the object's files it was made from.
// A daemon that starts adopts what it finds.
package catalog

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

const (
	// stage begins the name of a directory that is being filled or emptied. No
	// object has such a name.
	stage = "+"
	// version is between an object's name and its digest.
	version = "@"
	// retryTime is how long an object that couldn't be loaded isn't tried again.
	retryTime = 30 * time.Second
)

// Catalog has the objects. Its methods may be called concurrently.
type Catalog struct {
	root, state string
	// files reads ELF files: by the rules for the objects' own.
	files    config.Dirs
	watcher  *kernel.Watcher
	netlink  *kernel.InterfaceWatcher
	mu       sync.Mutex
	closed   bool
	set      *Set
	entries  map[string]*entry
	users    map[uint64]*user
	owners   map[uint32]int // how many users of each owner's
	lastUser uint64
	untidy   atomic.Bool
	guard    Guard // nil where there is none
	tellNews func(Status, News)
}

// entry is one object, and what is there of it.
type entry struct {
	name string
	mu   sync.Mutex
	// gone: the object isn't in the set any more.
	gone bool
	// object is nil if the files are wrong.
	object *Object
	// plan is made when somebody needs it. wrong says why there is none.
	plan  *plan
	wrong error
	// failure says why it couldn't be loaded, at the time failed.
	failure *LoadError
	failed  time.Time
	// loaded is the directory of the current version, or empty; old are those of
	// others, which are still attached.
	loaded string
	old    []string
	// held are the published maps that the guard keeps from being written.
	held map[string]bool
	// users are the processes that an object is kept for.
	users  map[uint64]*user
	expiry *time.Timer
	// told is what was last told of it, nil if nothing was.
	told *Status
}

// New opens the catalog whose pins are below root, in a BPF file system, and
// whose users are written down in the directory state. It has no objects before
// Set. The caller closes it.
func New(root, state string) (*Catalog, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of objects' users: %w", err)
	}
	c := &Catalog{root: root, state: state, entries: map[string]*entry{}, users: map[uint64]*user{}, owners: map[uint32]int{}, tellNews: func(Status, News) {}}
	var err error
	if c.watcher, err = kernel.NewWatcher(c.exited, func() {}); err != nil {
		return nil, err
	}
	if c.netlink, err = kernel.WatchInterfaces(c.interfacesChanged); err != nil {
		c.watcher.Close()
		return nil, err
	}
	return c, nil
}

// Close stops the catalog. What is loaded stays.
func (c *Catalog) Close() {
	c.netlink.Close()
	c.watcher.Close()
	c.mu.Lock()
	c.closed = true
	entries := slices.Collect(maps.Values(c.entries))
	for _, u := range c.users {
		_ = u.process.Close()
	}
	clear(c.users)
	clear(c.owners)
	c.mu.Unlock()
	for _, e := range entries {
		e.mu.Lock()
		clear(e.users)
		e.stopExpiry()
		e.mu.Unlock()
	}
}

// Set offers other objects from now on: it loads those for boot and those that
// were loaded in an older version, and unloads those that aren't there any more.
// An object whose files are wrong stays loaded as it is, and isn't offered.
func (c *Catalog) Set(set *Set) {
	for _, err := range set.Errors() {
		slog.Warn("cannot offer an object", "error", err)
	}
	pins, _ := c.listPins() // an error is said of each object below
	names := set.Wrong()
	for _, o := range set.All() {
		names = append(names, o.Name)
	}
	for _, pin := range pins {
		names = append(names, objectOf(pin))
	}
	c.mu.Lock()
	c.set = set
	for _, name := range names {
		if c.entries[name] == nil {
			// As a whole: somebody may ask for it before its turn comes.
			e := &entry{name: name, users: map[uint64]*user{}}
			e.object, e.wrong = set.Get(name)
			c.entries[name] = e
		}
	}
	entries := slices.SortedFunc(maps.Values(c.entries), func(a, b *entry) int { return strings.Compare(a.name, b.name) })
	c.mu.Unlock()

	for _, e := range entries {
		e.mu.Lock()
		c.renew(e, set)
		e.mu.Unlock()
	}
	c.tidy()
}

// renew brings one object to what its files say now. The caller has the entry's
// lock, so that nobody loads or unloads it meanwhile.
func (c *Catalog) renew(e *entry, set *Set) {
	old, err := c.instancesOf(e.name)
	if err != nil {
		slog.Error("cannot look for a loaded object", "object", e.name, "error", err)
	}
	e.stopExpiry() // Keep= may be another one
	e.object, e.wrong = set.Get(e.name)
	e.plan, e.failure, e.old, e.loaded = nil, nil, old, ""
	switch {
	case errors.Is(e.wrong, ErrNoSuchObject):
		e.gone = true
		c.unload(e)
		c.mu.Lock()
		delete(c.entries, e.name)
		c.mu.Unlock()
		if e.told != nil {
			c.tellNews(*e.told, Gone)
		}
		return
	case e.wrong == nil && (e.object.AtBoot || len(old) > 0):
		// What went wrong is in the entry and in the journal.
		_ = c.load(e)
		if e.loaded != "" {
			c.remember(e)
		}
	}
	c.tell(e)
}

// listPins lists the directories of pins by their names, those that are being filled
// or emptied too.
func (c *Catalog) listPins() ([]string, error) {
	entries, err := os.ReadDir(c.root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if name := entry.Name(); strings.HasPrefix(name, stage) || strings.Contains(name, version) {
			names = append(names, name)
		}
	}
	return names, nil
}

// objectOf says whose pins a directory has, by its name.
func objectOf(pins string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(pins, stage), version)
	return name
}

// instancesOf finds what is loaded of an object, and takes away what was half done.
// The caller has the entry's lock.
func (c *Catalog) instancesOf(name string) (found []string, err error) {
	pins, err := c.listPins()
	for _, pin := range pins {
		path := filepath.Join(c.root, pin)
		switch {
		case objectOf(pin) != name:
		case strings.HasPrefix(pin, stage):
			c.unprotect(path)
			err = errors.Join(err, removePins(path))
		default:
			found = append(found, path)
		}
	}
	return found, err
}

// find gives an object's entry, locked, or ErrNoSuchObject or what keeps all from
// being found. The caller unlocks it.
func (c *Catalog) find(name string) (*entry, error) {
	c.mu.Lock()
	set := c.set
	e := c.entries[name]
	c.mu.Unlock()
	if e == nil {
		_, err := set.Get(name)
		if err == nil {
			err = ErrNoSuchObject
		}
		return nil, err
	}
	e.mu.Lock()
	if e.gone || errors.Is(e.wrong, ErrNoSuchObject) {
		e.mu.Unlock()
		return nil, ErrNoSuchObject
	}
	return e, nil
}

// entry is find for an object whose files are right.
func (c *Catalog) entry(name string) (*entry, error) {
	e, err := c.find(name)
	if err != nil {
		return nil, err
	}
	if err := c.ready(e); err != nil {
		e.mu.Unlock()
		return nil, err
	}
	return e, nil
}

// ready makes the plan of an object whose files are right.
func (c *Catalog) ready(e *entry) error {
	if e.wrong == nil && e.plan == nil {
		if e.plan, _, e.wrong = c.plan(e.object); e.wrong != nil {
			c.tell(e)
		}
	}
	return e.wrong
}

// Status is an object in short.
type Status struct {
	Name  string
	State State
	// Object is what its files say, nil if they are wrong.
	Object *Object
	// Err says why it isn't available, if it isn't.
	Err error

	instance string // which is loaded
}

// State says what is there of an object.
type State string

// The states.
const (
	Loaded   State = "loaded"
	Unloaded State = "unloaded"
	// Failed: its files are wrong, or it couldn't be loaded.
	Failed State = "failed"
)

// List returns the objects, by name, those with wrong files too.
func (c *Catalog) List() []Status {
	c.mu.Lock()
	names := slices.Sorted(maps.Keys(c.entries))
	c.mu.Unlock()
	var all []Status
	for _, name := range names {
		if s, err := c.Status(name); err == nil { // it may have gone meanwhile
			all = append(all, s)
		}
	}
	return all
}

// Status returns one object in short, also one with wrong files.
func (c *Catalog) Status(name string) (Status, error) {
	e, err := c.find(name)
	if err != nil {
		return Status{}, err
	}
	defer e.mu.Unlock()
	_ = c.ready(e) // what is wrong is in the status
	return e.status(), nil
}

func (e *entry) status() Status {
	s := Status{Name: e.name, State: Unloaded, Object: e.object, instance: e.loaded}
	switch {
	case e.wrong != nil:
		s.State, s.Object, s.Err = Failed, nil, e.wrong
	case e.loaded != "":
		s.State = Loaded
	case e.failure != nil:
		s.State, s.Err = Failed, e.failure
	}
	return s
}

// Description is an object, and all that it says.
type Description struct {
	Status
	Maps     []MapInfo
	Programs []ProgramInfo
	Links    []LinkInfo
}

// LinkInfo describes a link.
type LinkInfo struct {
	Name, Program, Type, Target string
	// Attached says whether it is there now: an interface can be missing.
	Attached bool
}

// Describe returns one object.
func (c *Catalog) Describe(name string) (Description, error) {
	e, err := c.entry(name)
	if err != nil {
		return Description{}, err
	}
	defer e.mu.Unlock()
	d := Description{Status: e.status(), Maps: e.plan.maps, Programs: e.plan.programs}
	for _, a := range e.plan.attachments {
		d.Links = append(d.Links, LinkInfo{
			Name: a.name, Program: a.program, Type: string(a.kind), Target: a.target,
			Attached: e.loaded != "" && exists(linkPin(e.loaded, a)),
		})
	}
	return d, nil
}

// Link returns one link of an object.
func (c *Catalog) Link(name, linkName string) (LinkInfo, error) {
	d, err := c.Describe(name)
	if err != nil {
		return LinkInfo{}, err
	}
	for _, l := range d.Links {
		if l.Name == linkName {
			return l, nil
		}
	}
	return LinkInfo{}, ErrNoSuchLink
}

// Offered says whether a map is published with an access, and looks whether the
// object can be loaded as far as its files tell. It loads nothing.
func (c *Catalog) Offered(name, mapName string, access Access) error {
	e, err := c.entry(name)
	if err != nil {
		return err
	}
	defer e.mu.Unlock()
	return e.offered(mapName, access)
}

func (e *entry) offered(mapName string, access Access) error {
	m := e.object.Maps[mapName]
	switch {
	case m == nil:
		return ErrNoSuchMap
	case !slices.Contains(m.Access, access):
		return ErrNotOffered
	}
	return nil
}

// OfferedProgram is Offered for a program.
func (c *Catalog) OfferedProgram(name, program string) error {
	e, err := c.entry(name)
	if err != nil {
		return err
	}
	defer e.mu.Unlock()
	return e.offeredProgram(program)
}

func (e *entry) offeredProgram(program string) error {
	if p := e.object.Programs[program]; p == nil || !p.Publish {
		return ErrNoSuchProgram
	}
	return nil
}

// OpenMap opens a published map with an access that is offered, after loading the
// object if it isn't. The object is kept for the process as Keep= says; owner is what
// the limits of the user who asks count by. The file is the caller's to close.
func (c *Catalog) OpenMap(name, mapName string, access Access, process *kernel.Process, owner uint32) (*os.File, error) {
	return c.open(name, process, owner, func(e *entry) (string, uint32, error) {
		var flags uint32
		switch access {
		case ReadOnly:
			flags = kernel.PinReadOnly
		case WriteOnly:
			flags = kernel.PinWriteOnly
		}
		return filepath.Join(mapsDir, mapName), flags, e.offered(mapName, access)
	})
}

// OpenProgram opens a published program, as OpenMap does a map.
func (c *Catalog) OpenProgram(name, program string, process *kernel.Process, owner uint32) (*os.File, error) {
	return c.open(name, process, owner, func(e *entry) (string, uint32, error) {
		if err := e.offeredProgram(program); err != nil {
			return "", 0, err
		}
		return filepath.Join(programsDir, e.object.Programs[program].From), 0, nil
	})
}

// open opens a pin of an object. more is done with it before it counts as opened.
func (c *Catalog) open(name string, process *kernel.Process, owner uint32, find func(*entry) (pin string, flags uint32, err error), more ...func(*entry, *os.File) error) (*os.File, error) {
	e, err := c.entry(name)
	if err != nil {
		return nil, err
	}
	defer e.mu.Unlock()
	pin, flags, err := find(e)
	if err != nil {
		return nil, err
	}
	if e.loaded == "" {
		if err := c.load(e); err != nil {
			return nil, err
		}
		c.tidy()
	}
	file, err := kernel.OpenPinned(filepath.Join(e.loaded, pin), flags)
	if errors.Is(err, kernel.ErrNotPinned) {
		return nil, &LoadError{Object: name, Reason: "somebody has removed its pins"}
	}
	if err != nil {
		return nil, err
	}
	for _, do := range more {
		if err := do(e, file); err != nil {
			_ = file.Close()
			return nil, err
		}
	}
	if err := c.use(e, process, owner); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// OpenSocket makes a packet socket for a queue of the interface that an object's
// XDP program is attached to, puts it into a published XSKMAP, and hands it out,
// as OpenMap does a map. The interface's name comes with it. The socket is the
// caller's to close, and when its last holder has closed it the queue is free.
func (c *Catalog) OpenSocket(name, mapName string, queue uint32, process *kernel.Process, owner uint32) (packets *kernel.PacketSocket, device string, err error) {
	file, err := c.open(name, process, owner, func(e *entry) (string, uint32, error) {
		return filepath.Join(mapsDir, mapName), 0, e.offered(mapName, Receive)
	}, func(e *entry, file *os.File) error {
		packets, device, err = e.receive(file, queue)
		return err
	})
	if err == nil {
		err = file.Close()
	}
	if err != nil {
		if packets != nil {
			packets.Close()
		}
		return nil, "", err
	}
	return packets, device, nil
}

// receive makes a packet socket and puts it into a map.
func (e *entry) receive(file *os.File, queue uint32) (*kernel.PacketSocket, string, error) {
	for _, a := range e.plan.attachments {
		index, err := interfaceIndex(a.target)
		if a.kind != xdp || err != nil {
			continue
		}
		packets, err := kernel.NewPacketSocket(uint32(index), queue)
		if err != nil {
			return nil, "", err
		}
		if err := kernel.AddSocket(file, queue, packets.Socket); err != nil {
			packets.Close()
			return nil, "", err
		}
		return packets, a.target, nil
	}
	return nil, "", ErrNotAttached
}

// Busy says whether there is an object whose users or interfaces have to be
// watched.
func (c *Catalog) Busy() bool {
	c.mu.Lock()
	entries := slices.Collect(maps.Values(c.entries))
	c.mu.Unlock()
	for _, e := range entries {
		e.mu.Lock()
		busy := e.loaded != "" && (e.object.Keep != forever || e.onInterfaces())
		e.mu.Unlock()
		if busy {
			return true
		}
	}
	return false
}

// onInterfaces says whether an object that is loaded is attached to interfaces.
func (e *entry) onInterfaces() bool {
	return e.plan != nil && slices.ContainsFunc(e.plan.attachments, attachment.onInterface)
}

// interfacesChanged attaches to interfaces that have come, in all objects.
func (c *Catalog) interfacesChanged() {
	c.mu.Lock()
	entries := slices.Collect(maps.Values(c.entries))
	c.mu.Unlock()
	for _, e := range entries {
		e.mu.Lock()
		if e.loaded != "" && e.onInterfaces() {
			e.followInterfaces()
		}
		e.mu.Unlock()
	}
}

// programAt opens a program of a loaded object.
func programAt(instance, program string) (*ebpf.Program, error) {
	return ebpf.LoadPinnedProgram(filepath.Join(instance, programsDir, program), nil)
}
