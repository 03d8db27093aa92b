// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"slices"
	"sync"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

const (
	// maxPast is how many grants that have ended are remembered.
	maxPast = 1024
	// maxDenials is how many denials of a user's are remembered, and
	// maxDenied of how many users.
	maxDenials = 64
	maxDenied  = 1024
)

// Denial is something that was refused.
type Denial struct {
	Event // the last time
	// Allow is the line of the profile that would allow it, or what else would;
	// "" if nothing would.
	Allow string
	// Count is how often that happened.
	Count int

	kfunc uint32 // its BTF id, whose name hasn't been looked up
}

// history remembers what was refused, for those who ask why. It is gone when the
// daemon exits; the journal has more. Its zero value is ready.
type history struct {
	mu     sync.Mutex
	grants map[grant.ID]*past
	ended  []grant.ID          // the oldest first
	denied map[uint32][]Denial // by owner; the last one last
	users  []uint32            // of denied, the newest last
}

// past is what is remembered of a grant.
type past struct {
	owner   uint32
	profile string
	rights  *profile.Rights
	// capabilities are those that its processes need.
	capabilities []string
	ended        bool
}

func (h *history) made(g grant.Grant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.grants == nil {
		h.grants = map[grant.ID]*past{}
	}
	h.grants[g.ID] = &past{owner: g.Owner, profile: g.Profile, rights: g.Rights, capabilities: g.Capabilities}
}

func (h *history) end(id grant.ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.grants[id]
	if p == nil || p.ended {
		return
	}
	p.ended = true
	if h.ended = append(h.ended, id); len(h.ended) > maxPast {
		delete(h.grants, h.ended[0])
		h.ended = slices.Delete(h.ended, 0, 1)
	}
}

// grant returns what is known of a grant.
func (h *history) grant(id grant.ID) (past, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.grants[id]; p != nil {
		return *p, true
	}
	return past{}, false
}

// deny remembers a denial: of those that are the same the last, of others those
// that came last.
func (h *history) deny(d Denial) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list, known := h.denied[d.Owner]
	if !known {
		if h.denied == nil {
			h.denied = map[uint32][]Denial{}
		}
		if h.users = append(h.users, d.Owner); len(h.users) > maxDenied {
			delete(h.denied, h.users[0])
			h.users = slices.Delete(h.users, 0, 1)
		}
	}
	d.Count = 1
	same := func(o Denial) bool {
		return o.Grant == d.Grant && o.Layer == d.Layer && o.Reason == d.Reason && o.Program == d.Program
	}
	if i := slices.IndexFunc(list, same); i >= 0 {
		d.Count += list[i].Count
		list = slices.Delete(list, i, i+1)
	} else if len(list) == maxDenials {
		list = slices.Delete(list, 0, 1)
	}
	h.denied[d.Owner] = append(list, d)
}

// denials returns those of a user's: of one grant, and of what may be its; or, if
// id is 0, of all and of what was no grant's.
func (h *history) denials(owner uint32, id grant.ID) []Denial {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := slices.Clone(h.denied[owner])
	return slices.DeleteFunc(list, func(d Denial) bool {
		return id != 0 && d.Grant != id && (d.Grant != 0 || d.Kind != KindDenied)
	})
}
