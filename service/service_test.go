// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// busyUntil is a front that works until then.
type busyUntil struct{ end time.Time }

func (b busyUntil) IdleSince() (time.Time, bool) { return b.end, !time.Now().Before(b.end) }

func TestWaitIdle(t *testing.T) {
	const s = time.Second
	for name, test := range map[string]struct {
		// When the fronts' last requests end, when the last grant does, and when the
		// context does, if it does.
		socket, bus, grants, stop time.Duration
		// The daemon exits between these times.
		from, to time.Duration
	}{
		"never used":           {0, 0, 0, 0, idleTime, idleTime},
		"used for a second":    {s, 0, 0, 0, s + idleTime, s + idleTime},
		"used over the bus":    {0, 29 * s, 0, 0, 29*s + idleTime, 29*s + idleTime},
		"used over both":       {70 * s, 100 * s, 0, 0, 100*s + idleTime, 100*s + idleTime},
		"a grant":              {s, 0, time.Hour, 0, time.Hour, time.Hour + idleTime},
		"a grant of a second":  {s, 0, 2 * s, 0, s + idleTime, 2*s + idleTime},
		"stopped":              {0, 0, 0, s, s, s},
		"stopped at a request": {time.Hour, 0, 0, s, s, s},
		"stopped with a grant": {0, 0, time.Hour, 50 * s, 50 * s, 50 * s},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.stop > 0 {
					time.AfterFunc(test.stop, cancel)
				}
				begun := time.Now()
				busy := func() bool { return time.Since(begun) < test.grants }
				waitIdle(ctx, busy, busyUntil{begun.Add(test.socket)}, busyUntil{begun.Add(test.bus)})
				if took := time.Since(begun); took < test.from || took > test.to {
					t.Errorf("it exits after %v, not between %v and %v", took, test.from, test.to)
				}
			})
		})
	}
}
