// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package broker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// attachedLinks returns the kinds of links that are attached to something, but the
// guard's own.
func attachedLinks(t *testing.T) map[link.Type]int {
	t.Helper()
	kinds := map[link.Type]int{}
	var links link.Iterator
	defer links.Close()
	for links.Next() {
		info, err := links.Link.Info()
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case info.Type == link.TracingType || info.Type == link.IterType:
			continue
		case info.Type == link.XDPType && info.XDP().Ifindex == 0:
			continue
		case info.Type == link.CgroupType && info.Cgroup().CgroupId == 0:
			continue
		}
		kinds[info.Type]++
	}
	if err := links.Err(); err != nil {
		t.Fatal(err)
	}
	return kinds
}

// attachedTo returns how many programs a control group has.
func attachedTo(t *testing.T, path string) int {
	t.Helper()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInetEgress})
	if err != nil {
		t.Fatal(err)
	}
	return len(result.Programs)
}

// reaching makes a grant that may attach nearly everything, for a process in a
// network namespace of its own, and a control group.
func (f *fake) reaching(t *testing.T) (*testtarget.Process, Caller, grant.Grant, string) {
	t.Helper()
	cgroup := filepath.Join("/sys/fs/cgroup", "granted", "below")
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		testtarget.Eventually(t, "the control group goes", func() bool {
			return os.Remove(cgroup) == nil && os.Remove(filepath.Dir(cgroup)) == nil
		})
	})
	p := testtarget.NewWith(t, alice, both|unix.CLONE_NEWNET, testtarget.Root)
	c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
	return p, c, f.mountedFor(c, p, "reaching"), cgroup
}

func attachEverything(p *testtarget.Process, cgroup string) {
	p.Must("map")
	p.Must("xdp", "1")
	p.Must("cgroup", cgroup)
	p.Must("without", cgroup)
	p.Must("raw", "sys_enter")
}

