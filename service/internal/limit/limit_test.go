// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestRequestsAtATime(t *testing.T) {
	t.Parallel()
	users := NewUsers(2, 1, 1)
	for i, want := range []bool{true, true, false} {
		if users.Begin(1) != want {
			t.Errorf("request %d isn't %t", i, want)
		}
	}
	if !users.Begin(2) {
		t.Error("another user has no requests")
	}
	users.End(1)
	if !users.Begin(1) {
		t.Error("an ended request counts")
	}
}

func TestRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		users := NewUsers(1, 10, 20)
		if !users.Spend(1, 20) || users.Spend(1, 1) {
			t.Error("not twenty requests at once")
		}
		if !users.Spend(2, 20) {
			t.Error("another user has no requests")
		}
		time.Sleep(time.Second)
		if users.Spend(1, 11) || !users.Spend(1, 10) {
			t.Error("not ten requests after a second")
		}
	})
}

func TestUsersAreForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		users := NewUsers(1, 10, 20)
		users.Begin(0)
		for uid := range uint32(10_000) {
			users.Spend(uid, 1)
			time.Sleep(time.Second)
		}
		if n := len(users.byUID); n > 200 {
			t.Errorf("%d users remembered", n)
		}
		if users.Begin(0) {
			t.Error("a user with a request was forgotten")
		}
	})
}
