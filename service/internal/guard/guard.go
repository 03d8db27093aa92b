// SPDX-License-Identifier: Apache-2.0

// Package guard has the kernel enforce grants: which helpers, kfuncs and
// capabilities a grant's programs use, how much there is of them, until when,
// and what they are attached to. The programs are in bpf/guard.bpf.c. They are
// pinned, and enforce while no daemon runs.
package guard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
)

// Guard is the guard as the kernel has it. Its methods may be called at once.
type Guard struct {
	maps bpf.GuardMaps
	// links keep the programs attached, pinned or not, until Close.
	links []link.Link
	// slips lists the links that slipped past the guard.
	slips *link.Iter
	// barrier is a map whose change waits for running programs.
	barrier, inner *ebpf.Map

	mu sync.Mutex
	// owners are the grants of each uid.
	owners map[uint32]map[uint64]bool
	// lost are the events that were lost of each owner and that nobody has been
	// told of.
	lost   map[uint32]int
	kfuncs map[string]btf.TypeID
}

// Unavailable is the error of Open where the kernel can't have the guard.
type Unavailable struct {
	// Reason says what is missing, Remedy what would change it.
	Reason, Remedy string
	// Err is what the kernel said.
	Err error
}

func (u *Unavailable) Error() string { return fmt.Sprintf("%s: %v", u.Reason, u.Err) }

func (u *Unavailable) Unwrap() error { return u.Err }

const (
	// The kernel allows no dots here.
	linksPrefix = "links-"
	unfinished  = "unfinished"
	mapsDir     = "maps"
)

// Open loads the guard and pins it below dir, which is in a BPF file system
// and nobody's but root's; or takes over the guard that it finds there, with
// all its grants. One of another build is replaced without a moment in which
// none enforces. It may have been interrupted at any time before. Needs
// CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN in the initial user namespace.
//
// The error is an *Unavailable where the guard can't work. That is found out by
// loading it and having it do something, and nothing is left behind.
func Open(dir string) (_ *Guard, err error) {
	if err := refused(); err != nil {
		return nil, unavailable(err)
	}
	g := &Guard{owners: map[uint32]map[uint64]bool{}, lost: map[uint32]int{}, kfuncs: map[string]btf.TypeID{}}
	_, statErr := os.Stat(dir)
	created := errors.Is(statErr, fs.ErrNotExist)
	defer func() {
		if err == nil {
			return
		}
		g.Close()
		if created {
			_ = Unload(dir)
		}
	}()
	if err := os.MkdirAll(filepath.Join(dir, mapsDir), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the guard's directory: %w", err)
	}
	if err := g.newBarrier(); err != nil {
		return nil, unavailable(err)
	}
	// What a start left that didn't get to its end.
	if err := os.RemoveAll(filepath.Join(dir, unfinished)); err != nil {
		return nil, fmt.Errorf("cannot remove an unfinished guard: %w", err)
	}
	old, err := filepath.Glob(filepath.Join(dir, linksPrefix+"*"))
	if err != nil {
		return nil, err
	}

	spec, err := bpf.LoadGuard()
	if err != nil {
		return nil, fmt.Errorf("cannot read the guard: %w", err)
	}
	options := ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: filepath.Join(dir, mapsDir)}}
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") {
			m.Pinning = ebpf.PinByName
		}
	}
	if err := spec.LoadAndAssign(&g.maps, &options); err != nil {
		return nil, unavailable(err)
	}
	if err := g.countAll(); err != nil {
		return nil, err
	}
	current := filepath.Join(dir, linksPrefix+bpf.Version())
	if !slices.Contains(old, current) || !complete(current, spec) {
		if err := g.attach(current, spec, &options); err != nil {
			return nil, err
		}
	}
	if err := g.openSlips(filepath.Join(current, slipsName)); err != nil {
		return nil, err
	}
	if err := g.checkCalled(); err != nil {
		return nil, err
	}
	for _, path := range old {
		if path == current {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return nil, fmt.Errorf("cannot remove an older guard: %w", err)
		}
	}
	return g, g.readOwners()
}

