// SPDX-License-Identifier: Apache-2.0

// Package limit counts what each user asks for. The fronts share one count, so
// that nobody has more by using both.
package limit

import (
	"maps"
	"sync"
	"time"
)

// The limits of the daemon, for each user.
const (
	Requests = 32   // under way at a time
	Rate     = 500  // in a second
	Burst    = 2000 // at once, after a pause
)

// Users counts requests by uid.
type Users struct {
	requests    int
	rate, burst float64

	mu      sync.Mutex
	byUID   map[uint32]*user
	sweepAt int // users to have before the next look for forgettable ones
}

type user struct {
	requests int
	tokens   float64 // requests that may come, as of filled
	filled   time.Time
}

// NewUsers lets each user have so many requests under way at a time, so many a
// second, and so many at once after a pause.
func NewUsers(requests, rate, burst int) *Users {
	return &Users{requests: requests, rate: float64(rate), burst: float64(burst), byUID: map[uint32]*user{}}
}

// Spend counts a message against the user's rate, as so many requests. It
// returns false, and counts nothing, if that is too much.
func (t *Users) Spend(uid uint32, requests int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.user(uid)
	if t.refill(u) < float64(requests) {
		return false
	}
	u.tokens -= float64(requests)
	return true
}

// Begin counts a request under way, which End ends. It returns false, and
// counts nothing, if there are too many.
func (t *Users) Begin(uid uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.user(uid)
	if u.requests >= t.requests {
		return false
	}
	u.requests++
	return true
}

// End ends a request that Begin counted.
func (t *Users) End(uid uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.user(uid).requests--
}

func (t *Users) user(uid uint32) *user {
	u := t.byUID[uid]
	if u == nil {
		t.sweep()
		u = &user{tokens: t.burst, filled: time.Now()}
		t.byUID[uid] = u
	}
	return u
}

// sweep forgets users who are as good as new. Each time it waits until there are
// twice as many, so it costs next to nothing.
func (t *Users) sweep() {
	if len(t.byUID) < t.sweepAt {
		return
	}
	maps.DeleteFunc(t.byUID, func(_ uint32, u *user) bool {
		return u.requests == 0 && t.refill(u) == t.burst
	})
	t.sweepAt = 2*len(t.byUID) + 64
}

func (t *Users) refill(u *user) float64 {
	now := time.Now()
	u.tokens = min(t.burst, u.tokens+now.Sub(u.filled).Seconds()*t.rate)
	u.filled = now
	return u.tokens
}
