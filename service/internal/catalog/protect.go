// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// Guard keeps maps from being opened for writing by any but the host's
// administrator.
type Guard interface {
	Protect(ebpf.MapID) error
	Unprotect(ebpf.MapID) error
}

// GuardBy has the guard keep what is published for reading alone, before there are
// any objects. The guard stays the caller's, and must outlive the catalog's use.
func (c *Catalog) GuardBy(g Guard) { c.guard = g }

// Held says whether the guard keeps the holders of a published map's descriptor
// for reading from writing to it.
func (c *Catalog) Held(name, mapName string) bool {
	e, err := c.entry(name)
	if err != nil {
		return false
	}
	defer e.mu.Unlock()
	return e.held[mapName]
}

// protect has the guard keep the maps of a loaded object that are published for
// reading alone. One that others may write can't be kept: the guard doesn't know
// who they are. The caller has the entry's lock.
func (c *Catalog) protect(e *entry) {
	e.held = map[string]bool{}
	if c.guard == nil {
		return
	}
	for name, m := range e.object.Maps {
		readOnly := len(m.Access) == 1 && m.Access[0] == ReadOnly
		do := c.guard.Unprotect // it may have been for reading alone before
		if readOnly {
			do = c.guard.Protect
		}
		if err := withMap(filepath.Join(e.loaded, mapsDir, name), do); err != nil {
			slog.Error("the guard does not hold a map to its access", "object", e.name, "map", name, "error", err)
			continue
		}
		e.held[name] = readOnly
	}
}

// unprotect has the guard forget the maps of an object that is about to be taken
// away.
func (c *Catalog) unprotect(instance string) {
	if c.guard == nil {
		return
	}
	pins, _ := os.ReadDir(filepath.Join(instance, mapsDir)) // perhaps none is pinned yet
	for _, pin := range pins {
		if err := withMap(filepath.Join(instance, mapsDir, pin.Name()), c.guard.Unprotect); err != nil {
			slog.Warn("the guard does not forget a map", "instance", instance, "map", pin.Name(), "error", err)
		}
	}
}

func withMap(pin string, do func(ebpf.MapID) error) error {
	m, err := ebpf.LoadPinnedMap(pin, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	return do(id)
}