// refused returns EPERM where the kernel lets nobody load any LSM program. That
// is seen before it looks at the program, and long before its types are read:
// this one isn't for any hook.
func refused() error {
	p, err := ebpf.NewProgramWithOptions(&ebpf.ProgramSpec{
		Type: ebpf.LSM, AttachType: ebpf.AttachLSMMac, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, License: "GPL",
	}, ebpf.ProgramOptions{LogDisabled: true})
	if err == nil {
		return p.Close()
	}
	if errors.Is(err, unix.EPERM) {
		return unix.EPERM
	}
	return nil
}

// attach loads the programs, attaches them and pins them. A directory with
// that name has all of them.
func (g *Guard) attach(path string, spec *ebpf.CollectionSpec, options *ebpf.CollectionOptions) error {
	info, err := g.maps.Canary.Info()
	if err != nil {
		return fmt.Errorf("cannot look at the guard's maps: %w", err)
	}
	id, _ := info.ID()
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("cannot count processors: %w", err)
	}
	for name, value := range map[string]any{bpf.GuardVarCanaryId: uint32(id), bpf.GuardVarCpus: uint32(cpus)} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("cannot set the guard's %s: %w", name, err)
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, *options)
	if err != nil {
		return unavailable(err)
	}
	defer collection.Close()
	incomplete := filepath.Join(filepath.Dir(path), unfinished)
	if err := os.Mkdir(incomplete, 0o700); err != nil {
		return fmt.Errorf("cannot pin the guard: %w", err)
	}
	for name, program := range collection.Programs {
		var l link.Link
		switch {
		case spec.Programs[name].Type == ebpf.LSM:
			l, err = link.AttachLSM(link.LSMOptions{Program: program})
		case spec.Programs[name].AttachType == ebpf.AttachTraceIter:
			l, err = link.AttachIter(link.IterOptions{Program: program})
		default:
			l, err = link.AttachTracing(link.TracingOptions{Program: program})
		}
		if err != nil {
			_ = os.RemoveAll(incomplete)
			return unavailable(err)
		}
		g.links = append(g.links, l)
		if err := l.Pin(filepath.Join(incomplete, name)); err != nil {
			_ = os.RemoveAll(incomplete)
			return fmt.Errorf("cannot pin the guard: %w", err)
		}
	}
	// One that isn't complete any more, of the same build.
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("cannot replace the guard: %w", err)
	}
	if err := os.Rename(incomplete, path); err != nil {
		return fmt.Errorf("cannot pin the guard: %w", err)
	}
	return nil
}

// complete says whether all programs are pinned in a directory.
func complete(path string, spec *ebpf.CollectionSpec) bool {
	for name := range spec.Programs {
		l, err := link.LoadPinnedLink(filepath.Join(path, name), nil)
		if err != nil {
			return false
		}
		_ = l.Close()
	}
	return true
}

// checkCalled has the guard count something: a kernel lets programs be
// attached to its hooks, and doesn't call them, if bpf isn't in lsm=.
func (g *Guard) checkCalled() error {
	var before, after uint64
	if err := g.maps.Canary.Lookup(uint32(0), &before); err != nil {
		return fmt.Errorf("cannot read the guard's maps: %w", err)
	}
	info, err := g.maps.Canary.Info()
	if err != nil {
		return fmt.Errorf("cannot look at the guard's maps: %w", err)
	}
	id, _ := info.ID()
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return fmt.Errorf("cannot open the guard's maps: %w", err)
	}
	_ = m.Close()
	if err := g.maps.Canary.Lookup(uint32(0), &after); err != nil {
		return fmt.Errorf("cannot read the guard's maps: %w", err)
	}
	if before == after {
		return &Unavailable{
			Reason: "the kernel doesn't call LSM programs",
			Remedy: "add bpf to the list of lsm= on the kernel's command line (/sys/kernel/security/lsm shows it)",
			Err:    errors.ErrUnsupported,
		}
	}
	return nil
}

