// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/delegate"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
)

// Publish has the broker offer the objects of a catalog, before it is used. The
// catalog stays the caller's, and must outlive the broker.
func (b *Broker) Publish(c *catalog.Catalog) {
	b.objects = c
	c.Watch(func(s catalog.Status, news catalog.News) {
		b.watchers.tell(func(w Watcher) { w.Object(object(catalog.Description{Status: s}), news) })
	})
	if b.guarded() {
		c.GuardBy(b.guard.Guard)
	}
}

// SetObjects offers other objects from now on, and returns when those for boot
// are loaded.
func (b *Broker) SetObjects(objects *catalog.Set) { b.objects.Set(objects) }

// Object is an object as it is offered now.
type Object struct {
	catalog.Description
	// Refusal is nil if it can be opened, apart from the authority.
	Refusal *Error
}

// ListObjects returns the objects by name, those with wrong files too; of each,
// what a list shows.
func (b *Broker) ListObjects() []Object {
	var all []Object
	for _, s := range b.objects.List() {
		all = append(all, object(catalog.Description{Status: s}))
	}
	return all
}

// FindObject returns what a list shows of one object.
func (b *Broker) FindObject(name string) (Object, error) {
	s, err := b.objects.Status(name)
	if err != nil {
		return Object{}, refuseObject(fmt.Errorf("cannot describe %.64q: %w", name, err))
	}
	return object(catalog.Description{Status: s}), nil
}

// DescribeObject returns one object.
func (b *Broker) DescribeObject(name string) (Object, error) {
	d, err := b.objects.Describe(name)
	if err != nil {
		return Object{}, refuseObject(fmt.Errorf("cannot describe %.64q: %w", name, err))
	}
	return object(d), nil
}

func object(d catalog.Description) Object {
	o := Object{Description: d}
	if d.Err != nil {
		o.Refusal = refuseObject(d.Err)
	}
	return o
}

// OpenLink describes a link. There is no descriptor of one to be had: it would be
// good for ending the link.
func (b *Broker) OpenLink(objectName, link string) (catalog.LinkInfo, error) {
	l, err := b.objects.Link(objectName, link)
	if err != nil {
		return l, refuseObject(fmt.Errorf("cannot describe the link %.64q of %.64q: %w", link, objectName, err))
	}
	return l, nil
}

// OpenMap opens a published map for the caller. The warnings say what the kernel
// doesn't hold of the access. The file is the caller's to close.
func (b *Broker) OpenMap(ctx context.Context, c Caller, objectName, mapName string, access catalog.Access) (*os.File, []string, error) {
	if access == catalog.Receive {
		access = "" // for which there is OpenSocket, and not the map
	}
	p := part{objectName, mapName, "", access}
	file, err := b.openObject(ctx, c, p,
		func() error { return b.objects.Offered(objectName, mapName, access) },
		func() (*os.File, error) { return b.objects.OpenMap(objectName, mapName, access, c.Process, c.Key()) })
	if err != nil {
		return nil, nil, err
	}
	return file, b.warnings(p), nil
}

// OpenProgram opens a published program for the caller, who can attach it and
// run it by its descriptor. The file is the caller's to close.
func (b *Broker) OpenProgram(ctx context.Context, c Caller, objectName, program string) (*os.File, error) {
	return b.openObject(ctx, c, part{objectName, "", program, catalog.ReadWrite},
		func() error { return b.objects.OfferedProgram(objectName, program) },
		func() (*os.File, error) { return b.objects.OpenProgram(objectName, program, c.Process, c.Key()) })
}

// OpenSocket makes a packet socket for a queue of the interface that an object's
// XDP program is attached to, and hands it out: the socket, its memory, and the
// interface's name. Both files are the caller's to close.
func (b *Broker) OpenSocket(ctx context.Context, c Caller, objectName, mapName string, queue uint32) (packets *kernel.PacketSocket, device string, err error) {
	_, err = b.openObject(ctx, c, part{objectName, mapName, "", catalog.Receive},
		func() error { return b.objects.Offered(objectName, mapName, catalog.Receive) },
		func() (*os.File, error) {
			packets, device, err = b.objects.OpenSocket(objectName, mapName, queue, c.Process, c.Key())
			return nil, err
		})
	return packets, device, err
}

// part is what is opened of an object: a map or a program.
type part struct {
	object, mapName, program string
	access                   catalog.Access
}

func (p part) String() string { return fmt.Sprintf("%.64q of %.64q", p.mapName+p.program, p.object) }

func (p part) attrs(c Caller) []slog.Attr {
	return []slog.Attr{
		slog.String(journal.KeyObject, p.object),
		slog.String(journal.KeyMap, p.mapName+p.program),
		slog.String(journal.KeyAccess, string(p.access)),
		slog.Uint64(journal.KeyOwner, uint64(c.UID)),
		slog.Int(journal.KeyProcess, c.Process.PID),
		slog.String(journal.KeyUnit, c.unitName()),
	}
}

