// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// Reason is what an event is about; enum reason of guard.bpf.c.
type Reason uint32

// The reasons, and what Event.Detail is then.
const (
	Loaded        Reason = iota + 1 // a program was loaded; no denial
	Lease                           // revoked, or past its lease
	Namespace                       // a token used outside of its user namespace; the bpf command
	Capability                      // the capability's number; told once for a grant
	Helper                          // its number
	Kfunc                           // its id in the kernel's BTF
	ModuleKfunc                     // its id in a module's BTF
	QuotaPrograms                   // the limit, as of the next three
	QuotaMaps                       //
	QuotaMapBytes                   //
	QuotaTokens                     // 0
	MapType                         // a map type that attaches programs
	Link                            // the link's type
	Command                         // the bpf command, of a caller whose grant isn't known; see CommandKind
	PerfEvent                       // 0
	Descriptor                      // 0; a program's descriptor leaving its namespace
	Slip                            // the attach type; a program was attached, the process killed
	SlippedLink                     // the link's id; it was attached, the process killed, if the guard saw which
)

var reasons = [...]string{
	"", "loaded", "lease", "namespace", "capability", "helper", "kfunc", "module-kfunc", "quota-programs", "quota-maps",
	"quota-map-bytes", "quota-tokens", "map-type", "link", "command", "perf-event", "descriptor", "slip", "slipped-link",
}

// String gives the reason in lower case, as in "quota-maps".
func (r Reason) String() string {
	if int(r) < len(reasons) {
		return reasons[r]
	}
	return fmt.Sprintf("reason-%d", uint32(r))
}

// Event is a denial, or the load of a program.
type Event struct {
	Time   kernel.BootTime
	Reason Reason
	Detail uint64
	// Grant is 0 for what a hook can't tell the grant of.
	Grant uint64
	// Owner owns the user namespace, UID and PID are the process's on the host.
	Owner, UID uint32
	PID        int
	Comm       string
	// Of the program, if it is about one. A program that was refused its load
	// has neither an id nor a tag yet.
	Program                               ebpf.ProgramID
	ProgramType, AttachType, Instructions uint32
	Name                                  string
	Tag                                   [8]byte
	// Of a Slip that isn't a control group's: the number of the network namespace,
	// and there the interface's, or 0.
	Network, Interface uint32
}

// Kind is a kind of targets of [Attach].
type Kind int

// The kinds. AnyKind is where it isn't known which.
const (
	Interfaces Kind = iota
	Cgroups
	Processes
	AnyKind
)

// CommandKind splits the Detail of a Command into the bpf command and the kind of
// target that it was for.
func (e Event) CommandKind() (command uint64, kind Kind) {
	return e.Detail & 0xffffffff, Kind(e.Detail >> 32)
}

// Events calls what for each event until the context ends, and returns nil
// then. There should be one caller at a time. An event that finds no room is
// lost, and counted in the owner's Usage.
func (g *Guard) Events(ctx context.Context, what func(Event)) error {
	reader, err := ringbuf.NewReader(g.maps.Events)
	if err != nil {
		return fmt.Errorf("cannot read the guard's events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = reader.Close() })
	defer func() {
		if stop() {
			_ = reader.Close()
		}
	}()
	var record ringbuf.Record
	for {
		err := reader.ReadInto(&record)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot read the guard's events: %w", err)
		}
		var e bpf.GuardEvent
		if err := binary.Read(bytes.NewReader(record.RawSample), binary.NativeEndian, &e); err != nil {
			return fmt.Errorf("cannot read the guard's event: %w", err)
		}
		what(Event{
			Time: kernel.BootTime(e.Time), Reason: Reason(e.Reason), Detail: e.Detail,
			Grant: e.Grant, Owner: e.Owner, UID: e.Uid, PID: int(e.Pid), Comm: text(e.Comm),
			Program: ebpf.ProgramID(e.Program), Network: e.Network, Interface: uint32(e.Interface),
			ProgramType: e.ProgramType, AttachType: e.AttachType, Instructions: e.Instructions,
			Name: text(e.Name), Tag: e.Tag,
		})
	}
}

func text(chars [16]int8) string {
	var b [16]byte
	for i, c := range chars {
		b[i] = byte(c)
	}
	return unix.ByteSliceToString(b[:])
}
