// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// The directories of a loaded object.
const (
	mapsDir     = "maps"
	programsDir = "programs"
	linksDir    = "links"
)

func linkPin(instance string, a attachment) string { return filepath.Join(instance, linksDir, a.name) }

// LoadError says why the kernel doesn't have an object.
type LoadError struct {
	Object, Reason string
	// Log is the end of what the verifier said, if it said anything.
	Log []string
}

// Error gives the reason with the verifier's last lines.
func (e *LoadError) Error() string {
	text := fmt.Sprintf("cannot load %s: %s", e.Object, e.Reason)
	if len(e.Log) > 0 {
		text += ": the verifier's last lines: " + strings.Join(e.Log, " | ")
	}
	return text
}

// maxLog and maxLogLine bound what is kept of the verifier's log, and maxReason
// what a library says.
const (
	maxLog     = 10
	maxLogLine = 200
	maxReason  = 400
)

func loadError(object string, err error) *LoadError {
	e := &LoadError{Object: object, Reason: cut(err.Error(), maxReason)}
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) {
		e.Reason = cut(verifier.Cause.Error(), maxReason)
		if name, _, ok := strings.Cut(err.Error(), ": "); ok {
			e.Reason = cut(name, maxLogLine) + ": " + e.Reason
		}
		log := verifier.Log
		for _, line := range log[max(0, len(log)-maxLog):] {
			e.Log = append(e.Log, cut(strings.TrimSpace(line), maxLogLine))
		}
	}
	return e
}

func cut(text string, length int) string {
	text = printable(text)
	if len(text) > length {
		text = strings.ToValidUTF8(text[:length], "") + "…"
	}
	return text
}

// load brings an object into the kernel in the version that its files have now:
// it adopts one that is there, or loads it, and then takes those of older
// versions away. The caller has the entry's lock.
func (c *Catalog) load(e *entry) error {
	defer c.tell(e)
	if e.failure != nil && time.Since(e.failed) < retryTime {
		return e.failure
	}
	plan, spec, err := c.plan(e.object)
	if err != nil {
		e.wrong = err
		slog.Warn("cannot offer an object", "error", err)
		return err
	}
	e.plan = plan
	current := filepath.Join(c.root, e.name+version+plan.digest)
	old := e.old
	e.old = nil
	for _, instance := range old {
		if instance == current {
			e.loaded = instance
		} else {
			e.old = append(e.old, instance)
		}
	}
	if e.loaded == "" {
		if err := c.publish(plan, spec, current, e.old); err != nil {
			e.failure, e.failed = loadError(e.name, err), time.Now()
			journal.ObjectFailed.Log(context.Background(),
				slog.String(journal.KeyObject, e.name), slog.String(journal.KeyReason, e.failure.Error()))
			return e.failure
		}
		e.loaded = current
		journal.ObjectLoaded.Log(context.Background(),
			slog.String(journal.KeyObject, e.name), slog.String(journal.KeyFile, e.object.File))
	}
	e.failure = nil
	c.protect(e)
	c.removeOld(e)
	e.followInterfaces()
	return nil
}

// publish loads, attaches and pins an object under the name instance, all or
// nothing. It takes places that only one program can have over from the old
// versions, and gives them back on error.
func (c *Catalog) publish(p *plan, spec *ebpf.CollectionSpec, instance string, old []string) (err error) {
	if err := c.makeRoot(); err != nil {
		return err
	}
	c.untidy.Store(true)
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		return err
	}
	defer collection.Close()

	staged := filepath.Join(c.root, stage+p.Name)
	if err := removePins(staged); err != nil {
		return err
	}
	var taken []takenOver
	defer func() {
		for _, t := range taken {
			if err != nil {
				t.giveBack()
			}
			_ = t.before.Close()
		}
		if err != nil {
			// It is taken away at the next start, if not now.
			_ = removePins(staged)
		}
	}()
	for _, dir := range []string{"", mapsDir, programsDir, linksDir} {
		if err := os.Mkdir(filepath.Join(staged, dir), 0o700); err != nil {
			return err
		}
	}
	for name, m := range p.Maps {
		if err := collection.Maps[m.From].Pin(filepath.Join(staged, mapsDir, name)); err != nil {
			return err
		}
	}
	for name, program := range collection.Programs {
		if err := program.Pin(filepath.Join(staged, programsDir, name)); err != nil {
			return err
		}
	}
	for _, a := range p.attachments {
		program := collection.Programs[a.program]
		var l link.Link
		t, err := a.takeOver(program, old)
		if err != nil {
			return err
		}
		if t.link != nil {
			l = t.link
			taken = append(taken, t)
		} else {
			if l, err = a.make(program); errors.Is(err, errNoInterface) {
				// It is attached when the interface comes.
				slog.Warn("an interface is missing", "object", p.Name, "interface", a.target)
				continue
			}
			if err != nil {
				return fmt.Errorf("cannot attach %s to %s: %w", a.program, a.target, err)
			}
		}
		err = pinLink(l, linkPin(staged, a))
		_ = l.Close() // the pin holds it
		if err != nil {
			return err
		}
	}
	return kernel.RenamePin(staged, instance)
}

// makeRoot makes the directory of all pins.
func (c *Catalog) makeRoot() error {
	if err := os.MkdirAll(c.root, 0o700); err != nil {
		return fmt.Errorf("cannot make the directory of pins: %w", err)
	}
	if !kernel.IsBPFFilesystem(c.root) {
		return fmt.Errorf("cannot pin anything: %s is not in a BPF file system", c.root)
	}
	return nil
}