// openObject is what the ways to open have in common. offered says whether there
// is what is asked for, and open opens it.
func (b *Broker) openObject(ctx context.Context, c Caller, p part, offered func() error, open func() (*os.File, error)) (file *os.File, err error) {
	defer func() {
		if err != nil {
			refusal := refuseObject(fmt.Errorf("cannot open %s: %w", p, err))
			b.refusals.log(ctx, c, journal.ObjectRefused, refusal, slog.String(journal.KeyObject, p.object))
			b.refused(c, "", refusal)
			err = refusal
		}
	}()
	if err := offered(); err != nil {
		return nil, err
	}
	if err := b.authorizeObject(ctx, c, p, c.Interactive); err != nil {
		return nil, err
	}
	// Much may have changed while somebody looked for a password; open looks again
	// at what is offered.
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if file, err = open(); err != nil {
		return nil, err
	}
	journal.ObjectOpened.Log(ctx, p.attrs(c)...)
	return file, nil
}

// maxMounted is how many objects a mount can have.
const maxMounted = 64

// Mounted is what MountObjects has made.
type Mounted struct {
	// Pins are the paths below the mount, as OBJECT/NAME.
	Pins []string
	// Warnings say what the kernel doesn't hold of the access.
	Warnings []string
	// Undo unmounts it again, for who can't deliver the answer.
	Undo func()
}

// MountObjects mounts a BPF file system at a path in the mount namespace of a
// process, nil for the caller's own, that has what the authority lets the caller
// open of the objects: each map with the widest access, and the programs. A
// process there opens them by their paths, and changes nothing about them. The
// process stays the caller's.
func (b *Broker) MountObjects(ctx context.Context, c Caller, names []string, process *kernel.Process, path string) (m Mounted, err error) {
	defer func() {
		if err != nil {
			refusal := refuseObject(fmt.Errorf("cannot mount objects: %w", err))
			b.refusals.log(ctx, c, journal.ObjectRefused, refusal, slog.String(journal.KeyObject, fmt.Sprintf("%.64q", strings.Join(names, " "))))
			b.refused(c, "", refusal)
			err = refusal
		}
	}()
	if err := kernel.ValidPath(path); err != nil {
		return m, err
	}
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	if len(names) == 0 || len(names) > maxMounted {
		return m, &Error{Name: "InvalidMessage", Reason: fmt.Sprintf("cannot mount %d objects", len(names)), Layer: "request", Remedy: fmt.Sprintf("name 1 to %d objects", maxMounted)}
	}
	if process == nil {
		process = c.Process
	}
	target, err := delegate.NewTarget(process)
	if err != nil {
		return m, err
	}
	defer target.Close()
	if target.Owner != c.UID && c.UID != 0 {
		return m, &Error{Name: "NamespaceNotOwned", Reason: fmt.Sprintf("cannot mount objects: the user namespace belongs to uid %d", target.Owner), Layer: "target", Remedy: "ask for a process in a user namespace of your own"}
	}

	parts, err := b.approved(ctx, c, names)
	if err != nil {
		return m, err
	}
	if err := target.Recheck(); err != nil {
		return m, err
	}
	if err := ctx.Err(); err != nil {
		return m, err
	}

	pins, err := kernel.NewPins()
	if err != nil {
		return m, err
	}
	defer pins.Close()
	made := ""
	for _, p := range parts {
		if p.object != made {
			if err := pins.Mkdir(p.object); err != nil {
				return m, err
			}
			made = p.object
		}
		if err := b.pin(pins, p, process, c.Key()); err != nil {
			return m, err
		}
		m.Pins = append(m.Pins, p.object+"/"+p.mapName+p.program)
		for _, w := range b.warnings(p) {
			if !slices.Contains(m.Warnings, w) {
				m.Warnings = append(m.Warnings, w)
			}
		}
	}
	if err := pins.Attach(target.Namespaces(), target.Owner, path); err != nil {
		return m, err
	}
	pid, inode, id := process.PID, process.Inode, pins.ID
	m.Undo = func() { unmount(pid, inode, id, path) }
	for _, p := range parts {
		journal.ObjectsMounted.Log(ctx, append(p.attrs(c), slog.String(journal.KeyPath, path))...)
	}
	return m, nil
}

// unmount takes back what MountObjects mounted.
func unmount(pid int, inode, mount uint64, path string) {
	process, err := kernel.FindProcess(pid, inode)
	if err != nil {
		return // it went with its process
	}
	defer process.Close()
	target, err := delegate.NewTarget(process)
	if err != nil {
		return // it has left what was mounted
	}
	defer target.Close()
	if err := kernel.Detach(target.Namespaces(), target.Owner, mount, path); err != nil {
		slog.Warn("cannot unmount objects", "process", pid, "error", err)
	}
}

