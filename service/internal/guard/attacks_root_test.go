// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"errors"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

const (
	mapDevmap     = 14
	mapCPUMap     = 16
	mapDevmapHash = 25
)

func init() {
	// tokens N MOUNT: takes tokens until that fails or there are N, answers
	// how many, and closes them.
	ops["tokens"] = func(args []string, files []*os.File) (string, []*os.File, error) {
		var tokens []*os.File
		defer func() {
			for _, f := range tokens {
				_ = f.Close()
			}
		}()
		var err error
		for len(tokens) < int(number(args[0])) {
			var f *os.File
			if f, err = kernel.CreateToken(files[0]); err != nil {
				break
			}
			tokens = append(tokens, f)
		}
		if err != nil && !errors.Is(err, unix.EPERM) {
			return "", nil, err
		}
		return strconv.Itoa(len(tokens)), nil, nil
	}
}

// TestNested has a namespace below the grant's attach the grant's programs: it
// reaches what the grant does, and no more.
func TestNested(t *testing.T) {
	g := open(t)
	own, _ := cgroup(t, "nested", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	target := testtarget.New(t, testtarget.Alice)
	grant(t, g, target, confinedTo(profile.ReachOwn))
	nested := target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET})
	hand := func(p program) {
		t.Helper()
		expect(t, target, 0, "load", loading(p))
		_, files, err := target.Do("give", nil)
		if err != nil || len(files) != 1 {
			t.Fatalf("got %d files, %v", len(files), err)
		}
		expect(t, nested, 0, "hold", nil, files[0])
		_ = files[0].Close()
	}
	hand(simple[typeCgroupSKB])
	// The kernel itself asks for CAP_NET_ADMIN in the token's namespace
	// (bpf_prog_attach_check_attach_type).
	expect(t, nested, unix.EPERM, "link", []string{"", strconv.Itoa(attachEgress)}, own)
	expect(t, nested, unix.EPERM, "link", []string{"", strconv.Itoa(attachEgress)}, root)
	expect(t, nested, unix.EPERM, "attach", []string{"", strconv.Itoa(attachEgress)}, root)
	hand(simple[typeRawTP])
	expect(t, nested, unix.EPERM, "raw", []string{"sys_enter"})
	// The devices of its own network namespace are its own, not those of the host.
	host := target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER | unix.CLONE_NEWNS})
	for _, p := range []uint32{typeXDP, typeSchedCLS} {
		hand(simple[p])
		expect(t, nested, 0, "link", []string{"1", strconv.Itoa(int(simple[p].Attach))})
		_, files, err := target.Do("give", nil)
		if err != nil || len(files) != 1 {
			t.Fatalf("got %d files, %v", len(files), err)
		}
		expect(t, host, 0, "hold", nil, files[0])
		_ = files[0].Close()
		expect(t, host, unix.EPERM, "link", []string{"1", strconv.Itoa(int(simple[p].Attach))})
	}
	host.Kill()
	nested.Kill()
	expect(t, target, 0, "dropall", nil)
}

// TestDevmap: a program in an own network namespace would send packets to the
// host's devices by such a map.
func TestDevmap(t *testing.T) {
	g := open(t)
	for reach, want := range map[profile.Reach]error{profile.ReachNone: unix.EPERM, profile.ReachOwn: unix.EPERM, profile.ReachAny: nil} {
		target := testtarget.New(t, testtarget.Alice)
		grant(t, g, target, confinedTo(reach))
		for _, kind := range []int{mapDevmap, mapDevmapHash} {
			if _, _, err := target.Do("map", mapping(kind, 1)); !errors.Is(err, want) {
				t.Errorf("map type %d, reach %v: got %v, want %v", kind, reach, err, want)
			}
		}
		expect(t, target, 0, "dropall", nil)
	}
}

// TestTokensExhausted has a grant take more tokens than one may.
func TestTokensExhausted(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	limit := unix.Rlimit{Cur: 8192, Max: 8192}
	if err := unix.Prlimit(target.PID, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	id, mount := bindTo(t, g, target, everything())
	for range 2 {
		out, _, err := target.Do("tokens", []string{"5000"}, mount)
		if err != nil || out != "4096" {
			t.Errorf("got %s tokens, %v", out, err)
		}
		testtarget.Eventually(t, "the tokens are given back", func() bool {
			usage, err := g.Usage(id)
			return err == nil && usage.Tokens == 0
		})
	}
	release(t, id)
}

// TestFull has no room in the guard's map of objects: nothing is created that
// isn't counted.
func TestFull(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, everything())
	const batch = 1 << 14
	keys, values := make([]uint64, batch), make([]bpf.GuardObject, batch)
	all := g.maps.Objects.MaxEntries()
	each := func(do func() (int, error)) {
		t.Helper()
		for key := uint32(0); key < all; {
			for i := range keys {
				keys[i] = uint64(key) + 1
				key++
			}
			if n, err := do(); err != nil || n != batch {
				t.Fatalf("%d: got %d, %v", key, n, err)
			}
		}
	}
	each(func() (int, error) { return g.maps.Objects.BatchUpdate(keys, values, nil) })
	expect(t, target, unix.EPERM, "map", mapping(mapArray, 1))
	expect(t, target, unix.ENOMEM, "load", loading(simple[typeSocketFilter]))
	each(func() (int, error) { return g.maps.Objects.BatchDelete(keys, nil) })
	expect(t, target, 0, "map", mapping(mapArray, 1))
	expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
	if usage, err := g.Usage(id); err != nil || usage.Maps != 1 || usage.Programs != 1 {
		t.Errorf("got %+v, %v", usage, err)
	}
	expect(t, target, 0, "dropall", nil)
}

