// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strconv"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/delegate"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// AcquireToken grants a profile to the caller's own process. The answer is a
// detached BPF file system that belongs to the caller's user namespace, from
// which it creates its token; the receiver closes it. Whoever can't deliver
// the answer takes it back with Withdraw.
func (b *Broker) AcquireToken(ctx context.Context, c Caller, profileName string) (grant.Grant, *os.File, error) {
	var mount *os.File
	g, err := b.grantToken(ctx, c, profileName, c.Process, "", func(f *kernel.Filesystem) (err error) {
		mount, err = f.Take()
		return err
	})
	if err != nil && mount != nil {
		_ = mount.Close()
		mount = nil
	}
	return g, mount, err
}

// MountToken grants a profile to a process, and mounts the BPF file system at
// a path in its mount namespace. The path is below root, a directory that is to
// become the process's root; "/" is the one that it has. The process stays the
// caller's.
func (b *Broker) MountToken(ctx context.Context, c Caller, profileName string, process *kernel.Process, root, path string) (grant.Grant, error) {
	if err := errors.Join(kernel.ValidPath(root), kernel.ValidPath(path)); err != nil {
		return grant.Grant{}, Refuse(err)
	}
	return b.grantToken(ctx, c, profileName, process, path, func(f *kernel.Filesystem) error {
		return f.Attach(root, path)
	})
}

// grantToken is what both ways have in common. hand hands the file system out.
func (b *Broker) grantToken(ctx context.Context, c Caller, profileName string, process *kernel.Process, path string, hand func(*kernel.Filesystem) error) (g grant.Grant, err error) {
	defer func() {
		if err != nil {
			refusal := Refuse(err)
			b.refusals.log(ctx, c, journal.RequestRefused, refusal, slog.String(journal.KeyProfile, profileName))
			b.refused(c, profileName, refusal)
			err = refusal
		}
	}()

	a, err := b.authorizeToken(ctx, c, profileName, process, func(*profile.Profile) error { return b.ledger.Room(c.UID) })
	if err != nil {
		return g, err
	}
	defer a.target.Close()
	p := a.profile

	f, err := a.target.Filesystem(p)
	if err != nil {
		return g, err
	}
	defer f.Close()

	g = grant.Grant{
		Profile:      p.Name,
		Tier:         p.Tier(b.guarded()).String(),
		Owner:        c.UID,
		Target:       a.target.Owner,
		Unit:         a.unit.Name(),
		PID:          process.PID,
		Inode:        process.Inode,
		Namespace:    a.target.Namespace,
		Path:         path,
		Capabilities: p.AmbientCapabilities(),
		Guarded:      b.guarded(),
		NotEnforced:  b.notEnforced(p),
		Rights:       p.Rights(),
	}
	if path != "" {
		g.Mount = f.ID
	}
	g.SetLease(p.Lease)
	if err := b.ledger.Begin(&g, process, a.target.Namespaces()); err != nil {
		return g, err
	}
	b.history.made(g)
	if err = b.bind(g, p, f); err == nil {
		err = hand(f)
	}
	if err == nil {
		err = b.ledger.Commit(g.ID)
	}
	if err != nil {
		b.ledger.Abort(g.ID)
		b.history.end(g.ID)
		return g, err
	}
	// SetProfiles sees live grants alone.
	if err := b.unchanged(p); err != nil {
		b.Withdraw(g.ID)
		return g, err
	}
	journal.GrantMade.Log(ctx, append(grantAttrs(g), slog.String(journal.KeyNotEnforced, strings.Join(g.NotEnforced, ", ")))...)
	b.watchers.tell(func(w Watcher) { w.Made(g) })
	b.monitors.tell(grantEvent(KindMade, g))
	return g, nil
}

// Withdraw takes back a grant whose answer did not reach the peer.
func (b *Broker) Withdraw(id grant.ID) {
	// It may have ended by itself meanwhile, and what can't be taken back is in
	// the journal.
	_ = b.ledger.End(id, grant.Undone)
}

// notEnforced is what a profile limits and nothing would hold.
func (b *Broker) notEnforced(p *profile.Profile) []string {
	if b.guarded() {
		return nil
	}
	return p.NotEnforced()
}

