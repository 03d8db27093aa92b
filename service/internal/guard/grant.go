// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Limits are what the guard holds a grant to.
type Limits struct {
	Profile *profile.Profile
	// Deadline is the end of the lease; 0 is none.
	Deadline kernel.BootTime
	// Owner is the uid that owns the target's user namespace. What all its
	// grants have together is bounded, too.
	Owner uint32
}

// Usage is what exists by a grant, or by all grants of a user.
type Usage struct {
	Programs, Maps, Tokens int
	// MapBytes is about what the maps take when they are full.
	MapBytes uint64
	// Lost counts a user's events that weren't told.
	Lost int
}

// Empty says whether nothing exists.
func (u Usage) Empty() bool { return u.Programs == 0 && u.Maps == 0 && u.Tokens == 0 }

// Grant is a grant that the guard knows.
type Grant struct {
	ID    uint64
	Owner uint32
	// Revoked is also what Release couldn't remove.
	Revoked  bool
	Deadline kernel.BootTime
	Usage    Usage
}

// MaxPerOwner is how many grants an owner can have in the guard at once, revoked
// ones of which something is left included.
const MaxPerOwner = 4096

// ErrTooMany means that an owner has MaxPerOwner grants.
var ErrTooMany = fmt.Errorf("cannot have more than %d grants of which something is left", MaxPerOwner)

// ErrUnknown means that the guard has no such grant, or has revoked it.
var ErrUnknown = errors.New("the guard knows of no such grant")

// The states, reaches and kfunc policies of guard.bpf.c.
const (
	stateLive    = 1
	stateRevoked = 2

	kfuncsListed    = 1
	kfuncsNotListed = 2
)

// Bind holds all tokens of a BPF file system to limits, as the grant id, which
// must be new, or says ErrTooMany. It has to come before anybody gets the file system: tokens that
// exist already are nobody's. root is a descriptor of its root directory, a
// detached mount's O_PATH descriptor for one, and stays the caller's.
func (g *Guard) Bind(id uint64, root *os.File, l Limits) (err error) {
	limits, err := g.limits(l)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.owners[l.Owner]) >= MaxPerOwner {
		return ErrTooMany
	}
	if err := g.maps.Usages.Update(id, bpf.GuardUsage{}, ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("cannot bind grant %d: %w", id, err)
	}
	g.own(l.Owner, id)
	defer func() {
		if err != nil {
			_, _ = g.release(id)
		}
	}()
	err = g.maps.Users.Update(l.Owner, bpf.GuardUsage{}, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("cannot bind grant %d: %w", id, err)
	}
	if err := g.maps.Grants.Update(id, limits, ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("cannot bind grant %d: %w", id, err)
	}
	for range 10 {
		// The kernel takes this memory without waiting for a lock.
		if err = g.maps.Roots.Update(uint32(root.Fd()), id, ebpf.UpdateNoExist); !errors.Is(err, unix.ENOMEM) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("cannot bind grant %d to its file system: %w", id, err)
	}
	return nil
}

// Renew gives a live grant other limits, for all that is done with it from now
// on; its owner stays. ErrUnknown if there is none.
func (g *Guard) Renew(id uint64, l Limits) error {
	limits, err := g.limits(l)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var old bpf.GuardGrant
	if err := g.maps.Grants.Lookup(id, &old); err != nil || old.State != stateLive || old.Owner != l.Owner {
		return fmt.Errorf("cannot renew grant %d: %w", id, ErrUnknown)
	}
	return g.write(id, limits)
}

// Revoke stops a grant's tokens, also those that are held already: no program
// is loaded, no map created, no program attached by them any more. What exists
// stays, and stays confined.
func (g *Guard) Revoke(id uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.revoke(id)
}

func (g *Guard) revoke(id uint64) error {
	var limits bpf.GuardGrant
	if err := g.maps.Grants.Lookup(id, &limits); err != nil {
		return fmt.Errorf("cannot revoke grant %d: %w", id, ErrUnknown)
	}
	limits.State = stateRevoked
	return g.write(id, limits)
}

// write changes a grant in place: programs that look at it keep their pointer.
func (g *Guard) write(id uint64, limits bpf.GuardGrant) error {
	if err := g.maps.Grants.Update(id, limits, ebpf.UpdateExist|ebpf.UpdateLock); err != nil {
		return fmt.Errorf("cannot change grant %d: %w", id, err)
	}
	return nil
}

// Release revokes grants and forgets those of which nothing exists any more.
// The rest, which it returns, stays revoked, to be released later: the kernel
// frees tokens and programs some time after their last descriptor is closed.
func (g *Guard) Release(ids ...uint64) (left []uint64, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.release(ids...)
}

