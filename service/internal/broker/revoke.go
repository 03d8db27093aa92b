// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

const (
	// killTime is how long a revocation goes on killing a grant's holders.
	killTime = 5 * time.Second
	// detachTime is how long attachments are looked for.
	detachTime = 10 * time.Second
	// freeTime and freeTimeKilled are how long a revocation waits for the kernel
	// to free what a grant had: what is held by the living isn't waited for.
	freeTime       = 100 * time.Millisecond
	freeTimeKilled = 3 * time.Second
)

// RevokeGrant ends a grant, and kill ends its holders: all processes in the
// target's user namespace and those below it. It returns what that could not
// reach: phrases for people.
func (b *Broker) RevokeGrant(ctx context.Context, c Caller, id string, kill bool) (notReached []string, err error) {
	g, err := b.manageable(ctx, c, id)
	if err == nil && kill && g.Owner == c.UID && g.Target != c.UID {
		// Who has a right in another's namespace has none over who else is there.
		err = b.authorizeManaging(ctx, c)
	}
	if err != nil {
		return nil, Refuse(fmt.Errorf("cannot revoke %.64q: %w", id, err))
	}
	var holders *kernel.UserNamespace
	if kill {
		if holders, err = holdersOf(g); err != nil {
			notReached = append(notReached, fmt.Sprintf("the processes in the user namespace: %v", err))
		} else {
			defer holders.Close()
		}
	}
	err = b.ledger.End(g.ID, grant.Revoked)
	if errors.Is(err, grant.ErrNotFound) {
		return nil, Refuse(fmt.Errorf("cannot revoke %.64q: %w", id, err))
	}
	attrs := append(grantAttrs(g), slog.Uint64(journal.KeyBy, uint64(c.UID)), slog.Bool(journal.KeyKill, kill))
	if err != nil {
		attrs = append(attrs, slog.String(journal.KeyReason, err.Error()))
	}
	journal.GrantRevoked.Log(ctx, attrs...)
	if err != nil && !errors.Is(err, kernel.ErrProcessGone) {
		notReached = append(notReached, err.Error())
	}
	// The grant has ended, whether anybody waits for the rest or not.
	ctx = context.WithoutCancel(ctx)
	patience := freeTime
	if holders != nil {
		patience = freeTimeKilled
		notReached = append(notReached, killHolders(ctx, holders)...)
	}
	return append(notReached, b.leftOf(ctx, g, patience)...), nil
}

// holdersOf finds the user namespace that a grant is for. The caller closes it.
func holdersOf(g grant.Grant) (*kernel.UserNamespace, error) {
	process, err := kernel.FindProcess(g.PID, g.Inode)
	if err != nil {
		return nil, err
	}
	defer process.Close()
	return process.UserNamespace(g.Namespace)
}

func killHolders(ctx context.Context, holders *kernel.UserNamespace) (notReached []string) {
	ctx, stop := context.WithTimeout(ctx, killTime)
	defer stop()
	left, err := holders.Kill(ctx)
	if left > 0 {
		notReached = append(notReached, count(left, "process")+" that did not end")
	}
	if err != nil {
		notReached = append(notReached, err.Error())
	}
	return notReached
}

// leftOf detaches what an ended grant's programs are attached to, waits for the
// kernel to free what it can, and says what is left.
func (b *Broker) leftOf(ctx context.Context, g grant.Grant, patience time.Duration) (left []string) {
	if !g.Guarded || !b.guarded() {
		left = []string{
			"tokens that were already created, until the last process and program that hold them end",
			"programs, maps and links that were already made",
		}
		if g.Path == "" {
			left = append(left, "the BPF file system that was handed out, until its last user ends")
		}
		return left
	}
	ctx, stop := context.WithTimeout(ctx, detachTime)
	defer stop()
	id := uint64(g.ID)
	_, err := b.guard.Detach(ctx, id)
	deadline := time.Now().Add(patience)
	usage, usageErr := b.guard.Usage(id)
	for usageErr == nil && !usage.Empty() && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
		usage, usageErr = b.guard.Usage(id)
	}
	if usageErr == nil && usage.Programs > 0 && err == nil {
		// Whoever was about to attach something when the grant ended has done it.
		var rest []guard.Attachment
		rest, err = b.guard.Detach(ctx, id)
		left = attachments(rest)
	}
	if err != nil {
		left = append(left, err.Error())
	}
	if usageErr == nil && !usage.Empty() {
		left = append(left, fmt.Sprintf("%s, %s and %s, until the last process and pin that hold them end",
			count(usage.Tokens, "token"), count(usage.Programs, "program"), count(usage.Maps, "map")))
		left = append(left, b.holdersLeft(ctx, id)...)
	} else if usageErr != nil && !errors.Is(usageErr, guard.ErrUnknown) {
		left = append(left, usageErr.Error())
	}
	return left
}

// maxHolders is how many processes are named.
const maxHolders = 8

// holdersLeft says who holds an ended grant's programs.
func (b *Broker) holdersLeft(ctx context.Context, id uint64) (phrases []string) {
	programs, err := b.guard.Programs(id)
	if err == nil && len(programs) == 0 {
		return nil
	}
	var found map[uint32][]int
	if err == nil {
		found, err = kernel.Holders(ctx, kernel.ProgramID, programs)
	}
	if err != nil {
		phrases = append(phrases, err.Error())
	}
	held := map[int]int{}
	for _, pids := range found {
		for _, pid := range pids {
			held[pid]++
		}
	}
	for i, pid := range slices.Sorted(maps.Keys(held)) {
		if i == maxHolders {
			return append(phrases, count(len(held)-i, "more process")+" with programs")
		}
		phrases = append(phrases, fmt.Sprintf("process %d, which has %s", pid, count(held[pid], "program")))
	}
	return phrases
}

// maxAttachments is how many are named one by one.
const maxAttachments = 8

func attachments(rest []guard.Attachment) (phrases []string) {
	for i, a := range rest {
		if i == maxAttachments {
			return append(phrases, count(len(rest)-i, "more attachment"))
		}
		phrases = append(phrases, fmt.Sprintf("an attachment (%s) of program %d, until the last process and pin that hold it end", a.How, a.Program))
	}
	return phrases
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	if strings.HasSuffix(noun, "process") {
		noun += "e"
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