// offered returns a profile that can be granted now.
func (b *Broker) offered(name string) (*profile.Profile, error) {
	p, err := b.profiles.Load().Get(name)
	if err != nil {
		return nil, fmt.Errorf("cannot offer %.64q: %w", name, err)
	}
	if p.Commands|p.Maps|p.Programs|p.Attachments == 0 {
		// The kernel makes no token of that.
		return nil, &Error{Name: "InvalidProfile", Reason: fmt.Sprintf("cannot grant %s: the profile delegates nothing", name), Layer: "profile", Remedy: "have the administrator fill its [Delegate] section"}
	}
	if p.NeedsGuard() && !b.guarded() {
		return nil, &Error{
			Name: "GuardUnavailable",
			Reason: fmt.Sprintf("cannot grant %s: the profile limits what only the guard can hold (%s), and there is no guard: %v",
				name, strings.Join(p.NotEnforced(), ", "), b.guard.why),
			Layer: "guard",
			Remedy: fmt.Sprintf("%shave the administrator accept that with Guard=optional in /etc/bpfbroker/profiles.d/%s.profile.d/guard.conf",
				b.guardRemedy(), name),
		}
	}
	return p, nil
}

// authorized is what the authority said yes to.
type authorized struct {
	profile *profile.Profile
	target  *delegate.Target
	unit    peer.Unit // the target's
}

// authorizeToken goes from the profile to the authority, asks it, and then checks
// again what it was asked about. possible says whether the profile could be
// granted or renewed at all: nobody should type a password for what can't be had
// anyway. The caller closes the target.
func (b *Broker) authorizeToken(ctx context.Context, c Caller, profileName string, process *kernel.Process, possible func(*profile.Profile) error) (a authorized, err error) {
	if a.profile, err = b.offered(profileName); err != nil {
		return a, err
	}
	if a.target, err = delegate.NewTarget(process); err != nil {
		return a, err
	}
	defer func() {
		if err != nil {
			a.target.Close()
		}
	}()
	if a.unit, err = peer.UnitOf(process); err != nil {
		return a, err
	}
	if err := possible(a.profile); err != nil {
		return a, err
	}
	if err := b.ask(ctx, c, a); err != nil {
		return a, err
	}
	// Much may have changed while somebody looked for a password.
	if err := b.unchanged(a.profile); err != nil {
		return a, err
	}
	if err := a.target.Recheck(); err != nil {
		return a, err
	}
	return a, ctx.Err()
}

// ask asks the authority.
func (b *Broker) ask(ctx context.Context, c Caller, a authorized) error {
	callerUnit := a.unit
	if a.target.Process != c.Process {
		var err error
		if callerUnit, err = peer.UnitOf(c.Process); err != nil {
			return err
		}
	}
	p, owner := a.profile, a.target.Owner
	others := owner != c.UID
	err := b.authority.Check(ctx, c.subject(), tokenAction(p.Tier(b.guarded()), others), b.tokenDetailsOf(p, owner, callerUnit, a.unit), c.Interactive)
	switch {
	case err == nil:
		return nil
	case others && refused(err):
		return &Error{
			Name:   "NamespaceNotOwned",
			Reason: fmt.Sprintf("cannot grant %s: the user namespace belongs to uid %d: %v", p.Name, owner, err),
			Layer:  "polkit",
			Remedy: "ask for a process in a user namespace of your own",
		}
	}
	return fmt.Errorf("cannot grant %s: %w", p.Name, err)
}

// unchanged returns an error unless a profile can be granted as it was.
func (b *Broker) unchanged(p *profile.Profile) error {
	again, err := b.offered(p.Name)
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(again, p) {
		return &Error{Name: "Busy", Reason: fmt.Sprintf("cannot grant %s: the profile has changed meanwhile", p.Name), Layer: "profile", Remedy: "ask again"}
	}
	return nil
}

// tokenDetailsOf is what the authority is told: tokenDetails, from what the
// kernel and the profile say.
func (b *Broker) tokenDetailsOf(p *profile.Profile, owner uint32, peerUnit, targetUnit peer.Unit) map[string]string {
	return map[string]string{
		authority.DetailProfile:        p.Name,
		authority.DetailTier:           p.Tier(b.guarded()).String(),
		authority.DetailGuard:          b.guardDetail(p),
		authority.DetailPrograms:       strings.Join(profile.ProgramNames(p.Programs), " "),
		authority.DetailPeerUnit:       peerUnit.System,
		authority.DetailPeerUserUnit:   peerUnit.User,
		authority.DetailTargetUID:      strconv.FormatUint(uint64(owner), 10),
		authority.DetailTargetUnit:     targetUnit.System,
		authority.DetailTargetUserUnit: targetUnit.User,
	}
}

func (b *Broker) guardDetail(p *profile.Profile) string {
	switch {
	case p.Guard == profile.GuardUnneeded:
		return "unneeded"
	case b.guarded():
		return "active"
	}
	return "absent"
}
