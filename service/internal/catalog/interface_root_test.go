// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

// Debian's kernels have veth as a module, which the guests don't load.

package catalog

import (
	"fmt"
	"strings"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// programOn is the id of the XDP program on an interface, 0 for none.
func programOn(t *testing.T, name string) (id int) {
	t.Helper()
	if _, rest, ok := strings.Cut(run(t, "ip", "-o", "link", "show", name), "prog/xdp id "); ok {
		_, _ = fmt.Sscan(rest, &id)
	}
	return id
}

// An interface that isn't there is waited for, and one that has gone is attached
// to again when it is back.
func TestInterfaceReturns(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("kinds", head+"[Program on_xdp]\nAttach=bbkt1\n[Program on_tcx]\nAttach=bbkt1\n")
	f.openMap("kinds", "hits", ReadOnly).Close()
	if !f.Busy() {
		t.Error("nobody watches the interfaces")
	}
	attached := func(want bool) {
		t.Helper()
		testtarget.Eventually(t, fmt.Sprintf("attached: %v", want), func() bool {
			d, err := f.Describe("kinds")
			return err == nil && len(d.Links) == 2 && d.Links[0].Attached == want && d.Links[1].Attached == want
		})
	}
	attached(false)
	for range 2 {
		run(t, "ip", "link", "add", "bbkt0", "type", "veth", "peer", "name", "bbkt1")
		attached(true)
		if programOn(t, "bbkt1") == 0 {
			t.Error("no program on the interface")
		}
		run(t, "ip", "link", "del", "bbkt0")
		attached(false)
	}
	// A name that goes over to another interface.
	run(t, "ip", "link", "add", "bbkt0", "type", "veth", "peer", "name", "bbkt1")
	attached(true)
	run(t, "ip", "link", "set", "bbkt1", "name", "bbkt2")
	attached(false)
	if programOn(t, "bbkt2") != 0 {
		t.Error("the old interface has the program still")
	}
	run(t, "ip", "link", "set", "bbkt0", "name", "bbkt1")
	attached(true)
	run(t, "ip", "link", "del", "bbkt1")
}