// pinLink pins a link, also one that has another pin. Link.Pin would move that.
func pinLink(l link.Link, path string) error {
	holder, ok := l.(interface{ FD() int })
	if !ok {
		return errors.New("cannot pin a link without a descriptor: the kernel is older than 5.15")
	}
	return kernel.Pin(path, holder.FD())
}

// takenOver is a link of an older version whose program was replaced.
type takenOver struct {
	link   link.Link
	path   string
	before *ebpf.Program
}

// takeOver gives an XDP program the place of an older version of the same object,
// as an interface has one only. There may be none: then there is no link.
func (a attachment) takeOver(program *ebpf.Program, old []string) (takenOver, error) {
	var none takenOver
	if a.kind != xdp {
		return none, nil
	}
	index, err := interfaceIndex(a.target)
	if err != nil {
		return none, nil // there is nothing to take
	}
	for _, instance := range old {
		pins, err := os.ReadDir(filepath.Join(instance, linksDir))
		if err != nil {
			return none, err
		}
		for _, pin := range pins {
			path := filepath.Join(instance, linksDir, pin.Name())
			l, err := link.LoadPinnedLink(path, nil)
			if err != nil {
				return none, err
			}
			info, err := l.Info()
			if err != nil || info.XDP() == nil || int(info.XDP().Ifindex) != index {
				_ = l.Close()
				continue
			}
			before, err := ebpf.NewProgramFromID(info.Program)
			if err == nil {
				if err = l.Update(program); err == nil {
					return takenOver{l, path, before}, nil
				}
				_ = before.Close()
			}
			_ = l.Close()
			return none, fmt.Errorf("cannot replace the program on %s: %w", a.target, err)
		}
	}
	return none, nil
}

// giveBack undoes takeOver.
func (t takenOver) giveBack() {
	l, err := link.LoadPinnedLink(t.path, nil)
	if err == nil {
		err = errors.Join(l.Update(t.before), l.Close())
	}
	if err != nil {
		slog.Error("cannot give an interface back to the older version of an object", "link", t.path, "error", err)
	}
}

// followInterfaces attaches to the interfaces that are there, and forgets links
// whose interfaces are not. What can't be attached is in the journal, and is
// tried again when an interface changes. The caller has the entry's lock.
func (e *entry) followInterfaces() {
	for _, a := range e.plan.attachments {
		if !a.onInterface() {
			continue
		}
		if err := e.follow(a); err != nil {
			slog.Warn("cannot attach to an interface", "object", e.name, "interface", a.target, "error", err)
		}
	}
}

func (e *entry) follow(a attachment) error {
	path := linkPin(e.loaded, a)
	wanted, err := interfaceIndex(a.target)
	if err != nil {
		wanted = 0
	}
	program, err := programAt(e.loaded, a.program)
	if err != nil {
		return err
	}
	defer program.Close()
	if exists(path) {
		done, err := a.holds(path, program, wanted)
		if err != nil || done {
			return err
		}
		if err := removePins(path); err != nil {
			return err
		}
	}
	if wanted == 0 {
		return nil
	}
	l, err := a.make(program)
	if err != nil {
		return err
	}
	err = pinLink(l, path)
	return errors.Join(err, l.Close())
}

// holds says whether a link is on an interface, with the program. A daemon that
// was killed may have left another version's there.
func (a attachment) holds(path string, program *ebpf.Program, index int) (bool, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return false, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	on := 0
	if x := info.XDP(); x != nil {
		on = int(x.Ifindex)
	} else if t := info.TCX(); t != nil {
		on = int(t.Ifindex)
	}
	if on == 0 || on != index {
		return false, nil
	}
	own, err := program.Info()
	if err != nil {
		return false, err
	}
	if id, ok := own.ID(); ok && id != info.Program {
		return true, l.Update(program)
	}
	return true, nil
}

// unload takes an object out of the kernel. The caller has the entry's lock.
func (c *Catalog) unload(e *entry) {
	defer c.tell(e)
	if e.loaded != "" {
		e.old = append(e.old, e.loaded)
		e.loaded, e.held = "", nil
		journal.ObjectUnloaded.Log(context.Background(), slog.String(journal.KeyObject, e.name))
	}
	c.removeOld(e)
	c.forget(e)
}

// removeOld takes away what is loaded in other versions.
func (c *Catalog) removeOld(e *entry) {
	for _, instance := range e.old {
		// Under its own name it would look complete while it is emptied.
		dir, name := filepath.Split(instance)
		staged := filepath.Join(dir, stage+name)
		err := kernel.RenamePin(instance, staged)
		if err == nil {
			c.unprotect(staged)
			err = removePins(staged)
		}
		if err != nil {
			slog.Error("cannot take an object out of the kernel", "object", e.name, "error", err)
		}
	}
	e.old = nil
}

// removePins removes a pin, or a directory of pins. Links are detached when it
// returns: without a descriptor of its own a link ends some time after its pin.
func removePins(path string) error {
	var links []link.Link
	defer func() {
		for _, l := range links {
			_ = l.Close()
		}
	}()
	err := filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if !entry.IsDir() && filepath.Base(filepath.Dir(path)) == linksDir {
			if l, err := link.LoadPinnedLink(path, nil); err == nil {
				links = append(links, l)
			}
		}
		return nil
	})
	if err == nil {
		err = os.RemoveAll(path)
	}
	if err != nil {
		return fmt.Errorf("cannot remove pins: %w", err)
	}
	return nil
}

// tidy gives back the memory that loading took, if anything was loaded since the
// last time. It is much, and each helper process copies the daemon's.
func (c *Catalog) tidy() {
	if c.untidy.Swap(false) {
		debug.FreeOSMemory()
	}
}