func (g *Guard) release(ids ...uint64) (left []uint64, err error) {
	var errs []error
	for _, id := range ids {
		if err := g.revoke(id); err != nil && !errors.Is(err, ErrUnknown) {
			errs = append(errs, err)
		}
	}
	// From here on nothing is added to what a grant has.
	if err := g.waitForPrograms(); err != nil {
		return ids, fmt.Errorf("cannot release grants: %w", err)
	}
	for _, id := range ids {
		var usage bpf.GuardUsage
		err := g.maps.Usages.Lookup(id, &usage)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		}
		if err != nil || usage.Programs|usage.Maps|usage.Tokens != 0 {
			left = append(left, id)
			continue
		}
		if err := g.forget(id); err != nil {
			errs = append(errs, fmt.Errorf("cannot release grant %d: %w", id, err))
		}
	}
	return left, errors.Join(errs...)
}

// forget removes a grant that has nothing, and its user if that was the last.
func (g *Guard) forget(id uint64) error {
	for _, m := range []*ebpf.Map{g.maps.Grants, g.maps.Usages} {
		if err := m.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	for owner, ids := range g.owners {
		if !ids[id] {
			continue
		}
		delete(ids, id)
		if len(ids) != 0 {
			continue
		}
		delete(g.owners, owner)
		if err := g.countLost(owner); err != nil {
			return err
		}
		if err := g.forgetUser(owner); err != nil {
			return err
		}
	}
	return nil
}

// forgetUser removes what is counted of an owner who has no grant.
func (g *Guard) forgetUser(owner uint32) error {
	for _, m := range []*ebpf.Map{g.maps.Told, g.maps.Users} { // in this order: nobody has been told of what is counted anew
		if err := m.Delete(owner); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

func (g *Guard) own(owner uint32, id uint64) {
	if g.owners[owner] == nil {
		g.owners[owner] = map[uint64]bool{}
	}
	g.owners[owner][id] = true
}

// readOwners finds whose the grants are that an earlier daemon left, and
// removes what it had begun.
func (g *Guard) readOwners() error {
	var id uint64
	var limits bpf.GuardGrant
	grants := g.maps.Grants.Iterate()
	for grants.Next(&id, &limits) {
		g.own(limits.Owner, id)
	}
	if err := grants.Err(); err != nil {
		return fmt.Errorf("cannot read the guard's grants: %w", err)
	}
	var usage bpf.GuardUsage
	var begun []uint64
	usages := g.maps.Usages.Iterate()
	for usages.Next(&id, &usage) {
		if g.maps.Grants.Lookup(id, &limits) != nil {
			begun = append(begun, id)
		}
	}
	if err := usages.Err(); err != nil {
		return fmt.Errorf("cannot read the guard's grants: %w", err)
	}
	for _, id := range begun {
		_ = g.maps.Usages.Delete(id)
	}
	var lesson bpf.GuardLesson
	var asked []uint64 // by an earlier daemon
	lessons := g.maps.Lessons.Iterate()
	for lessons.Next(&id, &lesson) {
		asked = append(asked, id)
	}
	if err := lessons.Err(); err != nil {
		return fmt.Errorf("cannot read the guard's lessons: %w", err)
	}
	for _, id := range asked {
		_ = g.maps.Lessons.Delete(id)
	}
	if err := g.maps.Counts.Put(countLessons, uint32(0)); err != nil {
		return fmt.Errorf("cannot write the guard's maps: %w", err)
	}
	var owner uint32
	var idle []uint32
	users := g.maps.Users.Iterate()
	for users.Next(&owner, &usage) {
		if g.owners[owner] == nil {
			idle = append(idle, owner)
		}
	}
	if err := users.Err(); err != nil {
		return fmt.Errorf("cannot read the guard's users: %w", err)
	}
	for _, owner := range idle {
		_ = g.forgetUser(owner)
	}
	return nil
}

// Grants lists what the guard knows, revoked grants too.
func (g *Guard) Grants() ([]Grant, error) {
	var list []Grant
	var id uint64
	var limits bpf.GuardGrant
	grants := g.maps.Grants.Iterate()
	for grants.Next(&id, &limits) {
		usage, err := g.Usage(id)
		if errors.Is(err, ErrUnknown) {
			continue // released meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, Grant{
			ID: id, Owner: limits.Owner, Revoked: limits.State != stateLive,
			Deadline: kernel.BootTime(limits.Deadline), Usage: usage,
		})
	}
	if err := grants.Err(); err != nil {
		return nil, fmt.Errorf("cannot list the guard's grants: %w", err)
	}
	return list, nil
}

// Usage returns what exists by a grant.
func (g *Guard) Usage(id uint64) (Usage, error) { return usageOf(g.maps.Usages, id) }

// UserUsage returns what exists by all grants of an owner.
func (g *Guard) UserUsage(owner uint32) (Usage, error) { return usageOf(g.maps.Users, owner) }

// Lost returns how many events of each owner were lost since it was last asked, by
// this daemon or an earlier one.
func (g *Guard) Lost() (map[uint32]int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for owner := range g.owners {
		if err := g.countLost(owner); err != nil {
			return nil, err
		}
	}
	lost := g.lost
	g.lost = map[uint32]int{}
	return lost, nil
}

// countLost adds to lost what an owner lost since it was called last, which the
// kernel keeps: daemons come and go.
func (g *Guard) countLost(owner uint32) error {
	usage, err := g.UserUsage(owner)
	if errors.Is(err, ErrUnknown) {
		return nil
	}
	if err != nil {
		return err
	}
	var told uint32
	if err := g.maps.Told.Lookup(owner, &told); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("cannot read what was told of: %w", err)
	}
	more := usage.Lost - int(told)
	if more <= 0 {
		return nil
	}
	if err := g.maps.Told.Put(owner, uint32(usage.Lost)); err != nil {
		return fmt.Errorf("cannot note what was told of: %w", err)
	}
	g.lost[owner] += more
	return nil
}

func usageOf(m *ebpf.Map, key any) (Usage, error) {
	var u bpf.GuardUsage
	err := m.Lookup(key, &u)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return Usage{}, fmt.Errorf("cannot read what is used: %w", ErrUnknown)
	}
	if err != nil {
		return Usage{}, fmt.Errorf("cannot read what is used: %w", err)
	}
	return Usage{
		Programs: int(u.Programs), Maps: int(u.Maps), Tokens: int(u.Tokens),
		MapBytes: u.MapBytes, Lost: int(u.Lost),
	}, nil
}

