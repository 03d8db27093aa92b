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
	lastUser uint64
	untidy   atomic.Bool
	guard    Guard // nil where there is none
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
}

// New opens the catalog whose pins are below root, in a BPF file system, and
// whose users are written down in the directory state. It has no objects before
// Set. The caller closes it.
func New(root, state string) (*Catalog, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of objects' users: %w", err)
	}
	c := &Catalog{root: root, state: state, entries: map[string]*entry{}, users: map[uint64]*user{}}
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
	c.mu.Unlock()
	for _, e := range entries {
		e.mu.Lock()
		clear(e.users)
		if e.expiry != nil {
			e.expiry.Stop()
		}
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
	found, err := c.scan()
	if err != nil {
		slog.Error("cannot look for loaded objects", "error", err)
	}
	c.mu.Lock()
	c.set = set
	objects := map[string]*Object{}
	for _, o := range set.All() {
		objects[o.Name] = o
	}
	for _, name := range slices.Concat(slices.Collect(maps.Keys(objects)), slices.Collect(maps.Keys(found)), set.Wrong()) {
		if c.entries[name] == nil {
			c.entries[name] = &entry{name: name, users: map[uint64]*user{}}
		}
	}
	entries := slices.SortedFunc(maps.Values(c.entries), func(a, b *entry) int { return strings.Compare(a.name, b.name) })
	c.mu.Unlock()

	for _, e := range entries {
		_, err := set.Get(e.name)
		e.mu.Lock()
		e.object, e.plan, e.wrong, e.failure = objects[e.name], nil, err, nil
		e.old, e.loaded = found[e.name], ""
		switch {
		case err == nil && (e.object.AtBoot || len(e.old) > 0):
			// What went wrong is in the entry and in the journal.
			_ = c.load(e)
			if e.loaded != "" {
				c.remember(e)
			}
		case errors.Is(err, ErrNoSuchObject):
			c.unload(e)
			e.gone = true
			c.mu.Lock()
			delete(c.entries, e.name)
			c.mu.Unlock()
		}
		e.mu.Unlock()
	}
	c.tidy()
}

// scan finds what is loaded, and takes away what was half done.
func (c *Catalog) scan() (map[string][]string, error) {
	found := map[string][]string{}
	names, err := os.ReadDir(c.root)
	if errors.Is(err, os.ErrNotExist) {
		return found, nil
	}
	if err != nil {
		return found, err
	}
	for _, entry := range names {
		path := filepath.Join(c.root, entry.Name())
		if strings.HasPrefix(entry.Name(), stage) {
			c.unprotect(path)
			if err := removePins(path); err != nil {
				return found, err
			}
			continue
		}
		name, _, ok := strings.Cut(entry.Name(), version)
		if ok {
			found[name] = append(found[name], path)
		}
	}
	return found, nil
}

// entry gives an object's entry, locked, or ErrNoSuchObject or what is wrong with
// its files. The caller unlocks it.
func (c *Catalog) entry(name string) (*entry, error) {
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
	if e.gone {
		e.mu.Unlock()
		return nil, ErrNoSuchObject
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
		e.plan, _, e.wrong = c.plan(e.object)
	}
	return e.wrong
}

// Status is an object in short.
type Status struct {
	Name, Description string
	State             State
	// Err says why it isn't available, if it isn't.
	Err error
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
		d, err := c.Describe(name)
		if errors.Is(err, ErrNoSuchObject) {
			continue
		}
		s := d.Status
		if err != nil {
			s = Status{Name: name, State: Failed, Err: err}
		}
		all = append(all, s)
	}
	return all
}

// Description is an object, and all that it says.
type Description struct {
	Status
	Object   *Object
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
	d := Description{
		Status:   Status{Name: name, Description: e.object.Description, State: Unloaded},
		Object:   e.object,
		Maps:     e.plan.maps,
		Programs: e.plan.programs,
	}
	switch {
	case e.loaded != "":
		d.State = Loaded
	case e.failure != nil:
		d.State, d.Err = Failed, e.failure
	}
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
// object if it isn't. The object is kept for the process as Keep= says. The file
// is the caller's to close.
func (c *Catalog) OpenMap(name, mapName string, access Access, process *kernel.Process) (*os.File, error) {
	return c.open(name, process, func(e *entry) (string, uint32, error) {
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
func (c *Catalog) OpenProgram(name, program string, process *kernel.Process) (*os.File, error) {
	return c.open(name, process, func(e *entry) (string, uint32, error) {
		if err := e.offeredProgram(program); err != nil {
			return "", 0, err
		}
		return filepath.Join(programsDir, e.object.Programs[program].From), 0, nil
	})
}

// open opens a pin of an object. more is done with it before it counts as opened.
func (c *Catalog) open(name string, process *kernel.Process, find func(*entry) (pin string, flags uint32, err error), more ...func(*entry, *os.File) error) (*os.File, error) {
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
	if err := c.use(e, process); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// OpenSocket makes a packet socket for a queue of the interface that an object's
// XDP program is attached to, puts it into a published XSKMAP, and hands it out,
// as OpenMap does a map. The interface's name comes with it. The socket is the
// caller's to close, and when its last holder has closed it the queue is free.
func (c *Catalog) OpenSocket(name, mapName string, queue uint32, process *kernel.Process) (_ *kernel.PacketSocket, device string, err error) {
	var packets *kernel.PacketSocket
	file, err := c.open(name, process, func(e *entry) (string, uint32, error) {
		return filepath.Join(mapsDir, mapName), 0, e.offered(mapName, Receive)
	}, func(e *entry, file *os.File) error {
		packets, device, err = e.receive(file, queue)
		return err
	})
	if err != nil {
		if packets != nil {
			packets.Close()
		}
		return nil, "", err
	}
	return packets, device, file.Close()
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
