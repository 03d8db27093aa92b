// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

package broker

import (
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// A path leads into a file system that never answers. Who asked hears of it, and
// nothing is left behind but the helper, which the file system holds.
func TestTargetHangs(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	// FUSE asks nothing for the helper's gid if that isn't mapped.
	p := testtarget.NewWith(t, alice, both, testtarget.None)
	p.Map("0 1000 1", "0 1000 1\n65534 65534 1")
	p = p.Start(testtarget.Attr{})
	p.Must("tmpfs", "/mnt")
	server := p.Start(testtarget.Attr{})
	p.Must("mkdir", "/mnt/fuse")
	server.Fuse("/mnt/fuse")
	t.Cleanup(server.Kill)
	c := caller(t, alice, p)
	begun := time.Now()
	_, err := f.MountToken(t.Context(), c, "plain", c.Process, "/", "/mnt/fuse/"+testtarget.FuseHang)
	named(t, err, "TargetHangs")
	// One step to mount it, one to see that it isn't mounted.
	if took := time.Since(begun); took > 12*time.Second {
		t.Errorf("it took %v", took)
	}
	f.nothingIs(testtarget.New(t, alice))
}