func forgottenSoon(t *testing.T, f *fake) {
	t.Helper()
	for range 4 { // the sweep takes its time
		for range 1000 {
			if f.forgotten() {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	known, err := f.guard.Grants()
	t.Errorf("the guard has %+v, %v", known, err)
}

// All are one test, because it takes its time to load the guard.
func TestGuardedRevocation(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	for name, test := range map[string]func(*testing.T, *fake){
		"detaches": revokeDetaches, "pinned": revokePinned, "kills": revokeKills,
		"other ends": endsDetach, "held outside": revokeHeldOutside, "many": manyGuarded, "slips": undoesSlips,
	} {
		t.Run(name, func(t *testing.T) {
			f.t = t
			test(t, f)
			forgottenSoon(t, f)
		})
	}
	f.t = t
}

func revokeDetaches(t *testing.T, f *fake) {
	p, c, g, cgroup := f.reaching(t)
	attachEverything(p, cgroup)
	want := map[link.Type]int{link.XDPType: 1, link.CgroupType: 1, link.RawTracepointType: 1}
	if got := attachedLinks(t); !equal(got, want) || attachedTo(t, cgroup) != 2 {
		t.Fatalf("attached are %v, and %d programs", got, attachedTo(t, cgroup))
	}
	notReached, err := f.revoke(c, g.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(notReached, "\n")
	if len(notReached) != 3 || !strings.Contains(text, "an attachment (raw tracepoint) of program ") ||
		!strings.Contains(text, "4 programs and 1 map, until the last process and pin that hold them end") ||
		!strings.Contains(text, fmt.Sprintf("process %d, which has 4 programs", p.PID)) {
		t.Errorf("not reached:\n%s", text)
	}
	if got := attachedLinks(t); !equal(got, map[link.Type]int{link.RawTracepointType: 1}) || attachedTo(t, cgroup) != 0 {
		t.Errorf("attached are %v, and %d programs", got, attachedTo(t, cgroup))
	}
	if !alive(p) {
		t.Error("the process is dead")
	}
	p.Kill()
}

func equal(a, b map[link.Type]int) bool {
	for kind := range a {
		if a[kind] != b[kind] {
			return false
		}
	}
	return len(a) == len(b)
}

// What is pinned is removed, and goes if nothing else holds it. Nobody can pin
// anything again.
func revokePinned(t *testing.T, f *fake) {
	p, c, g, _ := f.reaching(t)
	p.Must("mkdir", "/mnt/sub")
	for _, path := range []string{"/mnt/raw", "/mnt/sub/raw"} {
		p.Must("raw", "sys_enter")
		p.Must("pin", path)
	}
	p.Must("drop")
	if got := attachedLinks(t); !equal(got, map[link.Type]int{link.RawTracepointType: 2}) {
		t.Fatalf("attached are %v", got)
	}
	root := p.Must("keep", "/mnt")
	p.Must("raw", "sys_exit")
	notReached, err := f.revoke(c, g.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(notReached, "\n")
	if len(notReached) != 3 || !strings.Contains(text, "raw tracepoint") || !strings.Contains(text, "1 program and 0 maps") ||
		!strings.Contains(text, fmt.Sprintf("process %d, which has 1 program", p.PID)) {
		t.Errorf("not reached:\n%s", text)
	}
	testtarget.Eventually(t, "the pins go", func() bool {
		return equal(attachedLinks(t), map[link.Type]int{link.RawTracepointType: 1})
	})
	for op, path := range map[string]string{"pin": root + "/again", "entries": root} {
		out, _, err := p.Do(op, []string{path})
		if op == "pin" && !errors.Is(err, unix.EPERM) || op == "entries" && (err != nil || out != "") {
			t.Errorf("%s: got %q, %v", op, out, err)
		}
	}
	p.Kill()
}

func revokeKills(t *testing.T, f *fake) {
	p, c, g, cgroup := f.reaching(t)
	attachEverything(p, cgroup)
	child := p.Start(testtarget.Attr{})
	child.Must("raw", "sys_exit")
	notReached, err := f.RevokeGrant(t.Context(), c, g.ID.String(), true)
	if err != nil || len(notReached) != 0 {
		t.Errorf("not reached: %q, %v", notReached, err)
	}
	if got := attachedLinks(t); len(got) != 0 || attachedTo(t, cgroup) != 0 {
		t.Errorf("attached are %v, and %d programs", got, attachedTo(t, cgroup))
	}
	if alive(p) || alive(child) {
		t.Error("the holders live")
	}
}

// Any end detaches, that of the grant's process, too: others may hold its links.
func endsDetach(t *testing.T, f *fake) {
	f.change("reaching", strings.Replace(files["reaching"], "1h", "2s", 1))
	p, _, _, cgroup := f.reaching(t)
	p.Must("cgroup", cgroup)
	testtarget.Eventually(t, "its lease ends", func() bool { return f.Grants() == 0 })
	testtarget.Eventually(t, "it is detached", func() bool { return attachedTo(t, cgroup) == 0 })
	p.Kill()
	f.change("reaching", files["reaching"])

	outside := testtarget.Start(t, testtarget.Attr{UID: alice})
	p = outside.Start(testtarget.Attr{Namespaces: both | unix.CLONE_NEWNET})
	p.Must("tmpfs", "/mnt")
	child := p.Start(testtarget.Attr{})
	c := caller(t, alice, outside)
	if _, err := f.MountToken(t.Context(), c, "reaching", processOf(t, child), "/", "/mnt"); err != nil {
		t.Fatal(err)
	}
	p.Must("cgroup", cgroup)
	child.Kill()
	testtarget.Eventually(t, "its process ends", func() bool { return f.Grants() == 0 })
	testtarget.Eventually(t, "it is detached", func() bool { return attachedTo(t, cgroup) == 0 })
	if !alive(p) {
		t.Error("the other process is dead")
	}
	p.Kill()
}

// Whoever holds what an ended grant had is told of, where that isn't a process of
// the namespace.
func revokeHeldOutside(t *testing.T, f *fake) {
	p, c, g, _ := f.reaching(t)
	_, got, err := p.Do("give", nil)
	if err != nil || len(got) != 1 {
		t.Fatal(err)
	}
	notReached, err := f.RevokeGrant(t.Context(), c, g.ID.String(), true)
	if err != nil || len(notReached) != 1 || !strings.Contains(notReached[0], "0 programs and 1 map") {
		t.Errorf("not reached: %q, %v", notReached, err)
	}
	_ = got[0].Close()
}

// Many grants, ended in all ways, leave nothing; nor is there a bound that the
// ended ones fill up.
func manyGuarded(t *testing.T, f *fake) {
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	start := time.Now()
	made := 0
	for time.Since(start) < 5*time.Second {
		g, mount, err := f.AcquireToken(t.Context(), c, "guarded")
		if err != nil {
			t.Fatal(err)
		}
		_ = mount.Close()
		made++
		if made%50 == 0 {
			continue // ends with its process
		}
		if notReached, err := f.revoke(c, g.ID.String()); err != nil || len(notReached) != 0 {
			t.Fatalf("not reached: %q, %v", notReached, err)
		}
	}
	t.Logf("%d grants", made)
	p.Kill()
	forgottenSoon(t, f)
	usage, err := f.guard.UserUsage(alice)
	if err == nil {
		t.Errorf("the guard knows alice: %+v", usage)
	}
	var left []string
	for _, name := range []string{"grants", "usages", "users", "tokens", "objects"} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(guardDir, "maps", name), nil)
		if err != nil {
			t.Fatal(err)
		}
		if key, err := m.NextKeyBytes(nil); err != nil || key != nil {
			left = append(left, fmt.Sprintf("%s %x", name, key))
		}
		_ = m.Close()
	}
	if left != nil {
		t.Errorf("left are %q", left)
	}
}

// What slips past the guard is detached and told of, whether its process was
// killed or not.
func undoesSlips(t *testing.T, f *fake) {
	f.change("reaching", strings.Replace(files["reaching"], "Cgroups=any", "Cgroups=own", 1))
	p, c, g, cgroup := f.reaching(t)
	slip := func() (lives bool, err error) {
		child := p.Start(testtarget.Attr{})
		_, _, err = child.Do("cgroup", []string{cgroup})
		return alive(child), err
	}
	if lives, err := slip(); !lives || !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v, alive %t", err, lives)
	}
	told := func(reason string) int {
		x, err := f.ExplainGrant(t.Context(), c, g.ID.String())
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, d := range x.Denials {
			if strings.Contains(d.Reason, reason) {
				n += d.Count
			}
		}
		return n
	}
	// The guard's descriptors go with the daemon, and these programs with their pins.
	f.Close()
	f.reopen()
	take := func(names ...string) {
		t.Helper()
		for _, name := range names {
			pins, err := filepath.Glob(filepath.Join(guardDir, "links-*", name))
			if err != nil || len(pins) != 1 {
				t.Fatalf("got %q, %v", pins, err)
			}
			if err := os.Remove(pins[0]); err != nil {
				t.Fatal(err)
			}
		}
	}
	take("link_prime", "file_alloc")
	testtarget.Eventually(t, "the process is killed", func() bool { lives, _ := slip(); return !lives })
	testtarget.Eventually(t, "it is told of", func() bool { return told("it is detached") > 0 })
	take("link_settle")
	testtarget.Eventually(t, "nothing stops it", func() bool { lives, err := slip(); return lives && err == nil })
	before := told("it is detached")
	testtarget.Eventually(t, "it is detached", func() bool { return attachedTo(t, cgroup) == 0 })
	if told("it is detached") == before {
		t.Error("nothing is told of it")
	}
	p.Kill()
	f.Close()
	f.reopen()
	f.change("reaching", files["reaching"])
}