// TestKilledDaemon leaves what a daemon leaves that is killed within Bind and
// Release, between any two of the maps that these change.
func TestKilledDaemon(t *testing.T) {
	target := testtarget.New(t, testtarget.Alice)
	for _, step := range []struct {
		name                    string
		usage, user, limits, fs bool
		known                   bool
	}{
		{name: "before anything", fs: true},
		{name: "usage", usage: true, fs: true},
		{name: "usage and user", usage: true, user: true, fs: true},
		{name: "all but the file system", usage: true, user: true, limits: true, known: true},
		{name: "released but for the usage", usage: true, user: true},
		{name: "released but for the user", user: true},
	} {
		g := open(t)
		lastID++
		id := lastID
		if step.usage {
			if err := g.maps.Usages.Put(id, bpf.GuardUsage{}); err != nil {
				t.Fatal(err)
			}
		}
		if step.user {
			if err := g.maps.Users.Put(uint32(testtarget.Alice), bpf.GuardUsage{}); err != nil {
				t.Fatal(err)
			}
		}
		if step.limits {
			limits, err := g.limits(Limits{Profile: everything(), Owner: testtarget.Alice})
			if err != nil {
				t.Fatal(err)
			}
			if err := g.maps.Grants.Put(id, limits); err != nil {
				t.Fatal(err)
			}
		}
		if step.fs { // which nobody gets, and which goes with the daemon
			_ = filesystem(t, target, testtarget.Alice).Close()
		}
		g = open(t)
		grants, err := g.Grants()
		if err != nil || (len(grants) == 1) != step.known {
			t.Errorf("%s: got %+v, %v", step.name, grants, err)
		}
		release(t, id)
		for name, m := range map[string]*ebpf.Map{"grants": g.maps.Grants, "usages": g.maps.Usages, "users": g.maps.Users} {
			if key, err := m.NextKeyBytes(nil); err != nil || key != nil {
				t.Errorf("%s: %s has %x, %v", step.name, name, key, err)
			}
		}
	}
}

// TestComeAndGo has grants come and go; their inodes' numbers come round. A
// file system after them is nobody's. TestNothingLeft sees what they left.
func TestComeAndGo(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	numbers := map[uint64]int{}
	total := 0
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		var ids []uint64
		for range 100 {
			id, mount := bindTo(t, g, target, denying())
			ids = append(ids, id)
			var stat unix.Stat_t
			if err := unix.Fstat(int(mount.Fd()), &stat); err != nil {
				t.Fatal(err)
			}
			numbers[stat.Ino]++
			if out, _, err := target.Do("tokens", []string{"1"}, mount); err != nil || out != "1" {
				t.Fatalf("got %s tokens, %v", out, err)
			}
			_ = mount.Close()
		}
		total += len(ids)
		testtarget.Eventually(t, "the grants are released", func() bool {
			var err error
			if ids, err = g.Release(ids...); err != nil {
				t.Fatal(err)
			}
			return len(ids) == 0
		})
		stranger := filesystem(t, target, testtarget.Alice)
		if _, _, err := target.Do("token", nil, stranger); err != nil {
			t.Fatal(err)
		}
		_ = stranger.Close()
		expect(t, target, 0, "load", loading(forbidden))
		expect(t, target, 0, "dropall", nil)
	}
	t.Logf("%d grants with %d inode numbers", total, len(numbers))
}

// TestUpdate puts programs in the place of links' programs: of links that root has
// made and handed out, and by another grant that reaches less.
func TestUpdate(t *testing.T) {
	g := open(t)
	own, _ := cgroup(t, "update", testtarget.Alice)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	linkTo := func(cgroup *os.File) *os.File {
		t.Helper()
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: p, Attach: ebpf.AttachCGroupInetEgress})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f := testtarget.Dup(t, l.FD())
		t.Cleanup(func() { f.Close() })
		return f
	}
	toOwn, toRoot := linkTo(own), linkTo(openFile(t, "/sys/fs/cgroup"))
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, confinedTo(profile.ReachOwn))
	less := target.Start(testtarget.Attr{})
	grant(t, g, less, confinedTo(profile.ReachNone))
	for _, p := range []*testtarget.Process{target, less} {
		expect(t, p, 0, "load", loading(simple[typeCgroupSKB]))
	}
	expect(t, target, unix.EPERM, "updatealone", nil, toRoot)
	expect(t, less, unix.EPERM, "updatealone", nil, toRoot)
	expect(t, less, unix.EPERM, "updatealone", nil, toOwn)
	expect(t, target, 0, "updatealone", nil, toOwn)
	// What is no link looks like one to the guard, if like anything.
	program := testtarget.Dup(t, p.FD())
	defer program.Close()
	for _, f := range []*os.File{own, program, openFile(t, "/dev/null")} {
		if _, _, err := target.Do("updatealone", nil, f); err == nil {
			t.Errorf("%s was updated", f.Name())
		}
	}
	// Neither is what is no program, or none of a grant's.
	for _, f := range []*os.File{own, program} {
		expect(t, target, 0, "hold", nil, f)
		expect(t, target, unix.EPERM, "updatealone", nil, toOwn)
	}

	// Other threads could put another link in its place.
	expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
	expect(t, target, 0, "link", []string{"", strconv.Itoa(attachEgress)}, own)
	expect(t, target, unix.EPERM, "update", nil)
	expect(t, target, 0, "updatealone", nil)
	if err := g.Revoke(id); err != nil {
		t.Fatal(err)
	}
	expect(t, target, unix.EPERM, "updatealone", nil)
	_ = toOwn.Close() // which has the grant's program
	expect(t, less, 0, "dropall", nil)
	expect(t, target, 0, "dropall", nil)
}
