// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"fmt"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Kind is what an Event tells.
type Kind string

// The kinds.
const (
	KindMade    Kind = "made"    // a grant was made
	KindLeased  Kind = "leased"  // a grant's lease is another one than before
	KindEnded   Kind = "ended"   // a grant has ended; Reason says why
	KindRefused Kind = "refused" // no grant was made
	KindLoaded  Kind = "loaded"  // a program was loaded with a grant
	KindDenied  Kind = "denied"  // the guard refused something
	KindLost    Kind = "lost"    // Lost events can't be told
)

// Event is something that happened to a user's grants. What doesn't belong to
// its kind is empty.
type Event struct {
	Time time.Time
	Kind Kind
	// Owner is the uid whose event it is.
	Owner uint32
	// Grant is 0 where there is none, or where a hook can't tell it.
	Grant   grant.ID
	Profile string
	// Expires is when the grant's lease ends, in microseconds since 1970; 0 is
	// never.
	Expires int64
	// PID, UID and Command are the process's on the host; UID and Command of
	// what the guard saw alone.
	PID     int
	UID     uint32
	Command string
	// Program is a BPF program's type, name and length, Tag that of its
	// instructions.
	Program, Tag string
	// Reason is why a grant ended, or what was refused.
	Reason string
	// Layer is what refused, and Setting which setting of the profile it was.
	Layer, Setting string
	// Lost is how many events can't be told.
	Lost int
}

func grantEvent(kind Kind, g grant.Grant) Event {
	return Event{Time: time.Now(), Kind: kind, Owner: g.Owner, Grant: g.ID, Profile: g.Profile, Expires: g.Expires, PID: g.PID}
}

// guardEvent is what the guard saw, of a grant that may have ended.
func (b *Broker) guardEvent(e guard.Event) Event {
	event := Event{
		Time: time.Now().Add(-time.Duration(kernel.Now() - e.Time)), Kind: KindLoaded,
		Owner: e.Owner, Grant: grant.ID(e.Grant), PID: e.PID, UID: e.UID, Command: e.Comm,
	}
	if g, ok := b.history.grant(event.Grant); ok {
		event.Owner, event.Profile = g.owner, g.profile
	}
	if e.Instructions > 0 {
		event.Program = fmt.Sprintf("%s %q, %d instructions", profile.ProgramName(uint64(e.ProgramType)), e.Name, e.Instructions)
	}
	if e.Reason == guard.Loaded {
		event.Tag = fmt.Sprintf("%x", e.Tag)
		return event
	}
	event.Kind, event.Layer = KindDenied, "guard"
	event.Reason, event.Setting = denial(e)
	return event
}
