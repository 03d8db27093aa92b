// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Explanation is why something doesn't work.
type Explanation struct {
	// Profile is the grant's, "" if it isn't about one grant.
	Profile string
	// Ended says that the grant has ended.
	Ended bool
	// Denials are the last ones that are remembered, the last one last. Those of
	// which the guard couldn't tell which of the owner's grants it was are in each.
	Denials []Denial
	// Withheld is what the grant hasn't got: the kernel refuses it by itself, and
	// nobody hears of that.
	Withheld []profile.Withheld
}

// ExplainGrant says what was refused to a grant, that may have ended, and what it
// hasn't got; or if id is "", what was refused to the caller: by any grant, by the
// guard to processes of his without one, and requests. It remembers so much, and
// not longer than the daemon runs. A grant that isn't known is grant.ErrNotFound.
func (b *Broker) ExplainGrant(ctx context.Context, c Caller, id string) (Explanation, error) {
	if id == "" {
		return Explanation{Denials: b.named(b.history.denials(c.UID, 0))}, nil
	}
	var wanted grant.ID
	err := wanted.UnmarshalText([]byte(id))
	p, known := b.history.grant(wanted)
	if err != nil || !known || p.owner != c.UID {
		// As in manageable: nobody learns which ids there are.
		if denied := b.authorizeManaging(ctx, c); err != nil || denied != nil || !known {
			return Explanation{}, Refuse(fmt.Errorf("cannot explain %.64q: %w", id, grant.ErrNotFound))
		}
	}
	return Explanation{
		Profile: p.profile, Ended: p.ended,
		Denials:  b.named(b.history.denials(p.owner, wanted)),
		Withheld: p.rights.Withheld(p.capabilities),
	}, nil
}

// refused tells of a request that was refused.
func (b *Broker) refused(c Caller, profileName string, e *Error) {
	event := Event{
		Time: time.Now(), Kind: KindRefused, Owner: c.UID, PID: c.Process.PID,
		Reason: e.Reason, Layer: e.Layer,
	}
	if _, err := b.profiles.Load().Get(profileName); err == nil {
		event.Profile = profileName // else it is anything, of any length
	}
	b.history.deny(Denial{Event: event, Allow: e.Remedy})
	b.monitors.tell(event)
}

// guardDenial is what is remembered of a denial by the guard.
func (b *Broker) guardDenial(g guard.Event, e Event) Denial {
	d := Denial{Event: e, Allow: e.Setting}
	if g.Reason == guard.Command {
		d.Allow = allowCommand(g)
	}
	if p, ok := b.history.grant(e.Grant); ok {
		d.Allow = allow(g, p.rights)
	}
	if g.Reason == guard.Kfunc {
		d.kfunc = uint32(g.Detail)
	}
	return d
}

// named gives kernel functions their names. That isn't done when they are
// refused: the kernel's types are large.
func (b *Broker) named(denials []Denial) []Denial {
	var ids []uint32
	for _, d := range denials {
		if d.kfunc != 0 {
			ids = append(ids, d.kfunc)
		}
	}
	if ids == nil || !b.guarded() {
		return denials
	}
	names, err := b.guard.KfuncNames(ids)
	if err != nil {
		return denials // the numbers say something, too
	}
	for i := range denials {
		d := &denials[i]
		name := names[d.kfunc]
		if name == "" {
			continue
		}
		d.Reason = "the kernel function " + name
		if p, ok := b.history.grant(d.Grant); ok {
			d.Allow = inList("Kfuncs", name, p.rights.Kfuncs)
		}
	}
	return denials
}

// allow is the line of a profile that would allow what the guard refused, "" if
// none would. Numbers are only those that would have been enough this time.
func allow(e guard.Event, r *profile.Rights) string {
	switch e.Reason {
	case guard.Capability:
		return "[Guard] Capabilities=" + capabilityName(e.Detail)
	case guard.Helper:
		return inList("Helpers", profile.HelperName(e.Detail), r.Helpers)
	case guard.Kfunc:
		return inList("Kfuncs", "NAME", r.Kfuncs)
	case guard.ModuleKfunc:
		return "no list of [Guard] Kfuncs="
	case guard.QuotaPrograms, guard.QuotaMaps, guard.QuotaMapBytes:
		_, setting := denial(e)
		own := map[guard.Reason]uint64{
			guard.QuotaPrograms: uint64(r.MaxPrograms), guard.QuotaMaps: uint64(r.MaxMaps), guard.QuotaMapBytes: r.MaxMapBytes,
		}[e.Reason]
		if e.Detail != own {
			return "" // the limit of all the user's grants
		}
		return fmt.Sprintf("%s%d or more", setting, e.Detail+1)
	case guard.MapType:
		_, setting := denial(e)
		return setting + "any"
	case guard.Link:
		return reach(linkTarget(e.Detail), r.Attach)
	case guard.PerfEvent:
		return "[Attach] Processes=any"
	}
	return ""
}

// allowCommand is allow for a command that isn't any known grant's.
func allowCommand(e guard.Event) string {
	command, kind := e.CommandKind()
	switch kind {
	case guard.Interfaces:
		return "[Attach] Interfaces=own in a network namespace of the user's own, any elsewhere"
	case guard.Cgroups:
		return "[Attach] Cgroups=any; or with own, BPF_LINK_CREATE"
	case guard.Processes:
		return "[Attach] Processes=any"
	}
	return fmt.Sprintf("%s needs any for all that the profile's programs are attached to, in [Attach]", profile.CommandName(command))
}

// inList is how a name gets allowed that a list doesn't.
func inList(key, name string, list profile.Names) string {
	if list.Deny {
		return fmt.Sprintf("[Guard] %s= without ~%s", key, name)
	}
	return fmt.Sprintf("[Guard] %s=%s", key, name)
}

// linkTarget is the key of [Attach] for a type of links.
func linkTarget(linkType uint64) string {
	switch {
	case linkType == 3: // cgroup
		return "Cgroups"
	case slices.Contains([]uint64{5, 6, 10, 11, 13}, linkType): // netns, xdp, netfilter, tcx, netkit
		return "Interfaces"
	}
	return "Processes"
}

func reach(key string, a profile.Attach) string {
	has := map[string]profile.Reach{"Cgroups": a.Cgroups, "Interfaces": a.Interfaces, "Processes": a.Processes}[key]
	if has == profile.ReachNone {
		return fmt.Sprintf("[Attach] %s=own, or any if it is not the user's own", key)
	}
	return fmt.Sprintf("[Attach] %s=any", key)
}
