// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

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

// daemon is what a process has that does the daemon's work.
var daemon struct {
	guard      *Guard
	filesystem *kernel.Filesystem
	mount      *os.File
}

func init() {
	// daemon TARGET: opens the guard and makes a file system for a process, which
	// it answers with.
	ops["daemon"] = func(_ []string, files []*os.File) (string, []*os.File, error) {
		err := kernel.StartHelpers(func() { panic("no helpers any more") })
		if err != nil {
			return "", nil, err
		}
		if daemon.guard, err = Open(dir); err != nil {
			return "", nil, err
		}
		process, err := kernel.NewProcess(os.NewFile(uintptr(dup(int(files[0].Fd()))), "pidfd"))
		if err != nil {
			return "", nil, err
		}
		defer process.Close()
		n, err := process.Namespaces()
		if err != nil {
			return "", nil, err
		}
		defer n.Close()
		all := ^uint64(0)
		if daemon.filesystem, err = kernel.Delegate(n, kernel.Delegation{Commands: all, Maps: all, Programs: all, Attachments: all}, testtarget.Alice); err != nil {
			return "", nil, err
		}
		if daemon.mount, err = daemon.filesystem.Take(); err != nil {
			return "", nil, err
		}
		return "", []*os.File{os.NewFile(uintptr(dup(int(daemon.mount.Fd()))), "mount")}, nil
	}
	// bind ID, release ID: as a daemon.
	ops["bind"] = func(args []string, _ []*os.File) (string, []*os.File, error) {
		return "", nil, daemon.guard.Bind(uint64(number(args[0])), daemon.mount, Limits{Profile: denying(), Owner: testtarget.Alice})
	}
	ops["release"] = func(args []string, _ []*os.File) (string, []*os.File, error) {
		_, err := daemon.guard.Release(uint64(number(args[0])))
		return "", nil, err
	}
	// fsopen: answers with a file system to be made.
	ops["fsopen"] = func([]string, []*os.File) (string, []*os.File, error) {
		fd, err := unix.Fsopen("bpf", unix.FSOPEN_CLOEXEC)
		if err != nil {
			return "", nil, err
		}
		return "", []*os.File{os.NewFile(uintptr(fd), "context")}, nil
	}
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

// TestFull has no room in one of the guard's maps after the other: nothing is
// created that isn't counted, and nobody is bound by half.
func TestFull(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id, mount := bindTo(t, g, target, everything())
	t.Cleanup(func() {
		_, _, _ = target.Do("dropall", nil)
		release(t, id)
	})
	expect(t, target, 0, "token", nil, mount)
	check := func(what string, want Usage) {
		t.Helper()
		if usage, err := g.Usage(id); err != nil || usage != want {
			t.Errorf("%s: got %+v, %v", what, usage, err)
		}
		if grants, err := g.Grants(); err != nil || len(grants) != 1 {
			t.Errorf("%s: got %+v, %v", what, grants, err)
		}
	}

	empty := fill(t, g.maps.Objects)
	expect(t, target, unix.EPERM, "map", mapping(mapArray, 1))
	expect(t, target, unix.ENOMEM, "load", loading(simple[typeSocketFilter]))
	empty()
	check("objects", Usage{Tokens: 1})
	expect(t, target, 0, "map", mapping(mapArray, 1))
	expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
	check("", Usage{Tokens: 1, Maps: 1, Programs: 1, MapBytes: 8})

	if full { // which has room for a million, too
		empty = fill(t, g.maps.Tokens)
		expect(t, target, unix.ENOMEM, "addtoken", []string{"0"}, mount)
		empty()
		check("tokens", Usage{Tokens: 1, Maps: 1, Programs: 1, MapBytes: 8})
	}

	bob := testtarget.New(t, testtarget.Bob)
	for name, m := range map[string]*ebpf.Map{"grants": g.maps.Grants, "usages": g.maps.Usages, "users": g.maps.Users} {
		lastID++
		root := filesystem(t, bob, testtarget.Bob)
		limits := Limits{Profile: everything(), Owner: testtarget.Bob}
		empty := fill(t, m)
		if err := g.Bind(lastID, root, limits); !errors.Is(err, unix.E2BIG) {
			t.Errorf("%s: got %v", name, err)
		}
		empty()
		check(name, Usage{Tokens: 1, Maps: 1, Programs: 1, MapBytes: 8})
		if _, err := g.UserUsage(testtarget.Bob); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: got %v of the user", name, err)
		}
		if err := g.Bind(lastID, root, limits); err != nil {
			t.Errorf("%s: got %v when there was room again", name, err)
		}
		_ = root.Close()
		release(t, lastID)
	}

	empty = fill(t, g.maps.Protected)
	if err := g.Protect(1); !errors.Is(err, unix.E2BIG) {
		t.Errorf("got %v", err)
	}
	empty()
}

