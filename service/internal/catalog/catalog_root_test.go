// SPDX-License-Identifier: Apache-2.0

//go:build root

package catalog

import (
	"debug/elf"
	"errors"
	"fmt"
	"math/rand"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// head is how most of the objects begin: nothing is attached.
const head = `[Object]
File=ELF/kinds.bpf.o
[Map hits]
Access=read-only read-write write-only
[Map events]
Access=consume
[Program on_raw]
Attach=none
[Program on_tracepoint]
Attach=none
`

// The keys of the map, as the programs have them.
const (
	hitRaw uint32 = 1 + iota
	hitTracepoint
	hitUprobe
	hitXDP
	hitTCX
	hitCgroup
	hitSample
)

// hits waits until a program has counted something.
func (f *fixture) hits(object string, kind uint32, do func()) {
	f.t.Helper()
	m := f.openMap(object, "hits", ReadOnly)
	defer m.Close()
	testtarget.Eventually(f.t, fmt.Sprintf("%s counts for %d", object, kind), func() bool {
		do()
		var n uint64
		return m.Lookup(kind, &n) == nil && n > 0
	})
}

func TestOpenMap(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("kinds", head+"[Data]\nstep=3\nlabel=hello\nquiet=no\nonly=RAW\n[Program on_raw]\nAttach=\n[Program on_run]\nPublish=yes\n")
	f.wantPins()
	f.hits("kinds", hitRaw, func() { _ = unix.Getppid() })
	f.wantPins("kinds/links/on_raw", "kinds/maps/events", "kinds/maps/hits",
		"kinds/programs/on_cgroup", "kinds/programs/on_raw", "kinds/programs/on_run", "kinds/programs/on_sample",
		"kinds/programs/on_tcx", "kinds/programs/on_tracepoint", "kinds/programs/on_uprobe", "kinds/programs/on_xdp")

	key, value := hitRaw, uint64(0)
	for access, can := range map[Access][2]bool{ReadOnly: {true, false}, ReadWrite: {true, true}, WriteOnly: {false, true}} {
		m := f.openMap("kinds", "hits", access)
		if err := m.Lookup(key, &value); (err == nil) != can[0] {
			t.Errorf("%s: reading: %v", access, err)
		} else if err == nil && value%3 != 0 {
			t.Errorf("%d is no multiple of step", value)
		}
		if err := m.Put(uint32(9), uint64(1)); (err == nil) != can[1] {
			t.Errorf("%s: writing: %v", access, err)
		}
		m.Close()
	}

	file, err := f.OpenProgram("kinds", "on_run", f.self(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	program, err := ebpf.NewProgramFromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	if result, err := program.Run(&ebpf.RunOptions{}); err != nil || result != 7 {
		t.Errorf("run: %d, %v", result, err)
	}

	for name, test := range map[string]struct {
		object, name string
		access       Access
		want         error
	}{
		"object":  {"nonesuch", "hits", ReadOnly, ErrNoSuchObject},
		"path":    {"../kinds", "hits", ReadOnly, ErrNoSuchObject},
		"map":     {"kinds", "nonesuch", ReadOnly, ErrNoSuchMap},
		"pin":     {"kinds", "../programs/on_raw", ReadOnly, ErrNoSuchMap},
		"access":  {"kinds", "hits", Consume, ErrNotOffered},
		"nothing": {"kinds", "hits", "", ErrNotOffered},
	} {
		if _, err := f.OpenMap(test.object, test.name, test.access, f.self(), 0); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for _, name := range []string{"nonesuch", "on_raw", "hits"} {
		if _, err := f.OpenProgram("kinds", name, f.self(), 0); !errors.Is(err, ErrNoSuchProgram) {
			t.Errorf("the program %s: got %v", name, err)
		}
	}
	if l, err := f.Link("kinds", "on_raw"); err != nil || l != (LinkInfo{"on_raw", "on_raw", "raw_tracepoint", "sys_enter", true}) {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := f.Link("kinds", "on_xdp"); !errors.Is(err, ErrNoSuchLink) {
		t.Error(err)
	}
}

func TestDescribe(t *testing.T) {
	f := newFixture(t)
	f.object("kinds", head+"[Map total]\nFrom=.bss\nAccess=read-only\n[Program on_xdp]\nPublish=yes\n")
	d, err := f.Describe("kinds")
	if err != nil {
		t.Fatal(err)
	}
	for i := range d.Maps {
		spec, err := btf.LoadSpecFromReader(strings.NewReader(string(d.Maps[i].BTF)))
		if err != nil {
			t.Fatalf("%s: %v", d.Maps[i].Name, err)
		}
		if _, err := spec.AnyTypeByName("value"); err != nil {
			t.Errorf("%s: %v", d.Maps[i].Name, err)
		}
		d.Maps[i].BTF = nil
	}
	want := []MapInfo{
		{Name: "events", Type: "ringbuf", Access: []Access{Consume}, MaxEntries: 4096, ValueType: "struct event"},
		{Name: "hits", Type: "hash", Access: []Access{ReadOnly, ReadWrite, WriteOnly}, KeySize: 4, ValueSize: 8, MaxEntries: 64, KeyType: "enum kind", ValueType: "u64"},
		{Name: "total", Type: "array", Access: []Access{ReadOnly}, KeySize: 4, ValueSize: 8, MaxEntries: 1, ValueType: "struct bss"},
	}
	if diff := cmp.Diff(want, d.Maps); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]ProgramInfo{{"on_xdp", "xdp", "xdp"}}, d.Programs); diff != "" {
		t.Error(diff)
	}
	if d.State != Unloaded || d.Err != nil || d.Links != nil {
		t.Errorf("%+v", d)
	}
}

// Each kind of attachment that the host's kernel has.
func TestAttach(t *testing.T) {
	testtarget.NoLeaks(t)
	if err := unix.Mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, ""); err != nil && err != unix.EBUSY {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", "lo", "up")
	function, call := callable(t)
	packet := func() {
		conn, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("x"))
		_ = conn.Close()
	}
	for name, test := range map[string]struct {
		kind    uint32
		program string
		do      func()
		links   []LinkInfo
	}{
		"raw tracepoint":       {hitRaw, "[Program on_raw]\nAttach=sched_switch\n", func() { time.Sleep(time.Millisecond) }, []LinkInfo{{"on_raw", "on_raw", "raw_tracepoint", "sched_switch", true}}},
		"tracepoint":           {hitTracepoint, "[Program on_tracepoint]\nAttach=\n", func() { _ = unix.Getppid() }, []LinkInfo{{"on_tracepoint", "on_tracepoint", "tracepoint", "raw_syscalls/sys_enter", true}}},
		"uprobe":               {hitUprobe, "[Program on_uprobe]\nAttach=" + function + "\n", call, []LinkInfo{{"on_uprobe", "on_uprobe", "uprobe", function, true}}},
		"XDP":                  {hitXDP, "[Program on_xdp]\nAttach=lo\n", packet, []LinkInfo{{"on_xdp", "on_xdp", "xdp", "lo", true}}},
		"tcx on two":           {hitTCX, "[Program on_tcx]\nAttach=lo nonesuch\n", packet, []LinkInfo{{"on_tcx-1", "on_tcx", "tcx", "lo", true}, {"on_tcx-2", "on_tcx", "tcx", "nonesuch", false}}},
		"cgroup":               {hitCgroup, "[Program on_cgroup]\nAttach=/\n", packet, []LinkInfo{{"on_cgroup", "on_cgroup", "cgroup", "/", true}}},
		"sampling on each CPU": {hitSample, "[Program on_sample]\nAttach=999Hz\n", func() {}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.object("kinds", head+test.program)
			f.hits("kinds", test.kind, test.do)
			d, err := f.Describe("kinds")
			if err != nil {
				t.Fatal(err)
			}
			if test.links == nil {
				cpus, err := kernel.OnlineCPUs()
				if err != nil || len(d.Links) != len(cpus) || !d.Links[0].Attached {
					t.Errorf("%+v, %v", d.Links, err)
				}
			} else if diff := cmp.Diff(test.links, d.Links); diff != "" {
				t.Error(diff)
			}
			// Another daemon finds it, and takes it away.
			f.again()
			f.hits("kinds", test.kind, test.do)
			if err := os.Remove(filepath.Join(f.files, "kinds.object")); err != nil {
				t.Fatal(err)
			}
			f.reload()
			f.wantPins()
		})
	}
}

//go:noinline
func callee() {}

// callable is a function in a file, and a call of it: one of the test's own, or of
// the C library where "go test" has left the symbols out.
func callable(t *testing.T) (target string, call func()) {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if file, err := elf.Open(executable); err == nil {
		defer file.Close()
		if symbols, err := file.Symbols(); err == nil && len(symbols) > 0 {
			return executable + ":github.com/bpfbroker/bpfbroker/service/internal/catalog.callee", callee
		}
	}
	libraries, err := filepath.Glob("/usr/lib/*/libc.so.6")
	if err != nil || len(libraries) == 0 {
		t.Fatalf("no C library: %v", err)
	}
	return libraries[0] + ":malloc", func() { run(t, "true") }
}

// Nothing of a bad object reaches the kernel, the others don't mind, and what is
// wrong is said.
func TestBad(t *testing.T) {
	testtarget.NoLeaks(t)
	for name, test := range map[string]struct {
		text string
		mess func(f *fixture)
		want string // in the error, and that of a file's is one of the whole file
		load bool   // the kernel refuses it
	}{
		"no file":        {text: "[Object]\nFile=ELF/nonesuch\n", want: "cannot stat: no such file or directory"},
		"no ELF":         {text: "[Object]\nFile=ELF/text\n", mess: func(f *fixture) { f.write(f.elf+"/text", "hello") }, want: "not an ELF file"},
		"empty":          {text: "[Object]\nFile=ELF/text\n", mess: func(f *fixture) { f.write(f.elf+"/text", "") }, want: "empty"},
		"truncated":      {text: "[Object]\nFile=ELF/kinds.bpf.o\n", mess: func(f *fixture) { f.check(os.Truncate(f.elf+"/kinds.bpf.o", 7000)) }, want: "not an ELF file"},
		"a program's":    {text: "[Object]\nFile=/proc/self/exe\n", want: ""},
		"1 GiB":          {text: "[Object]\nFile=ELF/kinds.bpf.o\n", mess: func(f *fixture) { f.check(os.Truncate(f.elf+"/kinds.bpf.o", 1<<30)) }, want: "larger than 16777216 bytes"},
		"a device":       {text: "[Object]\nFile=/dev/zero\n", want: "not a regular file"},
		"a directory":    {text: "[Object]\nFile=/etc\n", want: "not a regular file"},
		"a user's":       {text: "[Object]\nFile=ELF/kinds.bpf.o\n", mess: func(f *fixture) { f.check(os.Chown(f.elf+"/kinds.bpf.o", 1000, 0)) }, want: "not owned by uid 0"},
		"anybody's":      {text: "[Object]\nFile=ELF/kinds.bpf.o\n", mess: func(f *fixture) { f.check(os.Chmod(f.elf+"/kinds.bpf.o", 0o646)) }, want: "writable by others"},
		"map":            {text: head + "[Map nonesuch]\nAccess=read-only\n", want: `[Map nonesuch]: the ELF file has no map "nonesuch"`},
		"program":        {text: head + "[Program nonesuch]\nPublish=yes\n", want: `[Program nonesuch]: the ELF file has no program "nonesuch"`},
		"variable":       {text: head + "[Data]\nnonesuch=1\n", want: "[Data] nonesuch=: the ELF file has no such variable"},
		"number":         {text: head + "[Data]\nstep=many\n", want: `[Data] step=: "many" is no number of 32 bits`},
		"too large":      {text: head + "[Data]\nstep=4294967296\n", want: "is no number of 32 bits"},
		"long text":      {text: head + "[Data]\nlabel=123456789012\n", want: "longer than the 11 bytes"},
		"truth":          {text: head + "[Data]\nquiet=2\n", want: `"2" is neither yes nor no`},
		"consume a hash": {text: head + "[Map hits]\nAccess=consume\n", want: "consume is for ring buffers"},
		"read a ring":    {text: head + "[Map events]\nAccess=read-only\n", want: "consume is for ring buffers"},
		"no record":      {text: head + "[Map events]\nRecord=nonesuch\n", want: `has not one type "nonesuch"`},
		"much memory":    {text: head + "[Map hits]\nMaxEntries=100000000\n", want: "bytes, and MaxMapBytes= is 67108864"},
		"attach":         {text: head + "[Program on_run]\nAttach=eth0\n", want: "that kind of program isn't known here"},
		"tracepoint":     {text: head + "[Program on_tracepoint]\nAttach=exec\n", want: "a tracepoint is GROUP/NAME"},
		"uprobe":         {text: head + "[Program on_uprobe]\nAttach=main\n", want: "a uprobe is /FILE:SYMBOL"},
		"rate":           {text: head + "[Program on_sample]\nAttach=10001Hz\n", want: "a rate of samples is 1Hz to 10000Hz"},
		"cgroup":         {text: head + "[Program on_cgroup]\nAttach=/../etc\n", want: "an absolute path from the hierarchy's root"},
		"interface":      {text: head + "[Program on_xdp]\nAttach=../../etc\n", want: "no name of an interface"},
		"verifier":       {text: "[Object]\nFile=ELF/bad.bpf.o\n", want: "the verifier's last lines: ", load: true},
		"missing type":   {text: "[Object]\nFile=ELF/missing.bpf.o\n", want: "CO-RE relocation", load: true},
		"no tracepoint":  {text: head + "[Program on_raw]\nAttach=nonesuch\n", want: "cannot attach on_raw to nonesuch", load: true},
		"no cgroup":      {text: head + "[Program on_cgroup]\nAttach=/nonesuch\n", want: "cannot attach on_cgroup to /nonesuch", load: true},
		"no symbol":      {text: head + "[Program on_uprobe]\nAttach=/proc/self/exe:nonesuch\n", want: "cannot attach on_uprobe", load: true},
		"the last fails": {text: head + "[Program on_raw]\nAttach=\n[Program on_sample]\nAttach=99Hz\n[Program on_uprobe]\nAttach=/nonesuch:main\n", want: "cannot attach on_uprobe", load: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			if test.mess != nil {
				test.mess(f)
			}
			f.object("fine", "[Object]\nFile=ELF/probes.bpf.o\n[Map hits]\nAccess=read-only\n")
			f.object("bad", test.text)
			if test.load {
				if d, err := f.Describe("bad"); err != nil || d.State != Unloaded {
					t.Errorf("before it is loaded: %+v, %v", d, err)
				}
			}
			_, err := f.OpenProgram("bad", "x", f.self(), 0)
			if test.load {
				f.mu.Lock()
				e := f.entries["bad"]
				f.mu.Unlock()
				e.mu.Lock()
				err = f.load(e)
				e.mu.Unlock()
				var failed *LoadError
				if !errors.As(err, &failed) {
					t.Fatalf("got %v, want a LoadError", err)
				}
				if name == "verifier" && (len(failed.Log) == 0 || len(failed.Log) > maxLog) {
					t.Errorf("the log: %q", failed.Log)
				}
			} else if file := (*config.FileError)(nil); !errors.As(err, &file) && test.want != "" {
				t.Fatalf("got %v, want a FileError", err)
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			for _, s := range f.List() {
				if bad := s.Name == "bad"; bad != (s.State == Failed) || bad != (s.Err != nil) {
					t.Errorf("%+v", s)
				}
			}
			f.wantPins()
			if errs := Check(Load(config.Dirs{Etc: f.files})); test.load != (errs == nil) {
				t.Errorf("Check: %v", errs)
			}
		})
	}
}

func (f *fixture) check(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// An edited object is loaded anew for those who come; who has the old maps keeps
// them. Where it is only offered differently, nothing is loaded.
func TestReload(t *testing.T) {
	testtarget.NoLeaks(t)
	run(t, "ip", "link", "set", "lo", "up")
	f := newFixture(t)
	text := head + "[Program on_xdp]\nAttach=lo\n[Program on_raw]\nAttach=sched_switch\n"
	f.object("kinds", text)
	old := f.openMap("kinds", "hits", ReadWrite)
	defer old.Close()
	mark(t, old, 1)

	f.object("kinds", strings.Replace(text, "read-only read-write", "read-only", 1)+"[Map hits]\nAccess=\nAccess=read-only\n")
	same := f.openMap("kinds", "hits", ReadOnly)
	defer same.Close()
	if !marked(same, 1) {
		t.Error("another access made another map")
	}
	if _, err := f.OpenMap("kinds", "hits", ReadWrite, f.self(), 0); !errors.Is(err, ErrNotOffered) {
		t.Errorf("what is not offered any more: %v", err)
	}

	f.object("kinds", text+"[Data]\nstep=5\n")
	renewed := f.openMap("kinds", "hits", ReadOnly)
	defer renewed.Close()
	if marked(renewed, 1) {
		t.Error("another version has the same map")
	}
	if !marked(old, 1) {
		t.Error("the old map has gone")
	}
	if n := f.instances(); n != 1 {
		t.Errorf("%d versions", n)
	}

	// A version that can't be loaded leaves the old one where it is, but it isn't
	// handed out.
	before := f.pins()
	programBefore := f.xdpProgram("kinds")
	f.object("kinds", text+"[Program on_uprobe]\nAttach=/nonesuch:main\n")
	if _, err := f.OpenMap("kinds", "hits", ReadOnly, f.self(), 0); err == nil {
		t.Error("an object that couldn't be loaded is handed out")
	}
	if diff := cmp.Diff(before, f.pins()); diff != "" {
		t.Error(diff)
	}
	if now := f.xdpProgram("kinds"); now != programBefore {
		t.Errorf("the interface has program %d, had %d", now, programBefore)
	}
	f.object("kinds", "[Object]\nFile=typo\n")
	if diff := cmp.Diff(before, f.pins()); diff != "" {
		t.Error(diff)
	}
	f.object("kinds", text+"[Data]\nstep=5\n")
	if again := f.openMap("kinds", "hits", ReadOnly); !sameMap(t, again, renewed) {
		t.Error("the version from before was loaded again")
	} else {
		again.Close()
	}
}

func mark(t *testing.T, m *ebpf.Map, value uint64) {
	t.Helper()
	if err := m.Put(uint32(99), value); err != nil {
		t.Fatal(err)
	}
}

func marked(m *ebpf.Map, want uint64) bool {
	var got uint64
	return m.Lookup(uint32(99), &got) == nil && got == want
}

func sameMap(t *testing.T, a, b *ebpf.Map) bool {
	t.Helper()
	var ids [2]ebpf.MapID
	for i, m := range []*ebpf.Map{a, b} {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids[i], _ = info.ID()
	}
	return ids[0] == ids[1]
}

// xdpProgram is the id of the program on the interface of an object, 0 for none.
func (f *fixture) xdpProgram(object string) ebpf.ProgramID {
	f.t.Helper()
	paths, err := filepath.Glob(filepath.Join(f.root(), object+version+"*", linksDir, "on_xdp"))
	if err != nil || len(paths) != 1 {
		f.t.Fatalf("links: %v, %v", paths, err)
	}
	l, err := link.LoadPinnedLink(paths[0], nil)
	if err != nil {
		f.t.Fatal(err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		f.t.Fatal(err)
	}
	if info.XDP().Ifindex == 0 {
		return 0
	}
	return info.Program
}

// instances is how many directories of objects there are.
func (f *fixture) instances() int {
	f.t.Helper()
	entries, err := os.ReadDir(f.root())
	if err != nil {
		f.t.Fatal(err)
	}
	return len(entries)
}

func init() { ops["load"] = loadForever }

// loadForever loads objects and unloads them, until it is killed.
func loadForever(args []string, _ []*os.File) (string, []*os.File, error) {
	c, err := New(args[0], args[1])
	if err != nil {
		return "", nil, err
	}
	go func() {
		for {
			for _, dir := range args[2:] {
				c.Set(Load(config.Dirs{Etc: dir}))
			}
		}
	}()
	return "", nil, nil
}

// Whenever a daemon is killed, the next one has each object as a whole or not at
// all, and takes away the rest.
func TestKilled(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	text := strings.ReplaceAll(head, "ELF", f.elf) + "[Object]\nLoad=boot\n[Program on_xdp]\nAttach=lo\n[Program on_raw]\nAttach=sched_switch\n"
	other, empty := t.TempDir(), t.TempDir()
	f.object("kinds", text)
	complete := f.pins()
	f.write(filepath.Join(other, "kinds.object"), text+"[Data]\nstep=2\n")
	f.Close()
	for i := range 40 {
		p := testtarget.Start(t, testtarget.Attr{})
		p.Must("load", append([]string{f.root(), f.state}, [][]string{{f.files, other}, {f.files, empty}}[i%2]...)...)
		time.Sleep(time.Duration(rand.Intn(20_000)) * time.Microsecond)
		p.Kill()
		f.open()
		f.reload()
		if diff := cmp.Diff(complete, f.pins()); diff != "" {
			t.Fatalf("after %d kills (-want +got):\n%s", i+1, diff)
		}
		if n := f.instances(); n != 1 {
			t.Fatalf("%d versions", n)
		}
		f.openMap("kinds", "hits", ReadOnly).Close()
		f.Close()
	}
	f.open()
	f.Set(Load(config.Dirs{Etc: empty}))
	f.wantPins()
}

// A daemon that is killed leaves nothing that the next one offers by half.
func TestCrash(t *testing.T) {
	testtarget.NoLeaks(t)
	run(t, "ip", "link", "set", "lo", "up")
	f := newFixture(t)
	text := head + "[Program on_xdp]\nAttach=lo\n"
	f.object("kinds", text)
	m := f.openMap("kinds", "hits", ReadWrite)
	defer m.Close()
	mark(t, m, 1)
	loaded := f.pins()
	program := f.xdpProgram("kinds")

	// In the middle of loading another object, with a link.
	staged := filepath.Join(f.root(), stage+"other")
	f.check(os.MkdirAll(filepath.Join(staged, linksDir), 0o700))
	f.check(kernel.Pin(filepath.Join(staged, "map"), m.FD()))
	// In the middle of a reload, when the interface was taken over already.
	e := f.entries["kinds"]
	o, err := Load(config.Dirs{Etc: f.files}).Get("kinds")
	f.check(err)
	o.Data["step"] = "7"
	plan, spec, err := f.plan(o)
	f.check(err)
	collection, err := ebpf.NewCollection(spec)
	f.check(err)
	taken, err := plan.attachments[0].takeOver(collection.Programs["on_xdp"], []string{e.loaded})
	f.check(err)
	f.check(os.MkdirAll(filepath.Join(f.root(), stage+"kinds", linksDir), 0o700))
	f.check(pinLink(taken.link, filepath.Join(f.root(), stage+"kinds", linksDir, "on_xdp")))
	taken.link.Close()
	taken.before.Close()
	collection.Close()
	if f.xdpProgram("kinds") == program {
		t.Fatal("the interface was not taken over")
	}
	f.again()
	if diff := cmp.Diff(loaded, f.pins()); diff != "" {
		t.Errorf("pins (-before +after):\n%s", diff)
	}
	if now := f.xdpProgram("kinds"); now != program {
		t.Errorf("the interface has program %d, had %d", now, program)
	}
	same := f.openMap("kinds", "hits", ReadOnly)
	defer same.Close()
	if !marked(same, 1) {
		t.Error("what was loaded is not adopted")
	}

	// After a reload has published, before the old version was taken away; and
	// with files that were edited while no daemon ran.
	f.check(os.MkdirAll(filepath.Join(f.root(), "kinds"+version+"0123456789abcdef", linksDir), 0o700))
	f.Close()
	f.write(filepath.Join(f.files, "kinds.object"), strings.ReplaceAll(text, "ELF", f.elf)+"[Data]\nstep=9\n")
	f.open()
	f.reload()
	if n := f.instances(); n != 1 {
		t.Errorf("%d versions", n)
	}
	if now := f.xdpProgram("kinds"); now == program || now == 0 {
		t.Errorf("the interface has program %d still", now)
	}
}

// Many at once get the same object, loaded once.
func TestCrowd(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("kinds", head)
	var wait sync.WaitGroup
	self := f.self()
	for range 1000 {
		wait.Go(func() {
			file, err := f.OpenMap("kinds", "hits", ReadOnly, self, 0)
			if err != nil {
				t.Error(err)
				return
			}
			_ = file.Close()
		})
	}
	wait.Wait()
	if n := f.instances(); n != 1 {
		t.Errorf("%d versions", n)
	}
}

// Keep= by the processes that have opened something, also over a restart.
func TestKeep(t *testing.T) {
	testtarget.NoLeaks(t)
	for name, test := range map[string]struct {
		keep string
		wait time.Duration
	}{"while used": {"while-used", 0}, "a second longer": {"1s", time.Second}} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.object("kinds", strings.Replace(head, "[Map hits]", "Keep="+test.keep+"\n[Map hits]", 1))
			open := func(p *testtarget.Process) { t.Helper(); f.openBy(p, "kinds") }
			first, second := testtarget.Start(t, testtarget.Attr{}), testtarget.Start(t, testtarget.Attr{})
			open(first)
			open(first)
			open(second)
			if !f.Busy() {
				t.Error("nobody watches the users")
			}
			f.again()
			first.Kill()
			time.Sleep(test.wait + 100*time.Millisecond)
			if len(f.pins()) == 0 {
				t.Fatal("it has gone before its last user")
			}
			ended := time.Now()
			second.Kill()
			testtarget.Eventually(t, "it goes with its last user", func() bool { return len(f.pins()) == 0 })
			if took := time.Since(ended); took < test.wait {
				t.Errorf("it went after %v", took)
			}
			testtarget.Eventually(t, "nothing is left of its users", func() bool {
				left, err := os.ReadDir(f.state)
				return err == nil && len(left) == 0
			})
			if f.Busy() {
				t.Error("still busy")
			}
			// And it comes again.
			third := testtarget.Start(t, testtarget.Attr{})
			open(third)
			// A user that ends while no daemon runs.
			f.Close()
			third.Kill()
			f.open()
			f.reload()
			testtarget.Eventually(t, "it goes with a user that ended unseen", func() bool { return len(f.pins()) == 0 })
		})
	}
}

func TestBoot(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("kinds", strings.Replace(head, "[Map hits]", "Load=boot\n[Map hits]", 1))
	if len(f.pins()) == 0 {
		t.Error("it is not loaded at boot")
	}
	if f.Busy() {
		t.Error("the daemon can't end")
	}
	// What isn't there any more, or masked, goes.
	f.write(filepath.Join(f.files, "kinds.object"), "")
	f.reload()
	f.wantPins()
	if _, err := f.Describe("kinds"); !errors.Is(err, ErrNoSuchObject) {
		t.Error(err)
	}
}