// unavailable says what the kernel lacks that refused the guard.
func unavailable(err error) error {
	u := &Unavailable{
		Reason: "the kernel can't load LSM programs",
		Remedy: "boot a kernel of 6.12 or later with CONFIG_BPF_LSM, CONFIG_DEBUG_INFO_BTF and CONFIG_FUNCTION_TRACER",
		Err:    err,
	}
	var verifier *ebpf.VerifierError
	switch {
	case errors.Is(err, ebpf.ErrMapIncompatible):
		u.Reason = "an older guard is loaded whose grants this one can't read"
		u.Remedy = "reboot"
	case errors.As(err, &verifier) && len(verifier.Log) > 1:
		u.Reason = "the kernel's verifier refuses the guard"
		u.Remedy = "report it, with the kernel's version"
	case errors.Is(err, unix.EPERM):
		u.Reason = "the kernel refuses LSM programs, also to root"
		u.Remedy = "boot a kernel that allows trampolines for BPF, without lockdown"
	}
	return u
}

// Close gives up the file descriptors. The guard goes on enforcing.
func (g *Guard) Close() {
	for _, l := range g.links {
		_ = l.Close()
	}
	if g.slips != nil {
		_ = g.slips.Close()
	}
	_ = g.maps.Close()
	_ = g.barrier.Close()
	_ = g.inner.Close()
}

// Unload ends the enforcement of the guard below dir, and forgets its grants.
func Unload(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("cannot unload the guard: %w", err)
	}
	return nil
}

func (g *Guard) newBarrier() (err error) {
	inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	if g.inner, err = ebpf.NewMap(inner); err != nil {
		return err
	}
	g.barrier, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: inner})
	return err
}

// waitForPrograms returns when every program has ended that runs now: the
// kernel promises that of a change to a map of maps.
func (g *Guard) waitForPrograms() error {
	return g.barrier.Put(uint32(0), g.inner)
}

// Protect has the guard refuse everybody but the host's administrator
// (CAP_SYS_ADMIN in the initial user namespace) new descriptors for writing of
// a map, until Unprotect.
func (g *Guard) Protect(id ebpf.MapID) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.put(countProtected, g.maps.Protected, uint32(id), uint32(0)); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("cannot protect a map: %w", err)
	}
	return nil
}

// Unprotect undoes Protect. Ids of maps that have gone should be given up, too.
func (g *Guard) Unprotect(id ebpf.MapID) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.remove(countProtected, g.maps.Protected, uint32(id)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("cannot give up the protection of a map: %w", err)
	}
	return nil
}

// What the programs don't look for where there is none, as the map counts has it.
// There may be less, as when a daemon was interrupted, but not more.
const (
	countLessons uint32 = iota
	countProtected
)

// put adds to a map that is counted what isn't there.
func (g *Guard) put(counted uint32, to *ebpf.Map, key, value any) error {
	if err := g.count(counted, 1); err != nil {
		return err
	}
	err := to.Update(key, value, ebpf.UpdateNoExist)
	if err != nil {
		err = errors.Join(err, g.count(counted, -1))
	}
	return err
}

// remove undoes put.
func (g *Guard) remove(counted uint32, from *ebpf.Map, key any) error {
	if err := from.Delete(key); err != nil {
		return err
	}
	return g.count(counted, -1)
}

func (g *Guard) count(counted uint32, change int) error {
	var count uint32
	if err := g.maps.Counts.Lookup(counted, &count); err != nil {
		return err
	}
	return g.maps.Counts.Put(counted, count+uint32(change))
}

// countAll counts what there is, before programs look at it: the daemon before
// may not have counted, or not have got to it.
func (g *Guard) countAll() error {
	var id, zero, count uint32
	protected := g.maps.Protected.Iterate()
	for protected.Next(&id, &zero) {
		count++
	}
	if err := protected.Err(); err != nil {
		return fmt.Errorf("cannot read the guard's protected maps: %w", err)
	}
	if err := g.maps.Counts.Put(countProtected, count); err != nil {
		return fmt.Errorf("cannot write the guard's maps: %w", err)
	}
	return nil
}
