// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// maxMonitors and maxMonitorsPerUser are how many callers hear of events.
	maxMonitors        = 128
	maxMonitorsPerUser = 8
	// maxQueue is how many events wait for a caller that is slow to take them.
	maxQueue = 256
)

// Monitor calls tell for each event of the caller's own grants from now on, or of
// all users', until the context ends or tell fails. ready is called before the
// first one, when nothing is missed any more. What happens while tell takes too
// long is counted, and told as an event of KindLost.
func (b *Broker) Monitor(ctx context.Context, c Caller, all bool, ready func() error, tell func(Event) error) error {
	if all {
		if err := b.authorizeManaging(ctx, c); err != nil {
			return Refuse(fmt.Errorf("cannot monitor the grants of all users: %w", err))
		}
	}
	m, err := b.monitors.add(c.Key(), func(e Event) bool { return all || e.Owner == c.UID })
	if err != nil {
		return err
	}
	defer b.monitors.remove(m)
	if ready() != nil {
		return nil // the caller has left
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.news:
		}
		for _, e := range m.take() {
			if tell(e) != nil {
				return nil
			}
		}
	}
}

// monitors passes events on. Its zero value is ready.
type monitors struct {
	mu     sync.Mutex
	all    map[*monitor]bool
	byUser map[uint32]int
}

type monitor struct {
	user   uint32
	wants  func(Event) bool
	news   chan struct{}
	mu     sync.Mutex
	queue  []Event
	missed int
}

func (s *monitors) add(user uint32, wants func(Event) bool) (*monitor, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) >= maxMonitors || s.byUser[user] >= maxMonitorsPerUser {
		return nil, &Error{Name: "QuotaExceeded", Reason: "cannot monitor: too many do so already", Layer: "limit", Remedy: "end monitors that are no longer needed"}
	}
	if s.all == nil {
		s.all, s.byUser = map[*monitor]bool{}, map[uint32]int{}
	}
	m := &monitor{user: user, wants: wants, news: make(chan struct{}, 1)}
	s.all[m] = true
	s.byUser[user]++
	return m, nil
}

func (s *monitors) remove(m *monitor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, m)
	if s.byUser[m.user]--; s.byUser[m.user] == 0 {
		delete(s.byUser, m.user)
	}
}

// tell hands an event to everybody who wants it. It waits for nobody.
func (s *monitors) tell(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for m := range s.all {
		if m.wants(e) {
			m.put(e)
		}
	}
}

func (m *monitor) put(e Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.queue) < maxQueue {
		m.queue = append(m.queue, e)
	} else {
		m.missed++
	}
	select {
	case m.news <- struct{}{}:
	default:
	}
}

// take empties the queue. What was missed came after what is in it.
func (m *monitor) take() []Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	events := m.queue
	if m.missed > 0 {
		events = append(events, Event{Time: time.Now(), Kind: KindLost, Owner: m.user, Lost: m.missed, Reason: "they came faster than they were read"})
	}
	m.queue, m.missed = nil, 0
	return events
}
