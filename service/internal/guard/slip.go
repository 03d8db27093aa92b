// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// slipsName is the program that lists links, and its link's pin.
const slipsName = "slipped_links"

func (g *Guard) openSlips(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return fmt.Errorf("cannot open the guard's list of links: %w", err)
	}
	slips, ok := l.(*link.Iter)
	if !ok {
		_ = l.Close()
		return fmt.Errorf("cannot open the guard's list of links: it is a %T", l)
	}
	g.slips = slips
	return nil
}

// Slips looks at all links that there are, and returns an event (SlippedLink)
// for each that a live grant has attached beyond its reach, without a process:
// who knows when to keep a tracing program of the guard's from being run may
// have got that past it. Whatever happened to the guard, this finds it.
func (g *Guard) Slips() ([]Event, error) {
	list, err := g.slips.Open()
	if err != nil {
		return nil, fmt.Errorf("cannot list the links: %w", err)
	}
	defer list.Close()
	data, err := io.ReadAll(list)
	if err != nil {
		return nil, fmt.Errorf("cannot list the links: %w", err)
	}
	slips := make([]bpf.GuardSlip, len(data)/binary.Size(bpf.GuardSlip{}))
	if err := binary.Read(bytes.NewReader(data), binary.NativeEndian, slips); err != nil {
		return nil, fmt.Errorf("cannot list the links: %w", err)
	}
	var events []Event
	for _, s := range slips {
		events = append(events, Event{
			Time: kernel.Now(), Reason: SlippedLink, Detail: uint64(s.Link), Grant: s.Grant, Owner: s.Owner,
			ProgramType: s.ProgramType, AttachType: s.AttachType,
		})
	}
	return events, nil
}

// Undo detaches what an event (Slip or SlippedLink) tells of, also from who
// shares the descriptors of the killed process, for whose end it waits: until
// then the program may not be attached yet. Links of some types can't be
// detached. Needs CAP_SYS_ADMIN in the initial user namespace, and CAP_SYS_PTRACE.
func (e *Event) Undo(ctx context.Context) error {
	if err := awaitEnd(ctx, e.PID); err != nil {
		return err
	}
	if e.Reason == SlippedLink {
		return detachLink(link.ID(e.Detail))
	}
	if e.Network != 0 {
		err := kernel.InNetwork(e.Network, e.detachFromNetwork)
		if errors.Is(err, kernel.ErrProcessGone) {
			err = nil // and so has the network namespace
		}
		return err
	}
	rest, err := detachFromCgroups(ctx, map[ebpf.ProgramID]uint64{e.Program: e.Grant})
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("cannot detach program %d from its control group", e.Program)
	}
	return err
}

// awaitEnd waits until a process has ended, if that isn't 0.
func awaitEnd(ctx context.Context, pid int) error {
	if pid == 0 {
		return nil
	}
	p, err := kernel.OpenProcess(pid)
	if errors.Is(err, kernel.ErrProcessGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	for p.Alive() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d hasn't ended: %w", pid, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

func detachLink(id link.ID) error {
	l, err := link.NewFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot open link %d: %w", id, err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil {
		return fmt.Errorf("cannot detach link %d: %w", id, err)
	}
	return nil
}

// detachFromNetwork is for who is in the network namespace.
func (e *Event) detachFromNetwork() error {
	program, err := ebpf.NewProgramFromID(e.Program)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot open program %d: %w", e.Program, err)
	}
	defer program.Close()
	err = link.RawDetachProgram(link.RawDetachProgramOptions{
		Target: int(e.Interface), Program: program, Attach: ebpf.AttachType(e.Detail),
	})
	// It wasn't attached, or its interface has gone.
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot detach program %d from interface %d: %w", e.Program, e.Interface, err)
	}
	return nil
}
