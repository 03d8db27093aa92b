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
// a path in its mount namespace. The process stays the caller's.
func (b *Broker) MountToken(ctx context.Context, c Caller, profileName string, process *kernel.Process, path string) (grant.Grant, error) {
	if err := kernel.ValidPath(path); err != nil {
		return grant.Grant{}, Refuse(err)
	}
	return b.grantToken(ctx, c, profileName, process, path, func(f *kernel.Filesystem) error {
		return f.Attach(path)
	})
}

// grantToken is what both ways have in common. hand hands the file system out.
func (b *Broker) grantToken(ctx context.Context, c Caller, profileName string, process *kernel.Process, path string, hand func(*kernel.Filesystem) error) (g grant.Grant, err error) {
	defer func() {
		if err != nil {
			refusal := Refuse(err)
			b.refusals.log(ctx, c, profileName, refusal)
			err = refusal
		}
	}()

	p, err := b.offered(profileName)
	if err != nil {
		return g, err
	}
	target, err := delegate.NewTarget(process)
	if err != nil {
		return g, err
	}
	defer target.Close()
	unit, err := peer.UnitOf(process)
	if err != nil {
		return g, err
	}
	// Nobody should type a password for what can't be had anyway.
	if err := b.ledger.Room(c.UID); err != nil {
		return g, err
	}

	if err := b.authorizeToken(ctx, c, p, target, unit); err != nil {
		return g, err
	}

	f, err := target.Filesystem(p)
	if err != nil {
		return g, err
	}
	defer f.Close()

	g = grant.Grant{
		Profile:      p.Name,
		Tier:         p.Tier(guarded).String(),
		Owner:        c.UID,
		Target:       target.Owner,
		Unit:         unit.Name(),
		PID:          process.PID,
		Inode:        process.Inode,
		Path:         path,
		Capabilities: p.AmbientCapabilities(),
		NotEnforced:  p.NotEnforced(),
	}
	if path != "" {
		g.Mount = f.ID
	}
	g.SetLease(p.Lease)
	if err := b.ledger.Begin(&g, process); err != nil {
		return g, err
	}
	err = hand(f)
	if err == nil {
		err = b.ledger.Commit(g.ID)
	}
	if err != nil {
		b.ledger.Abort(g.ID)
		return g, err
	}
	journal.GrantMade.Log(ctx, append(grantAttrs(g), slog.String(journal.KeyNotEnforced, strings.Join(g.NotEnforced, ", ")))...)
	b.watchers.tell(func(w Watcher) { w.Made(g) })
	return g, nil
}

// Withdraw takes back a grant whose answer did not reach the peer.
func (b *Broker) Withdraw(id grant.ID) {
	// It may have ended by itself meanwhile, and what can't be taken back is in
	// the journal.
	_ = b.ledger.End(id, grant.Undone)
}

// guarded says whether the guard enforces grants.
const guarded = false

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
	if p.NeedsGuard() && !guarded {
		return nil, &Error{
			Name:   "GuardUnavailable",
			Reason: fmt.Sprintf("cannot grant %s: the profile limits what only the guard can hold (%s), and there is no guard", name, strings.Join(p.NotEnforced(), ", ")),
			Layer:  "guard",
			Remedy: fmt.Sprintf("have the administrator accept that with Guard=optional in /etc/bpfbroker/profiles.d/%s.profile.d/guard.conf", name),
		}
	}
	return p, nil
}

// authorizeToken asks the authority, and then checks again what it was asked about.
func (b *Broker) authorizeToken(ctx context.Context, c Caller, p *profile.Profile, target *delegate.Target, unit peer.Unit) error {
	callerUnit := unit
	if target.Process != c.Process {
		var err error
		if callerUnit, err = peer.UnitOf(c.Process); err != nil {
			return err
		}
	}
	others := target.Owner != c.UID
	action := tokenAction(p.Tier(guarded), others)
	details := tokenDetailsOf(p, target.Owner, callerUnit, unit)
	err := b.authority.Check(ctx, c.subject(), action, details, c.Interactive)
	denied := errors.Is(err, authority.ErrDenied) || errors.Is(err, authority.ErrChallenge) || errors.Is(err, authority.ErrDismissed)
	if others && denied {
		return &Error{
			Name:   "NamespaceNotOwned",
			Reason: fmt.Sprintf("cannot grant %s: the user namespace belongs to uid %d: %v", p.Name, target.Owner, err),
			Layer:  "polkit",
			Remedy: "ask for a process in a user namespace of your own",
		}
	}
	if err != nil {
		return fmt.Errorf("cannot grant %s: %w", p.Name, err)
	}

	// Much may have changed while somebody looked for a password.
	again, err := b.offered(p.Name)
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(again, p) {
		return &Error{Name: "Busy", Reason: fmt.Sprintf("cannot grant %s: the profile has changed meanwhile", p.Name), Layer: "profile", Remedy: "ask again"}
	}
	if err := target.Recheck(); err != nil {
		return err
	}
	return ctx.Err()
}

// tokenDetailsOf is what the authority is told: tokenDetails, from what the
// kernel and the profile say.
func tokenDetailsOf(p *profile.Profile, owner uint32, peerUnit, targetUnit peer.Unit) map[string]string {
	return map[string]string{
		authority.DetailProfile:        p.Name,
		authority.DetailTier:           p.Tier(guarded).String(),
		authority.DetailGuard:          guardDetail(p),
		authority.DetailPrograms:       strings.Join(profile.ProgramNames(p.Programs), " "),
		authority.DetailPeerUnit:       peerUnit.System,
		authority.DetailPeerUserUnit:   peerUnit.User,
		authority.DetailTargetUID:      strconv.FormatUint(uint64(owner), 10),
		authority.DetailTargetUnit:     targetUnit.System,
		authority.DetailTargetUserUnit: targetUnit.User,
	}
}

func guardDetail(p *profile.Profile) string {
	switch {
	case p.Guard == profile.GuardUnneeded:
		return "unneeded"
	case guarded:
		return "active"
	}
	return "absent"
}
