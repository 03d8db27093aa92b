// SPDX-License-Identifier: Apache-2.0

package client

import (
	"encoding/json"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// ProfileSummary is a profile, in short.
type ProfileSummary struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	// Tier is what the profile is worth to an attacker as it would be enforced
	// now: "basic", "network", "tracing" or "unlimited".
	Tier string `json:"tier"`
	// Available says whether it can be granted now, apart from polkit.
	Available bool `json:"available"`
	// Reason is why not, and Remedy what would change that; "" if it can.
	Reason string `json:"reason,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// Profile is a profile and all that it says. Names are in the kernel's
// spelling.
type Profile struct {
	ProfileSummary
	// Guard is "required", "optional" or "unneeded".
	Guard string `json:"guard"`
	// LeaseSeconds is how long a grant lasts; 0 is without end.
	LeaseSeconds int64    `json:"leaseSeconds,omitempty"`
	Commands     []string `json:"commands"`
	Maps         []string `json:"maps"`
	Programs     []string `json:"programs"`
	Attachments  []string `json:"attachments"`
	// Capabilities are those that its types need in the user namespace.
	Capabilities []string `json:"capabilities"`
	// Limits is what the guard holds, a setting each ("MaxMaps=256").
	Limits []string `json:"limits"`
	// NotEnforced are those of its settings that nothing would hold now.
	NotEnforced []string `json:"notEnforced"`
	// Files are those that it was read from, in the order in which they count.
	Files []string `json:"files"`
}

// Grant is one live right.
type Grant struct {
	ID      string `json:"id"`
	Profile string `json:"profile"`
	// Tier is the profile's as it was when it was granted.
	Tier string `json:"tier"`
	// Owner is the uid that asked for it.
	Owner uint32 `json:"owner"`
	// Unit is the systemd unit of the process, "" if it has none.
	Unit string `json:"unit,omitempty"`
	// Process is the pid of the process that it was made for and ends with, in
	// the broker's pid namespace.
	Process int `json:"process"`
	// Path is where the BPF file system is mounted, "" if it was handed out
	// detached.
	Path string `json:"path,omitempty"`
	// Created and Expires are in microseconds since 1970. Expires is 0 for a
	// grant without a lease.
	Created int64 `json:"created"`
	Expires int64 `json:"expires,omitempty"`
	// Capabilities are those that its types need in the user namespace.
	Capabilities []string `json:"capabilities"`
	// NotEnforced are those of the profile's settings that nothing holds.
	NotEnforced []string `json:"notEnforced"`
}

// ObjectSummary is a published object, in short.
type ObjectSummary struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	// State is "loaded", "unloaded" or "failed".
	State string `json:"state"`
	// Available says whether it can be opened now, apart from polkit.
	Available bool `json:"available"`
	// Reason is why not, and Remedy what would change that; "" if it can.
	Reason string `json:"reason,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// Object is a published object and all that it offers.
type Object struct {
	ObjectSummary
	// Load is when it is loaded: "boot" or "first-use".
	Load string `json:"load"`
	// Keep is how long it stays after its last user: "always", "while-used" or a
	// time span.
	Keep     string          `json:"keep"`
	Maps     []ObjectMap     `json:"maps"`
	Programs []ObjectProgram `json:"programs"`
	Links    []ObjectLink    `json:"links"`
	// Files are those that it was read from, in the order in which they count.
	Files []string `json:"files"`
}

// ObjectMap is a map that an object publishes.
type ObjectMap struct {
	Name string `json:"name"`
	// Type is the kernel's, in lower case ("hash").
	Type string `json:"type"`
	// Access is what it may be opened with.
	Access []Access `json:"access"`
	// KeySize and ValueSize are in bytes. A ring buffer has neither.
	KeySize    int `json:"keySize"`
	ValueSize  int `json:"valueSize"`
	MaxEntries int `json:"maxEntries"`
	// KeyType and ValueType are in C's spelling, for people; "" if not known. A
	// ring buffer's ValueType is that of its records.
	KeyType   string `json:"keyType,omitempty"`
	ValueType string `json:"valueType,omitempty"`
	// BTF is small and encoded in base64: its typedefs "key" and "value" stand
	// for the types. See package typed. "" if they aren't known.
	BTF string `json:"btf,omitempty"`
}

// ObjectProgram is a program that an object publishes.
type ObjectProgram struct {
	Name string `json:"name"`
	// Type is the kernel's, in lower case ("xdp").
	Type string `json:"type"`
	// AttachType is likewise, "" if it has none.
	AttachType string `json:"attachType,omitempty"`
}

// ObjectLink says where an object is attached.
type ObjectLink struct {
	Name string `json:"name"`
	// Program is the program's name in the ELF file.
	Program string `json:"program"`
	// Type is how it is attached ("xdp", "tracepoint"), and Target to what.
	Type   string `json:"type"`
	Target string `json:"target"`
	// Attached says whether it is attached now: the object may not be loaded, or
	// the target not be there.
	Attached bool `json:"attached"`
}

// Access is what an opened map is good for.
type Access string

// The ways to open a map.
const (
	ReadOnly  Access = "read-only"
	ReadWrite Access = "read-write"
	WriteOnly Access = "write-only"
	// Consume is for ring buffers: to take records out. Records that one consumer
	// took are there for no other one.
	Consume Access = "consume"
	// Receive is for maps of packet sockets, of which OpenSocket has one.
	Receive Access = "receive"
)

// Event is something that happened to grants. What doesn't belong to its kind is
// empty.
type Event struct {
	// Time is in microseconds since 1970.
	Time int64 `json:"time"`
	// Kind is "made", "leased" (the lease is another one than before), "ended",
	// "refused" (no grant was made), "loaded" (a program), "denied" (by the
	// guard), or "lost" (events that can't be told). A newer broker may have more.
	Kind string `json:"kind"`
	// Owner is the uid whose event it is.
	Owner uint32 `json:"owner"`
	// Grant is "" where there is none, or where the kernel can't tell.
	Grant   string `json:"grant,omitempty"`
	Profile string `json:"profile,omitempty"`
	// Expires is when the lease ends, in microseconds since 1970; 0 is never.
	Expires int64 `json:"expires,omitempty"`
	// Process is a pid in the broker's pid namespace; of what the guard saw, UID
	// and Command are the process's. The command name is anything that the
	// process likes.
	Process int    `json:"process,omitempty"`
	UID     uint32 `json:"uid,omitempty"`
	Command string `json:"command,omitempty"`
	// Program is a BPF program's type, name and length, Tag that of its
	// instructions.
	Program string `json:"program,omitempty"`
	Tag     string `json:"tag,omitempty"`
	// Reason is why a grant ended, or what was refused; Layer is what refused,
	// and Setting the setting of the profile, "" if none did.
	Reason  string `json:"reason,omitempty"`
	Layer   string `json:"layer,omitempty"`
	Setting string `json:"setting,omitempty"`
	// Lost is how many events were lost.
	Lost int `json:"lost,omitempty"`
}

// Explanation is why something doesn't work.
type Explanation struct {
	// Profile is the grant's, "" if it isn't about one grant.
	Profile string `json:"profile,omitempty"`
	// Ended says that the grant has ended.
	Ended bool `json:"ended,omitempty"`
	// Denials are the last ones that the broker remembers, the last one last.
	Denials []Denial `json:"denials"`
	// Withheld is what the grant hasn't got: the kernel refuses it, and nobody
	// hears of it.
	Withheld []Withheld `json:"withheld"`
}

// Denial is something that was refused.
type Denial struct {
	// Event is what happened, the last time.
	Event Event `json:"event"`
	// Allow is the line of the profile that would allow it, or what else would; ""
	// if nothing would.
	Allow string `json:"allow,omitempty"`
	// Count is how often it happened.
	Count int `json:"count"`
}

// Withheld is what a setting doesn't give.
type Withheld struct {
	// Layer is what refuses it: "token mask", "namespace capability" or "sysctl".
	Layer string `json:"layer"`
	// Setting is the profile's, or the kernel's with its value.
	Setting string `json:"setting"`
	// Names are what the setting would have to name, or what it refuses.
	Names []string `json:"names"`
}

// Finding says whether something works here, for the user.
type Finding struct {
	// Subject is what it is about. "profile NAME" is about getting a profile.
	Subject string `json:"subject"`
	State   State  `json:"state"`
	// Reason is what was found, and Remedy what would change it, "" if nothing
	// needs to.
	Reason string `json:"reason"`
	Remedy string `json:"remedy,omitempty"`
}

// State is a Finding's.
type State string

// The states of findings.
const (
	Yes State = "yes"
	No  State = "no"
	// Ask means that somebody has to authenticate first.
	Ask State = "ask"
)

// Error is a refusal by the broker.
type Error struct {
	// Name is a name of org.bpfbroker.Broker's, like "NoSuchProfile", or the
	// full name of another interface's error.
	Name string `json:"-"`
	// Reason is a sentence without its full stop.
	Reason string `json:"reason"`
	// Layer is what refused: "request", "profile", "target", "polkit",
	// "kernel", "guard" or "limit".
	Layer string `json:"layer"`
	// Remedy is what would change it, "" if nothing would.
	Remedy string `json:"remedy"`
}

// Error returns the reason and the layer.
func (e *Error) Error() string { return e.Reason + " (" + e.Layer + ")" }

func newError(reply *wire.Reply) *Error {
	e := &Error{}
	name, own := strings.CutPrefix(reply.Error, brokerInterface)
	if !own || json.Unmarshal(reply.Parameters, e) != nil {
		e.Reason = "the broker answers " + reply.Error + " " + string(reply.Parameters)
		e.Layer = "request"
	}
	e.Name = name
	return e
}