// fill makes a map full, and returns what takes that out again.
func fill(t *testing.T, m *ebpf.Map) (empty func()) {
	t.Helper()
	const batch = 1 << 14
	slice := func(size uint32) reflect.Value {
		return reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(size), reflect.TypeFor[byte]())), batch, batch)
	}
	keys, values := slice(m.KeySize()), slice(m.ValueSize())
	n := 0
	number := func(first int) { // the keys
		for i := range batch {
			key := keys.Index(i)
			binary.NativeEndian.PutUint32(key.Slice(0, 4).Bytes(), uint32(first+i)|0xaa<<24)
		}
	}
	for {
		number(n)
		added, err := m.BatchUpdate(keys.Interface(), values.Interface(), nil)
		n += added
		if errors.Is(err, unix.E2BIG) {
			break
		}
		if err != nil || n > int(m.MaxEntries()) {
			t.Fatalf("after %d: %v", n, err)
		}
	}
	return func() {
		t.Helper()
		for first := 0; first < n; first += batch {
			number(first)
			some := keys.Slice(0, min(batch, n-first)).Interface()
			if deleted, err := m.BatchDelete(some, nil); err != nil || deleted != min(batch, n-first) {
				t.Fatalf("after %d: %d, %v", first, deleted, err)
			}
		}
	}
}

// TestRingFull has no room for events: what is forbidden is refused, what isn't
// works, and what couldn't be told is counted.
func TestRingFull(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, denying())
	junk := asm.Instructions{asm.Mov.Imm(asm.R1, 0)}
	const size = int16(unsafe.Sizeof(bpf.GuardEvent{}))
	for at := int16(8); at <= size; at += 8 {
		junk = append(junk, asm.StoreMem(asm.RFP, -at, asm.R1, asm.DWord))
	}
	junk = append(junk,
		asm.LoadMapPtr(asm.R1, g.maps.Events.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -int32(size)),
		asm.Mov.Imm(asm.R3, int32(size)),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.Return(),
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: junk})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	most := g.maps.Events.MaxEntries() / uint32(size)
	if result, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64), Repeat: most}); err != nil || int32(result) != -int32(unix.EAGAIN) {
		t.Fatalf("it isn't full: %d, %v", int32(result), err)
	}
	before, err := g.UserUsage(testtarget.Alice)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, target, unix.EPERM, "load", loading(forbidden))
	expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
	if usage, err := g.UserUsage(testtarget.Alice); err != nil || usage.Lost != before.Lost+2 {
		t.Errorf("got %+v after %+v, %v", usage, before, err)
	}

	// Whoever reads makes room.
	ctx, cancel := context.WithCancel(t.Context())
	events, ended := make(chan Event, 1<<15), make(chan error)
	go func() { ended <- g.Events(ctx, func(e Event) { events <- e }) }()
	testtarget.Eventually(t, "an event is told", func() bool {
		expect(t, target, unix.EPERM, "load", loading(forbidden))
		for {
			select {
			case e := <-events:
				if e.Grant == id && e.Reason == Helper {
					return true
				}
			default:
				return false
			}
		}
	})
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	expect(t, target, 0, "dropall", nil)
}

// killer kills a process when it has made a number of bpf system calls: the last
// of them ends, and nothing comes after it.
type killer struct{ value *ebpf.Map }

type killing struct{ TGID, At, Calls uint32 }

func newKiller(t *testing.T) *killer {
	t.Helper()
	value, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(killing{})), MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { value.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: "security_bpf", License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMapValue(asm.R6, value.FD(), 0),
			asm.FnGetCurrentPidTgid.Call(),
			asm.RSh.Imm(asm.R0, 32),
			asm.LoadMem(asm.R1, asm.R6, int16(unsafe.Offsetof(killing{}.TGID)), asm.Word),
			asm.JNE.Reg(asm.R0, asm.R1, "end"),
			asm.LoadMem(asm.R1, asm.R6, int16(unsafe.Offsetof(killing{}.Calls)), asm.Word),
			asm.Add.Imm(asm.R1, 1),
			asm.StoreMem(asm.R6, int16(unsafe.Offsetof(killing{}.Calls)), asm.R1, asm.Word),
			asm.LoadMem(asm.R2, asm.R6, int16(unsafe.Offsetof(killing{}.At)), asm.Word),
			asm.JNE.Reg(asm.R1, asm.R2, "end"),
			asm.Mov.Imm(asm.R1, int32(unix.SIGKILL)),
			asm.FnSendSignal.Call(),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &killer{value}
}

// aim has a process killed at its n-th call from now on, which is the first; 0
// is never.
func (k *killer) aim(t *testing.T, pid, n int) {
	t.Helper()
	if err := k.value.Put(uint32(0), killing{TGID: uint32(pid), At: uint32(n)}); err != nil {
		t.Fatal(err)
	}
}

// calls is how many calls there were since.
func (k *killer) calls(t *testing.T) int {
	t.Helper()
	var v killing
	if err := k.value.Lookup(uint32(0), &v); err != nil {
		t.Fatal(err)
	}
	return int(v.Calls)
}