// capabilities are those that the kernel asks of tokens, of
// include/uapi/linux/capability.h.
var capabilities = map[string]int{"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}

func targets(p *profile.Profile) [3]bool {
	interfaces, cgroups, processes := p.Targets()
	return [3]bool{interfaces, cgroups, processes}
}

// limits is what the programs read.
func (g *Guard) limits(l Limits) (bpf.GuardGrant, error) {
	p := l.Profile
	limits := bpf.GuardGrant{
		Deadline:     uint64(l.Deadline),
		Capabilities: ^uint64(0),
		MaxMapBytes:  p.MaxMapBytes,
		MaxPrograms:  uint32(p.MaxPrograms),
		MaxMaps:      uint32(p.MaxMaps),
		Owner:        l.Owner,
		State:        stateLive,
		Reach:        [3]uint8{uint8(p.Attach.Interfaces), uint8(p.Attach.Cgroups), uint8(p.Attach.Processes)},
	}
	for kind, delegated := range targets(p) {
		if delegated {
			limits.Kinds |= 1 << kind
		}
	}
	if p.Capabilities != nil {
		limits.Capabilities = 0
		for _, name := range p.Capabilities {
			limits.Capabilities |= 1 << capabilities[name]
		}
	}
	if p.Helpers.List != nil {
		limits.CheckHelpers = 1
		for i, name := range profile.HelperNames() {
			if id := i + 1; p.Helpers.Allows(name) {
				limits.Helpers[id/64] |= 1 << (id % 64)
			}
		}
	}
	if p.Kfuncs.List == nil {
		return limits, nil
	}
	limits.CheckKfuncs = kfuncsListed
	if p.Kfuncs.Deny {
		limits.CheckKfuncs = kfuncsNotListed
	}
	ids, err := g.kfuncIDs(p.Kfuncs.List)
	if err != nil {
		return limits, err
	}
	if len(ids) > len(limits.Kfuncs) {
		return limits, fmt.Errorf("cannot hold %s: it names %d kfuncs, %d are possible", p.Name, len(ids), len(limits.Kfuncs))
	}
	limits.KfuncCount = uint8(copy(limits.Kfuncs[:], ids))
	return limits, nil
}

// KfuncNames are the names of functions by their numbers in the kernel's BTF;
// what is no function's number has none. That takes tens of milliseconds, and
// nobody keeps the kernel's types, which are large.
func (g *Guard) KfuncNames(ids []uint32) (map[uint32]string, error) {
	g.mu.Lock() // one at a time: users can cause it
	defer g.mu.Unlock()
	types, err := btf.LoadSpec("/sys/kernel/btf/vmlinux") // which isn't cached
	if err != nil {
		return nil, fmt.Errorf("cannot read the kernel's types: %w", err)
	}
	names := map[uint32]string{}
	for _, id := range ids {
		t, err := types.TypeByID(btf.TypeID(id))
		if f, ok := t.(*btf.Func); err == nil && ok {
			names[id] = f.Name
		}
	}
	return names, nil
}

// kfuncIDs gives the kernel's numbers of functions. One that it hasn't got
// can't be called either. Those of modules have none: programs that call any
// are refused where kfuncs are limited.
func (g *Guard) kfuncIDs(names []string) ([]uint32, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var ids []uint32
	for _, name := range names {
		id, known := g.kfuncs[name]
		if !known {
			types, err := btf.LoadKernelSpec()
			if err != nil {
				return nil, fmt.Errorf("cannot read the kernel's types: %w", err)
			}
			var f *btf.Func
			switch err := types.TypeByName(name, &f); {
			case errors.Is(err, btf.ErrNotFound):
			case err != nil:
				return nil, fmt.Errorf("cannot find the kfunc %s: %w", name, err)
			default:
				if id, err = types.TypeID(f); err != nil {
					return nil, fmt.Errorf("cannot find the kfunc %s: %w", name, err)
				}
			}
			g.kfuncs[name] = id
		}
		if id != 0 {
			ids = append(ids, uint32(id))
		}
	}
	return ids, nil
}
