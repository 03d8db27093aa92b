// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/guard"
)

// LearnGrant has the guard write down what a grant is used for, until the grant
// ends, and returns the smallest profile that gives that, as a file. ready is called
// when nothing is missed any more. If it fails, or the context ends, nothing is
// learnt. It counts as one of the caller's monitors.
func (b *Broker) LearnGrant(ctx context.Context, c Caller, id string, ready func() error) (string, error) {
	text, err := b.learn(ctx, c, id, ready)
	if err != nil {
		return "", Refuse(fmt.Errorf("cannot learn from %.64q: %w", id, err))
	}
	return text, nil
}

func (b *Broker) learn(ctx context.Context, c Caller, id string, ready func() error) (text string, err error) {
	g, err := b.manageable(ctx, c, id)
	if err != nil {
		return "", err
	}
	if !g.Guarded || !b.guarded() {
		return "", &Error{
			Name: "GuardUnavailable", Reason: fmt.Sprintf("cannot learn from %s: only the guard sees what it is used for, and there is none", g.ID),
			Layer: "guard", Remedy: "see \"bpfbroker check\" for what the guard needs",
		}
	}
	m, err := b.monitors.add(c.UID, func(e Event) bool { return e.Kind == KindEnded && e.Grant == g.ID })
	if err != nil {
		return "", err
	}
	defer b.monitors.remove(m)
	// It may have ended before somebody listened to that.
	if _, err := b.ledger.Get(g.ID); err != nil {
		return "", err
	}
	began := time.Now()
	err = b.guard.Learn(uint64(g.ID))
	if errors.Is(err, guard.ErrLearning) {
		return "", &Error{Name: "Busy", Reason: fmt.Sprintf("cannot learn from %s: somebody does so already", g.ID), Layer: "guard", Remedy: "wait for that to end"}
	}
	if err != nil {
		return "", err
	}
	defer func() {
		lesson, learntErr := b.guard.Learnt(uint64(g.ID))
		if err == nil {
			err = learntErr
		}
		if err != nil {
			return
		}
		p, _ := b.history.grant(g.ID)
		var remarks strings.Builder
		fmt.Fprintf(&remarks, "# What grant %s of the profile %s was used for.\n", g.ID, g.Profile)
		for _, d := range b.named(b.history.denials(p.owner, g.ID)) {
			if d.Time.After(began) {
				fmt.Fprintf(&remarks, "# It was refused, and so may be missing here: %s\n", d.Reason)
			}
		}
		text = remarks.String() + lesson.Text(g.Lease())
	}()
	if ready() != nil {
		return "", context.Canceled
	}
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-m.news:
		return "", nil
	}
}