// TestKilledDaemon kills a daemon between any two system calls of Bind, when the
// file system is there already, and of Release. The next one finds nothing that
// is half bound.
func TestKilledDaemon(t *testing.T) {
	g := open(t)
	killer := newKiller(t)
	target := testtarget.New(t, testtarget.Alice)
	// kill has a daemon do something for a grant that ends at a call, if that
	// isn't 0, and returns how many there were.
	kill := func(op string, at int) int {
		t.Helper()
		daemon := testtarget.Start(t, testtarget.Attr{})
		_, files, err := daemon.Do("daemon", nil, testtarget.Dup(t, int(target.PidFD.Fd())))
		if err != nil || len(files) != 1 {
			t.Fatalf("got %d files, %v", len(files), err)
		}
		mount := files[0]
		defer mount.Close()
		lastID++
		id := lastID
		args := []string{strconv.FormatUint(id, 10)}
		if op == "release" {
			daemon.Must("bind", args...)
		}
		killer.aim(t, daemon.PID, at)
		_, _, err = daemon.Do(op, args)
		calls := killer.calls(t)
		if (err != nil) != (at != 0) || at != 0 && calls != at {
			t.Fatalf("%s, killed at call %d: it made %d, %v", op, at, calls, err)
		}
		daemon.Kill()

		g = open(t)
		name := fmt.Sprintf("%s, killed at call %d of the daemon", op, at)
		var bound uint64
		err = g.maps.Roots.Lookup(uint32(mount.Fd()), &bound)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && bound != id {
			t.Fatalf("%s: got grant %d of the file system, %v", name, bound, err)
		}
		grants, err := g.Grants()
		if err != nil || len(grants) > 1 {
			t.Fatalf("%s: got %+v, %v", name, grants, err)
		}
		_, usageErr := g.Usage(id)
		_, userErr := g.UserUsage(testtarget.Alice)
		if known := len(grants) == 1; (usageErr == nil) != known || (userErr == nil) != known || bound != 0 && op == "bind" && !known {
			t.Errorf("%s: bound %d, known %t, usage %v, user %v", name, bound, known, usageErr, userErr)
		}
		// Nobody gets a file system that isn't bound, but the test.
		if bound != 0 {
			_, _, err := target.Do("token", nil, mount)
			live := len(grants) == 1 && !grants[0].Revoked
			if (err == nil) != live || !live && !errors.Is(err, unix.EPERM) {
				t.Errorf("%s: a token, live %t: %v", name, live, err)
			}
			if err == nil {
				expect(t, target, unix.EPERM, "load", loading(forbidden))
				expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
				expect(t, target, 0, "dropall", nil)
			}
		}
		release(t, id)
		if bound != 0 {
			expect(t, target, unix.EPERM, "token", nil, mount)
		}
		number := mountID(t, mount)
		_ = mount.Close()
		testtarget.Eventually(t, "nobody has the file system", func() bool { return holders(t, number) == 0 })
		checkEmpty(t, g)
		return calls
	}
	steps := 0
	for _, op := range []string{"bind", "release"} {
		calls := kill(op, 0)
		for at := range calls {
			kill(op, at+1)
		}
		steps += calls
	}
	fmt.Printf("attack: a daemon was killed at each of %d system calls of Bind and Release\n", steps)
}

// mountID is the number of the mount that a file is in.
func mountID(t *testing.T, f *os.File) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if number, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(number)
		}
	}
	t.Fatal("no mnt_id")
	return ""
}

// holders counts the descriptors, of all processes, in a mount.
func holders(t *testing.T, mount string) (n int) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has gone
		}
		if strings.Contains(string(text), "mnt_id:\t"+mount+"\n") {
			n++
		}
	}
	return n
}

// quickFilesystem makes a file system for a process with its help. The broker
// does without, which takes longer.
func quickFilesystem(t *testing.T, p *testtarget.Process) *os.File {
	t.Helper()
	_, files, err := p.Do("fsopen", nil)
	if err != nil || len(files) != 1 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	defer files[0].Close()
	context := int(files[0].Fd())
	for _, option := range []string{"delegate_cmds", "delegate_maps", "delegate_progs", "delegate_attachs"} {
		if err := unix.FsconfigSetString(context, option, "any"); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.FsconfigCreate(context); err != nil {
		t.Fatal(err)
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(mount), "mount")
}

// TestComeAndGo has grants come and go; their inodes' numbers come round. A
// file system after them is nobody's. Nothing of them is left then.
func TestComeAndGo(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	numbers := map[uint64]int{}
	limits := Limits{Profile: denying(), Owner: testtarget.Alice}
	total, start := 0, time.Now()
	for total < times(300, 10_000) {
		var ids []uint64
		for range 100 {
			mount := quickFilesystem(t, target)
			lastID++
			if err := g.Bind(lastID, mount, limits); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, lastID)
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
	fmt.Printf("attack: %d grants with %d inode numbers came and went in %.1f s\n", total, len(numbers), time.Since(start).Seconds())
	checkEmpty(t, g)
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
