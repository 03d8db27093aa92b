// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/journal"
)

// The journal takes so many refusals of a user's in so much time. journald's
// own limit is the whole service's, and would let one user's refusals keep the
// others' grants out of the journal.
const (
	refusalsLogged = 60
	refusalsPeriod = time.Minute
)

// refusalLog writes refusals into the journal. Its zero value is ready.
type refusalLog struct {
	mu    sync.Mutex
	since time.Time
	count map[uint32]int
}

func (l *refusalLog) log(ctx context.Context, c Caller, refused journal.Event, e *Error, what slog.Attr) {
	owner := slog.Uint64(journal.KeyOwner, uint64(c.UID))
	switch n := l.next(c.Key()); {
	case n > refusalsLogged:
		return
	case n == refusalsLogged:
		journal.LimitExceeded.Log(ctx, owner, slog.String(journal.KeyLimit, "refusals in the journal"))
		return
	}
	if e.Layer == "limit" {
		journal.LimitExceeded.Log(ctx, owner, slog.String(journal.KeyLimit, e.Reason))
		return
	}
	refused.Log(ctx,
		what,
		owner,
		slog.Int(journal.KeyProcess, c.Process.PID),
		slog.String(journal.KeyUnit, c.unitName()),
		slog.String("error", e.Name),
		slog.String(journal.KeyLayer, e.Layer),
		slog.String(journal.KeyReason, e.Reason),
	)
}

// next counts a refusal of a user's.
func (l *refusalLog) next(key uint32) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.since) > refusalsPeriod {
		l.since, l.count = time.Now(), map[uint32]int{}
	}
	l.count[key]++
	return l.count[key]
}
