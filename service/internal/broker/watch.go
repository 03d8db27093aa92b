// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"sync"

	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
)

// Watcher hears of grants and objects. Its functions are called one at a time and in the
// order of what happened, and nobody waits for them.
type Watcher struct {
	// Leased gets a grant whose lease is another one than before.
	Made, Leased func(grant.Grant)
	Ended        func(grant.Grant, grant.Reason)
	// Object gets what a list shows of an object; of one that has gone, what it
	// showed.
	Object func(Object, catalog.News)
}

// Watch has w hear of every grant and object from now on.
func (b *Broker) Watch(w Watcher) {
	b.watchers.mu.Lock()
	defer b.watchers.mu.Unlock()
	b.watchers.all = append(b.watchers.all, w)
}

// leased tells of a grant that has another lease.
func (b *Broker) leased(g grant.Grant) {
	b.watchers.tell(func(w Watcher) { w.Leased(g) })
	b.monitors.tell(grantEvent(KindLeased, g))
}

// watchers passes on what happens. Its zero value is ready.
type watchers struct {
	mu      sync.Mutex
	all     []Watcher
	news    []func(Watcher)
	telling bool
	told    sync.WaitGroup
}

func (w *watchers) tell(news func(Watcher)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.all) == 0 {
		return
	}
	w.news = append(w.news, news)
	if !w.telling {
		w.telling = true
		w.told.Go(w.tellAll)
	}
}

func (w *watchers) tellAll() {
	for {
		w.mu.Lock()
		news, all := w.news, w.all
		w.news = nil
		w.telling = len(news) > 0
		w.mu.Unlock()
		if len(news) == 0 {
			return
		}
		for _, one := range news {
			for _, watcher := range all {
				one(watcher)
			}
		}
	}
}

func (w *watchers) close() { w.told.Wait() }