// approved returns the parts of the objects that the authority lets the caller
// open, by object. Having none at all is an error.
func (b *Broker) approved(ctx context.Context, c Caller, names []string) ([]part, error) {
	var parts []part
	var denied error
	for _, name := range names {
		d, err := b.objects.Describe(name)
		if err != nil {
			return nil, err
		}
		for _, ways := range waysToPin(d) {
			for i, p := range ways {
				// Nobody is asked for a password for more than the least.
				err := b.authorizeObject(ctx, c, p, c.Interactive && i == len(ways)-1)
				if err == nil {
					parts = append(parts, p)
					break
				}
				if !refused(err) {
					return nil, err
				}
				denied = err
			}
		}
	}
	if len(parts) == 0 {
		if denied == nil {
			denied = catalog.ErrNoSuchMap // they publish nothing
		}
		return nil, denied
	}
	return parts, nil
}

// waysToPin gives the ways to open each thing that an object publishes, the widest
// first. There is none for what is no descriptor of a map or program.
func waysToPin(d catalog.Description) [][]part {
	var all [][]part
	for _, info := range d.Maps {
		var ways []part
		for _, access := range []catalog.Access{catalog.ReadWrite, catalog.Consume, catalog.ReadOnly, catalog.WriteOnly} {
			if slices.Contains(info.Access, access) {
				ways = append(ways, part{d.Name, info.Name, "", access})
			}
		}
		if len(ways) > 0 {
			all = append(all, ways)
		}
	}
	for _, info := range d.Programs {
		all = append(all, []part{{d.Name, "", info.Name, catalog.ReadWrite}})
	}
	return all
}

// refused says whether the authority has said no, rather than nothing.
func refused(err error) bool {
	return errors.Is(err, authority.ErrDenied) || errors.Is(err, authority.ErrChallenge) || errors.Is(err, authority.ErrDismissed)
}

// pin pins a part with the mode that goes with its access.
func (b *Broker) pin(pins *kernel.Pins, p part, process *kernel.Process, owner uint32) error {
	open := func() (*os.File, error) { return b.objects.OpenProgram(p.object, p.program, process, owner) }
	mode := uint32(0o666)
	if p.program == "" {
		open = func() (*os.File, error) { return b.objects.OpenMap(p.object, p.mapName, p.access, process, owner) }
		switch p.access {
		case catalog.ReadOnly:
			mode = 0o444
		case catalog.WriteOnly:
			mode = 0o222
		}
	}
	file, err := open()
	if err != nil {
		return err
	}
	defer file.Close()
	return pins.Pin(p.object+"/"+p.mapName+p.program, file, mode)
}

// authorizeObject asks the authority for a part of an object.
func (b *Broker) authorizeObject(ctx context.Context, c Caller, p part, interactive bool) error {
	unit, err := peer.UnitOf(c.Process)
	if err != nil {
		return err
	}
	return b.authority.Check(ctx, c.subject(), objectAction(p.access), map[string]string{
		authority.DetailObject:       p.object,
		authority.DetailMap:          p.mapName,
		authority.DetailProgram:      p.program,
		authority.DetailAccess:       string(p.access),
		authority.DetailPeerUnit:     unit.System,
		authority.DetailPeerUserUnit: unit.User,
	}, interactive)
}

// objectAction is the action for an access. To take records out of a ring buffer
// is to read them.
func objectAction(access catalog.Access) authority.Action {
	if access == catalog.ReadOnly || access == catalog.Consume {
		return authority.OpenObject
	}
	return authority.OpenObjectWritable
}

// warnings says what of an access nothing holds.
func (b *Broker) warnings(p part) []string {
	switch {
	case p.access != catalog.ReadOnly && p.access != catalog.WriteOnly, b.objects.Held(p.object, p.mapName):
		return nil
	case p.access == catalog.ReadOnly && b.guarded():
		return []string{"the guard does not hold read-only on a map that is published for writing too"}
	}
	return []string{fmt.Sprintf("the kernel does not hold %s against a process that can pin in a BPF file system of its own", p.access)}
}

// refuseObject is Refuse, for errors about objects.
func refuseObject(err error) *Error {
	var file *config.FileError
	if errors.As(err, &file) {
		return &Error{Name: "InvalidObject", Reason: file.Error(), Layer: "object", Remedy: "have the administrator mend the file"}
	}
	var load *catalog.LoadError
	if errors.As(err, &load) {
		return &Error{Name: "ObjectFailed", Reason: load.Error(), Layer: "kernel", Remedy: "have the administrator mend the object, or ask again in a while"}
	}
	return Refuse(err)
}
