// SPDX-License-Identifier: Apache-2.0

package journal

import (
	"context"
	"log/slog"
)

// An Event is something that matters to security. Each has its own MESSAGE_ID and
// an entry in packaging/journal/bpfbroker.catalog.
type Event struct {
	id      string
	level   slog.Level
	message string
}

// The keys of the attributes that the catalog shows. Which of them goes with an
// event stands there: every record of the event has them.
const (
	KeyGrant   = "grant"   // the grant's id
	KeyProfile = "profile" // the profile's name
	KeyTier    = "tier"    // the tier as it is enforced
	KeyOwner   = "owner"   // the uid of the peer that has, or wants, a grant
	KeyProcess = "process" // the pid of the grant's process, or of the peer that was refused
	KeyUnit    = "unit"    // the unit of that process, or empty
	KeyTarget  = "target"  // the uid that owns the target
	KeyLayer   = "layer"   // what refused: request, profile, target, polkit, kernel, guard, limit
	KeyReason  = "reason"  // why, as the peer was told
	KeyPath    = "path"    // where objects are mounted
	KeyBy      = "by"      // the uid that revoked
	KeyKill    = "kill"    // whether the revocation also killed: true or false
	KeyLimit   = "limit"   // the limit's name
	KeySetting = "setting" // the setting of the profile that refused it, or empty
	KeyUID     = "uid"     // the uid of a process that the guard saw
	KeyCommand = "command" // the command name of that process
	KeyProgram = "program" // a BPF program: its type, name and length
	KeyTag     = "tag"     // the tag of a BPF program's instructions
	KeyObject  = "object"  // the object's name
	KeyFile    = "file"    // the object's ELF file
	KeyMap     = "map"     // the map or program that was opened, as it is published
	KeyAccess  = "access"  // what the descriptor is good for
	// KeyNotEnforced is what of the profile isn't held for want of the guard, or empty.
	KeyNotEnforced = "not_enforced"
	KeyGrants      = "grants" // how many grants it is about
	KeyLost        = "lost"   // how many events were lost
)

// The events.
var (
	GrantMade         = Event{"6a2746b8426c40ad84aa22ae58c4d647", slog.LevelInfo, "Grant made"}
	GrantExpired      = Event{"0cb8180dc05f4d8f8b26b130fd98c31c", slog.LevelInfo, "Grant ended: its lease expired"}
	GrantRevoked      = Event{"ff336156ee674fca9617fa85942fadb4", slog.LevelInfo, "Grant ended: it was revoked"}
	GrantProcessEnded = Event{"ef1a2001282246b7a9173eec22681e37", slog.LevelInfo, "Grant ended with its process"}
	GrantNarrowed     = Event{"fcf1b7bb64b148f6ad5d4ca8a486e05b", slog.LevelInfo, "Grant ended: its profile gives less now"}
	GrantsKept        = Event{"bc63d51c50ee4ac29f423fc6d16fa04d", slog.LevelWarn, "Grants kept: their profile has an error"}
	GrantUndone       = Event{"97d2c3c0bb2749b59b01741a70a063b8", slog.LevelWarn, "Grant undone: it never reached its peer"}
	RequestRefused    = Event{"7a7aea26eed040f2a24bebf37e302058", slog.LevelWarn, "Request refused"}
	ProgramLoaded     = Event{"efe0eee838e64e4ea0b287205fa80b64", slog.LevelInfo, "Program loaded"}
	GuardDenied       = Event{"f53738ae3c0143c393636def6bb4b110", slog.LevelWarn, "The guard refused something"}
	ObjectLoaded      = Event{"3d666b207ae74c17ba90c3e23cb9b8e3", slog.LevelInfo, "Object loaded"}
	ObjectUnloaded    = Event{"a30bfb008a8a49b78de29865300c5b4e", slog.LevelInfo, "Object unloaded"}
	ObjectFailed      = Event{"acd1d0551d6842858c281f52a4b59976", slog.LevelError, "Object not loaded"}
	ObjectOpened      = Event{"8389c9bc013f4d3c8f5259ba3c1b02cc", slog.LevelInfo, "Object opened"}
	ObjectRefused     = Event{"1b5256e8654e4b419f4e6a65f139683f", slog.LevelWarn, "Object refused"}
	ObjectsMounted    = Event{"7d5a7f4e0c46445cb6eaa8c465a7eb0f", slog.LevelInfo, "Objects mounted"}
	EventsLost        = Event{"b33c0669ffee42c4a6d0e97e98395942", slog.LevelWarn, "Events of the guard were lost"}
	LimitExceeded     = Event{"febcc7f531b6450288d7e955e514fb54", slog.LevelWarn, "Limit exceeded"}
)

// Log records the event with slog's default logger.
func (e Event) Log(ctx context.Context, attrs ...slog.Attr) {
	slog.LogAttrs(ctx, e.level, e.message, append([]slog.Attr{slog.String(messageID, e.id)}, attrs...)...)
}
