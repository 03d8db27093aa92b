// SPDX-License-Identifier: Apache-2.0

// Package profile reads the administrator's profiles: named sets of rights,
// kept in systemd-style text files. It knows what the words in them mean, and
// computes what a profile is worth to an attacker (its tier). It decides
// nothing about who gets a profile, and makes no system call but file reads.
package profile

import (
	"slices"
	"time"
)

// Profile is one named set of rights, read from its file and its drop-ins. It
// isn't changed after Load, so it may be shared between goroutines.
type Profile struct {
	// Name is the file's name without ".profile".
	Name string
	// Description is one line of printable text, or empty.
	Description string
	// Lease is how long a grant lasts, at least a second; 0 is without end.
	Lease time.Duration
	// Guard says whether the profile may be used without the guard.
	Guard GuardMode

	// Commands, Maps, Programs and Attachments are what the bpffs delegates:
	// bit N is value N of the kernel's enum. Attachments has bit 0 also where
	// a delegated program type is loaded without an attach type.
	Commands, Maps, Programs, Attachments Mask

	// Capabilities are those that the guard lets a token use, as in
	// capabilities(7), in upper case; nil doesn't limit them.
	Capabilities []string
	// Helpers and Kfuncs are what programs may call. Helpers are named as in
	// enum bpf_func_id without its prefix, kfuncs as the kernel's functions.
	Helpers, Kfuncs Names
	// MaxPrograms and MaxMaps bound what exists at once; 0 is unbounded.
	MaxPrograms, MaxMaps int
	// MaxMapBytes bounds the memory of all maps together; 0 is unbounded.
	MaxMapBytes uint64
	// Attach is what the grant may attach to by itself, beyond its own sockets.
	Attach Attach

	// Files are the paths that were read, in the order in which they count.
	Files []string
}

// GuardMode says how a profile and the guard go together.
type GuardMode int

const (
	// GuardUnneeded is a profile that limits nothing but the kernel's masks.
	GuardUnneeded GuardMode = iota
	// GuardRequired is a profile that is refused where the guard isn't.
	GuardRequired
	// GuardOptional is a profile whose administrator does without the guard.
	GuardOptional
)

// String gives "unneeded", "required" or "optional".
func (g GuardMode) String() string {
	switch g {
	case GuardRequired:
		return "required"
	case GuardOptional:
		return "optional"
	default:
		return "unneeded"
	}
}

// Names allows or denies by name. The zero value allows everything.
type Names struct {
	// Deny turns the list round: what it names is refused, the rest allowed.
	Deny bool
	// List has no name twice and is in the order of the files.
	List []string
}

// Allows says whether name may be used.
func (n Names) Allows(name string) bool {
	return len(n.List) == 0 || slices.Contains(n.List, name) != n.Deny
}

// Attach is the reach of a grant's own attachments, by kind of target.
type Attach struct {
	// Interfaces covers network namespaces and their devices.
	Interfaces Reach
	// Cgroups covers control groups.
	Cgroups Reach
	// Processes covers tracing, and whatever else hooks into the kernel.
	Processes Reach
}

// Reach is how far a grant may attach by itself.
type Reach int

const (
	// ReachNone lets the grant attach nothing of the kind.
	ReachNone Reach = iota
	// ReachOwn is what the grant's user namespace, or the peer, owns.
	ReachOwn
	// ReachAny is the whole host.
	ReachAny
)

// String gives "none", "own" or "any".
func (r Reach) String() string {
	switch r {
	case ReachOwn:
		return "own"
	case ReachAny:
		return "any"
	default:
		return "none"
	}
}

// NeedsGuard says that the profile has to be refused where the guard isn't.
func (p *Profile) NeedsGuard() bool {
	return p.Guard == GuardRequired
}

// NotEnforced names the settings, as they are written in the file, that
// nothing holds where the guard isn't. It is nil for a profile that limits
// nothing more than the kernel's masks do.
func (p *Profile) NotEnforced() []string {
	var s []string
	for _, l := range []struct {
		set  bool
		name string
	}{
		{p.Lease != 0, "Lease="},
		{p.Capabilities != nil, "[Guard] Capabilities="},
		{p.Helpers.List != nil, "[Guard] Helpers="},
		{p.Kfuncs.List != nil, "[Guard] Kfuncs="},
		{p.MaxPrograms != 0, "[Guard] MaxPrograms="},
		{p.MaxMaps != 0, "[Guard] MaxMaps="},
		{p.MaxMapBytes != 0, "[Guard] MaxMapBytes="},
		{p.Attach.Interfaces == ReachOwn, "[Attach] Interfaces="},
		{p.Attach.Cgroups == ReachOwn, "[Attach] Cgroups="},
		{p.Attach.Processes == ReachOwn, "[Attach] Processes="},
	} {
		if l.set {
			s = append(s, l.name)
		}
	}
	return s
}

// The capabilities that the kernel asks of a token, in the order of answers.
const (
	capBPF      = "CAP_BPF"
	capNetAdmin = "CAP_NET_ADMIN"
	capPerfmon  = "CAP_PERFMON"
	capSysAdmin = "CAP_SYS_ADMIN"
)

// AmbientCapabilities are those that a command needs in the token's user
// namespace to use the whole profile, as in capabilities(7): [Guard]
// Capabilities= if it is set, else what the delegated types ask for.
func (p *Profile) AmbientCapabilities() []string {
	if p.Capabilities != nil {
		return slices.Clone(p.Capabilities)
	}
	// The kernel asks it of BPF_TOKEN_CREATE itself.
	need := map[string]bool{capBPF: true}
	for bit, t := range programTypes {
		if p.Programs.Has(bit) {
			for _, c := range t.caps {
				need[c] = true
			}
		}
	}
	if p.Maps&netAdminMaps != 0 {
		need[capNetAdmin] = true
	}
	var s []string
	for _, c := range []string{capBPF, capNetAdmin, capPerfmon} {
		if need[c] {
			s = append(s, c)
		}
	}
	return s
}
