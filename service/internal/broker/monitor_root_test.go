// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package broker

import (
	"context"
	"strings"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// The events of a grant's life come in their order, and not to strangers.
func TestMonitorGrants(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	hear := func(uid uint32) <-chan Event {
		events, ready := make(chan Event, 100), make(chan struct{})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error)
		go func() {
			ended <- f.Monitor(ctx, plain(uid), false, func() error { close(ready); return nil }, func(e Event) error { events <- e; return nil })
		}()
		<-ready
		t.Cleanup(func() { cancel(); <-ended })
		return events
	}
	own, strange := hear(alice), hear(bob)
	_, c, g := f.mounted("guarded")
	if _, err := f.RenewGrant(t.Context(), c, g.ID.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.revoke(c, g.ID.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.MountToken(t.Context(), c, strings.Repeat("x", 10_000), c.Process, "/", "/mnt"); err == nil {
		t.Error("got a profile that isn't there")
	}
	for _, want := range []Kind{KindMade, KindLeased, KindEnded, KindRefused} {
		e := <-own
		if e.Kind != want || e.Owner != alice || (want != KindRefused) != (e.Grant == g.ID) || len(e.Profile)+len(e.Reason) > 300 {
			t.Errorf("got %+v, want %s", e, want)
		}
	}
	if len(strange) != 0 {
		t.Errorf("a stranger hears %+v", <-strange)
	}

	e, err := f.ExplainGrant(t.Context(), c, g.ID.String())
	if err != nil || !e.Ended || e.Profile != "guarded" || len(e.Withheld) == 0 {
		t.Errorf("got %+v, %v", e, err)
	}
	f.answers(func(context.Context) error { return authority.ErrDenied })
	for _, id := range []string{g.ID.String(), "0123456789abcdef", "nonsense"} {
		_, err := f.ExplainGrant(t.Context(), plain(bob), id)
		named(t, err, "NoSuchGrant")
	}
}

func TestLearnGrant(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	p, c, g := f.mounted("held")
	learn := func(ctx context.Context) (<-chan string, <-chan error) {
		ready, texts, errs := make(chan struct{}), make(chan string, 1), make(chan error, 1)
		go func() {
			text, err := f.LearnGrant(ctx, c, g.ID.String(), func() error { close(ready); return nil })
			texts <- text
			errs <- err
		}()
		<-ready
		return texts, errs
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, errs := learn(ctx)
	_, err := f.LearnGrant(t.Context(), c, g.ID.String(), func() error { return nil })
	named(t, err, "Busy")
	cancel()
	named(t, <-errs, "Canceled")
	f.answers(func(context.Context) error { return authority.ErrDenied })
	_, err = f.LearnGrant(t.Context(), plain(bob), g.ID.String(), nil)
	named(t, err, "NoSuchGrant")

	texts, errs := learn(t.Context())
	p.Kill()
	text, err := <-texts, <-errs
	if err != nil || !strings.Contains(text, "# What grant "+g.ID.String()+" of the profile held was used for.\n") || !strings.Contains(text, "[Delegate]") {
		t.Errorf("got %q, %v", text, err)
	}
	_, err = f.LearnGrant(t.Context(), c, g.ID.String(), nil)
	named(t, err, "NoSuchGrant")
	testtarget.Eventually(t, "the guard forgets it", f.forgotten)
}
