// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// saysNo is an authority that does.
type saysNo struct{}

func (saysNo) Check(context.Context, authority.Subject, authority.Action, map[string]string, bool) error {
	return authority.ErrDenied
}

func plain(uid uint32) Caller {
	return Caller{Peer: peer.New(&kernel.Credentials{UID: uid, Process: &kernel.Process{}})}
}

// monitored starts a monitor and returns what it is told, and what ends it.
func monitored(b *Broker, c Caller, tell func(Event) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = b.Monitor(ctx, c, false, func() error { return nil }, tell)
	}()
	synctest.Wait()
	return func() { cancel(); <-ended }
}

func TestMonitorOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &Broker{}
		var got []uint32
		stop := monitored(b, plain(1000), func(e Event) error { got = append(got, e.Owner); return nil })
		for _, owner := range []uint32{1000, 1001, 0, 1000} {
			b.monitors.tell(Event{Kind: KindMade, Owner: owner})
		}
		synctest.Wait()
		stop()
		if diff := cmp.Diff([]uint32{1000, 1000}, got); diff != "" {
			t.Error(diff)
		}
		b.monitors.tell(Event{Owner: 1000})
		if len(b.monitors.all) != 0 || len(b.monitors.byUser) != 0 {
			t.Error("a monitor is left")
		}
	})
}

func TestMonitorAllNeedsAuthority(t *testing.T) {
	b := &Broker{authority: saysNo{}}
	err := b.Monitor(t.Context(), plain(1000), true, func() error { t.Error("ready"); return nil }, nil)
	var e *Error
	if !errors.As(err, &e) || e.Name != "NotAuthorized" {
		t.Errorf("got %v", err)
	}
}

// Who never takes his events costs no more than a queue, and holds up nobody.
func TestMonitorSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &Broker{}
		hold := make(chan struct{})
		var got []Event
		stop := monitored(b, plain(1000), func(e Event) error {
			got = append(got, e)
			<-hold
			return nil
		})
		b.monitors.tell(Event{Kind: KindMade, Owner: 1000})
		synctest.Wait()
		for range maxQueue + 7 {
			b.monitors.tell(Event{Kind: KindLoaded, Owner: 1000})
		}
		close(hold)
		synctest.Wait()
		stop()
		if len(got) != maxQueue+2 || got[len(got)-1].Kind != KindLost || got[len(got)-1].Lost != 7 {
			t.Errorf("got %d events, the last one %+v", len(got), got[len(got)-1])
		}
	})
}

func TestMonitorLimits(t *testing.T) {
	s := &monitors{}
	var all []*monitor
	refused := 0
	for i := range 1000 {
		m, err := s.add(uint32(i/10), nil)
		if err != nil {
			refused++
			continue
		}
		all = append(all, m)
	}
	if len(all) != maxMonitors || s.byUser[0] != maxMonitorsPerUser || refused != 1000-maxMonitors {
		t.Errorf("%d monitors, %d of one user, %d refused", len(all), s.byUser[0], refused)
	}
	for _, m := range all {
		s.remove(m)
	}
	if len(s.all)+len(s.byUser) != 0 {
		t.Error("something is left")
	}
}

func TestHistory(t *testing.T) {
	h := &history{}
	rights := &profile.Rights{}
	h.made(grant.Grant{ID: 1, Owner: 1000, Profile: "p", Rights: rights})
	deny := func(owner uint32, id grant.ID, what string) {
		h.deny(Denial{Event: Event{Owner: owner, Grant: id, Reason: what}})
	}
	for range 3 {
		deny(1000, 1, "a")
	}
	deny(1000, 0, "b")
	deny(1001, 2, "c")
	deny(1000, 1, "d")
	deny(1000, 1, "a")
	var got []string
	for _, d := range h.denials(1000, 1) {
		got = append(got, fmt.Sprint(d.Reason, d.Count))
	}
	if diff := cmp.Diff([]string{"d1", "a4"}, got); diff != "" {
		t.Error(diff)
	}
	if n := len(h.denials(1000, 0)); n != 3 {
		t.Errorf("%d denials in all", n)
	}
	h.end(1)
	h.end(1)
	if p, ok := h.grant(1); !ok || !p.ended || p.profile != "p" {
		t.Errorf("got %+v, %t", p, ok)
	}

	// What users can do to its size.
	for i := range 10_000 {
		id := grant.ID(i + 10)
		h.made(grant.Grant{ID: id, Owner: 1000})
		h.end(id)
		deny(1000, id, strings.Repeat("x", i%7))
		deny(uint32(2000+i), 0, "x")
	}
	if len(h.grants) != maxPast || len(h.ended) != maxPast || len(h.denied) != maxDenied || len(h.users) != maxDenied {
		t.Errorf("%d grants, %d ended, of %d users, %d", len(h.grants), len(h.ended), len(h.denied), len(h.users))
	}
	for owner, list := range h.denied {
		if len(list) > maxDenials {
			t.Errorf("%d denials of %d", len(list), owner)
		}
	}
}
