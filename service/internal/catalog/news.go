// SPDX-License-Identifier: Apache-2.0

package catalog

import "reflect"

// News is what has happened to an object.
type News int

// The kinds of news.
const (
	// Appeared: there was none of that name before.
	Appeared News = iota
	// Changed: its state is another one, or its files say something else, or it was
	// loaded anew.
	Changed
	// Gone: there is none of that name any more.
	Gone
)

// Watch has tell hear of the objects, of each in the order of what happens to it,
// before there are any. Objects are locked meanwhile: it must not wait.
func (c *Catalog) Watch(tell func(Status, News)) { c.tellNews = tell }

// tell tells of an object that isn't as it was when it was last told of. The
// caller has the entry's lock.
func (c *Catalog) tell(e *entry) {
	now, news := e.status(), Appeared
	if e.told != nil {
		news = Changed
	}
	if e.gone || e.told != nil && reflect.DeepEqual(*e.told, now) {
		return
	}
	e.told = &now
	c.tellNews(now, news)
}
