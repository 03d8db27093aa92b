// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// Values of the enums that the matrix knows more of than their names.
const (
	typeTracing   = 26
	typeStructOps = 27
	typeLSM       = 29
	typeSyscall   = 31

	attachFlowDissector = 17
	attachRawTP         = 23
	attachFentry        = 24
	attachFexit         = 25
	attachModify        = 26
	attachLSM           = 27
	attachIter          = 28
	attachKprobeMulti   = 42
	attachLSMCgroup     = 43
	attachTCXEgress     = 47
	attachUprobeMulti   = 48
	attachNetkit        = 54
	attachNetkitPeer    = 55
	attachKprobeSession = 56
	attachUprobeSession = 57
	attachFsession      = 58
)

// cell is a program type and an attach type, and how a program is loaded for
// them. Only those that root can load have a result.
type cell struct {
	Type, Attach uint32
	// Expected is the attach type that it is loaded for, to be attached as
	// Attach: that one too, unless the kernel won't have it.
	Expected uint32
	Result   uint32 // that the program returns: one that the kernel allows
	BTF      uint32 // of what it is loaded for
}

func (c cell) program() program {
	p := program{Type: c.Type, Attach: c.Expected, BTF: c.BTF, Instructions: []uint64{uint64(c.Result)<<32 | 0xb7, exit}}
	if c.Type == typeSyscall {
		p.Flags = 1 << 4 // BPF_F_SLEEPABLE
	}
	return p
}

// The ways to attach a program, each to what is the grant's own and to what isn't.
const (
	linkOwn = iota
	linkOther
	attachOwn
	attachOther
	openRawTP
	loaded // no way: whether there is anything to attach
	ways
)

// untried is the result of what makes no sense to try.
const untried = -1

// targets of the matrix, as they come to a process's operation.
const (
	fileCells = iota
	fileResults
	fileCgroup
	fileRootCgroup
	fileNet // owned, if the process has one
	fileHostNet
	fileEvent
	fileTracepoint
	fileSockmap
	fileEnd
)

func init() {
	// addtoken N MOUNT: takes a token to be used later, and keeps it.
	ops["addtoken"] = func(args []string, files []*os.File) (string, []*os.File, error) {
		f, err := kernel.CreateToken(files[0])
		matrixTokens[number(args[0])] = f
		return "", nil, err
	}
	// droptokens: closes them.
	ops["droptokens"] = func([]string, []*os.File) (string, []*os.File, error) {
		for _, f := range matrixTokens {
			_ = f.Close()
		}
		clear(matrixTokens)
		return "", nil, nil
	}
	// rootmatrix CELLS RESULTS: loads each with the first result that the
	// kernel allows, and answers with the error and the result.
	ops["rootmatrix"] = matrixOp(func(c cell, _ []string, _ []*os.File) (answer []int) {
		for _, c.Result = range []uint32{1, 0, 2} {
			if answer = []int{loadCell(c), int(c.Result)}; answer[0] == 0 {
				break
			}
		}
		return answer
	})
	// loadmatrix CELLS RESULTS: loads each with the first token, with the one
	// that lacks its program type, and the one that lacks its attach type.
	ops["loadmatrix"] = matrixOp(func(c cell, _ []string, _ []*os.File) (results []int) {
		for _, i := range []uint32{0, 1 + c.Type, 1 + 64 + c.Attach} {
			held.token = matrixTokens[i]
			results = append(results, loadCell(c))
		}
		held.token = nil
		return results
	})
	// attachmatrix HOST CELLS RESULTS …: attaches each in all ways.
	ops["attachmatrix"] = matrixOp(tryCell)
}

// matrixTokens are a token for everything, and from 1 and 65 on those that lack
// the program type or the attach type of that number.
var matrixTokens = map[uint32]*os.File{}

func loadCell(c cell) int {
	fd, err := load(c.program())
	if err == nil {
		_ = unix.Close(fd)
	}
	return number0(err)
}

// number0 is an error's number, or 0.
func number0(err error) int {
	var errno syscall.Errno
	errors.As(err, &errno)
	return int(errno)
}

func matrixOp(do func(cell, []string, []*os.File) []int) testtarget.Op {
	return func(args []string, files []*os.File) (string, []*os.File, error) {
		var cells []cell
		if _, err := files[fileCells].Seek(0, 0); err != nil {
			return "", nil, err
		}
		if err := json.NewDecoder(files[fileCells]).Decode(&cells); err != nil {
			return "", nil, err
		}
		results := make([][]int, len(cells))
		for i, c := range cells {
			results[i] = do(c, args, files)
		}
		return "", nil, json.NewEncoder(files[fileResults]).Encode(results)
	}
}

// tryCell attaches a program in all ways, and detaches it again.
func tryCell(c cell, args []string, files []*os.File) []int {
	results := slices.Repeat([]int{untried}, ways)
	p, err := load(c.program())
	results[loaded] = number0(err)
	if err != nil {
		return results
	}
	defer unix.Close(p)
	onHost := args[0] == "host"
	for _, other := range []bool{false, true} {
		link, attach := linkOwn, attachOwn
		if other {
			link, attach = linkOther, attachOther
		}
		target, ok := matrixTarget(c, other, onHost, files)
		if !ok {
			continue
		}
		fd, err := linkCell(c, uint32(p), target, other)
		if err == nil {
			_ = unix.Close(fd)
		}
		results[link] = number0(err)
		attr := struct{ target, program, kind, flags, replace uint32 }{target, uint32(p), c.Attach, 0, 0}
		_, err = call(8, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		if results[attach] = number0(err); err == nil {
			if _, err := call(9, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
				panic(fmt.Sprintf("cannot detach %+v: %v", c, err))
			}
		}
	}
	name := ""
	if c.Type != typeTracing && c.Type != typeLSM {
		name = "sys_enter"
	}
	fd, err := openRaw(uint32(p), name)
	if err == nil {
		_ = unix.Close(fd)
	}
	results[openRawTP] = number0(err)
	return results
}

// matrixTarget is what the attach type takes for a target: one of the grant's
// own or another, if the process can name such.
func matrixTarget(c cell, other, onHost bool, files []*os.File) (target uint32, ok bool) {
	pick := func(own, notOwn int) (uint32, bool) {
		if other {
			own = notOwn
		}
		return uint32(files[own].Fd()), true
	}
	switch c.Attach {
	case attachXDP, attachTCXIngress, attachTCXEgress, attachNetkit, attachNetkitPeer, attachNetfilter:
		return 1, other == onHost // of the process's network namespace
	case attachFlowDissector, attachSKLookup:
		if !other && onHost {
			return 0, false
		}
		return pick(fileNet, fileHostNet)
	case attachPerfEvent:
		return pick(fileEvent, fileTracepoint)
	case 4, 5, 7, 38: // sk_skb_…, sk_msg_verdict
		return uint32(files[fileSockmap].Fd()), !other
	case attachUprobeMulti, attachUprobeSession:
		return 0, true
	case attachRawTP, attachFentry, attachFexit, attachModify, attachLSM, attachIter, attachKprobeMulti, attachKprobeSession, attachFsession:
		return 0, other // there is only one kernel
	}
	return pick(fileCgroup, fileRootCgroup)
}

// linkCell makes a link, with what the attach type wants beside the target.
func linkCell(c cell, program, target uint32, other bool) (int, error) {
	attr := struct {
		program, target, attachType, flags uint32
		rest                               [6]uint64
	}{program: program, target: target, attachType: c.Attach}
	var name, list any
	switch c.Attach {
	case attachNetfilter:
		attr.target = 0
		attr.rest[0] = 2 | 1<<32 // IPv4, NF_INET_LOCAL_IN
		attr.rest[1] = 1
	case attachKprobeMulti, attachKprobeSession:
		// flags, count, symbols
		symbol, _ := unix.BytePtrFromString("bpf_fentry_test1")
		symbols := &[1]*byte{symbol}
		name, list = symbol, symbols
		attr.rest[0] = 1 << 32
		attr.rest[1] = uint64(uintptr(unsafe.Pointer(symbols)))
	case attachUprobeMulti, attachUprobeSession:
		// path, offsets, ref_ctr_offsets, cookies, count, flags, pid
		path, _ := unix.BytePtrFromString("/proc/self/exe")
		offsets := &[1]uint64{4096}
		name, list = path, offsets
		attr.rest[0], attr.rest[1] = uint64(uintptr(unsafe.Pointer(path))), uint64(uintptr(unsafe.Pointer(offsets)))
		attr.rest[4] = 1
		if !other {
			attr.rest[5] = uint64(os.Getpid())
		}
	}
	fd, err := call(28, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	_, _ = name, list // the kernel's pointers aren't the collector's
	return fd, err
}

// enumOf reads the values of one of the kernel's enums.
func enumOf(t *testing.T, types *btf.Spec, name, prefix string) (values map[uint32]string) {
	t.Helper()
	var e *btf.Enum
	if err := types.TypeByName(name, &e); err != nil {
		t.Fatal(err)
	}
	values = map[uint32]string{}
	for _, v := range e.Values {
		short, ok := strings.CutPrefix(v.Name, prefix)
		if _, seen := values[uint32(v.Value)]; ok && !seen {
			values[uint32(v.Value)] = strings.ToLower(short)
		}
	}
	return values
}

// inMemory is a file for what is too much for a message.
func inMemory(t *testing.T, content any) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("matrix", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "matrix")
	t.Cleanup(func() { f.Close() })
	if content != nil {
		if err := json.NewEncoder(f).Encode(content); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// onCells has a process do something for each cell, and returns its results.
func onCells(t *testing.T, p *testtarget.Process, op string, args []string, cells []cell, files ...*os.File) [][]int {
	t.Helper()
	out := inMemory(t, nil)
	if _, _, err := p.Do(op, args, append([]*os.File{inMemory(t, cells), out}, files...)...); err != nil {
		t.Fatalf("cannot do %s: %v", op, err)
	}
	if _, err := out.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	var results [][]int
	if err := json.NewDecoder(out).Decode(&results); err != nil {
		t.Fatal(err)
	}
	return results
}

// anyProfile delegates what a profile can delegate.
func anyProfile(t *testing.T, reach string) *profile.Profile {
	t.Helper()
	dir := t.TempDir()
	text := "[Profile]\nDescription=All\n[Delegate]\nCommands=any\nMaps=any\nPrograms=any\nAttachments=any\n"
	if reach != "none" {
		text += "[Attach]\nInterfaces=" + reach + "\nCgroups=" + reach + "\nProcesses=" + reach + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "any.profile"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	p, err := profile.Load(config.Dirs{Etc: dir}).Get("any")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bindTo binds a profile to a new file system of a process's, with the masks
// that the profile has.
func bindTo(t *testing.T, g *Guard, p *testtarget.Process, profile *profile.Profile) (id uint64, mount *os.File) {
	t.Helper()
	lastID++
	id = lastID
	mount = filesystemWith(t, p, testtarget.Alice, kernel.Delegation{
		Commands: uint64(profile.Commands), Maps: uint64(profile.Maps),
		Programs: uint64(profile.Programs), Attachments: uint64(profile.Attachments),
	})
	if err := g.Bind(id, mount, Limits{Profile: profile, Owner: testtarget.Alice}); err != nil {
		t.Fatal(err)
	}
	return id, mount
}

// matrix is what the kernel's enums and its root say of it.
type matrix struct {
	programs, attachments map[uint32]string
	cells                 []cell // that root can load in some way, by their place in the enums
	loads                 []int  // how root's load for the attach type itself ended
}

// newMatrix finds out with root what the kernel loads at all.
func newMatrix(t *testing.T) *matrix {
	t.Helper()
	types, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	m := &matrix{
		programs:    enumOf(t, types, "bpf_prog_type", "BPF_PROG_TYPE_"),
		attachments: enumOf(t, types, "bpf_attach_type", "BPF_"),
	}
	delete(m.programs, 0) // unspec
	id := func(name string, kind btf.Type) uint32 {
		all, err := types.AnyTypesByName(name)
		if err != nil {
			return 0
		}
		for _, t := range all {
			if fmt.Sprintf("%T", t) == fmt.Sprintf("%T", kind) {
				id, _ := types.TypeID(t)
				return uint32(id)
			}
		}
		return 0
	}
	tracing := map[uint32]uint32{
		attachRawTP: id("btf_trace_sched_switch", (*btf.Typedef)(nil)),
		attachIter:  id("bpf_iter_task", (*btf.Func)(nil)),
	}
	for _, a := range []uint32{attachFentry, attachFexit, attachModify, attachFsession} {
		tracing[a] = id("bpf_modify_return_test", (*btf.Func)(nil))
	}
	for _, p := range slices.Sorted(maps.Keys(m.programs)) {
		for _, a := range slices.Sorted(maps.Keys(m.attachments)) {
			c := cell{Type: p, Attach: a, Expected: a}
			switch p {
			case typeTracing:
				c.BTF = tracing[a]
			case typeLSM:
				c.BTF = id("bpf_lsm_file_receive", (*btf.Func)(nil))
			case typeStructOps:
				c.BTF = id("tcp_congestion_ops", (*btf.Struct)(nil))
			}
			m.cells = append(m.cells, c)
		}
	}
	root := testtarget.Start(t, testtarget.Attr{})
	loadable := map[uint32]cell{}
	for i, result := range onCells(t, root, "rootmatrix", nil, m.cells) {
		m.loads = append(m.loads, result[0])
		m.cells[i].Result = uint32(result[1])
		c := m.cells[i]
		if _, ok := loadable[c.Type]; !ok && result[0] == 0 {
			loadable[c.Type] = c
		}
	}
	// What isn't loaded for an attach type may still be attached as that.
	for i, c := range m.cells {
		if m.loads[i] == 0 {
			continue
		}
		if with, ok := loadable[c.Type]; ok {
			with.Attach = c.Attach
			m.cells[i] = with
		}
	}
	return m
}

func (m *matrix) name(c cell) string {
	return m.programs[c.Type] + " as " + m.attachments[c.Attach]
}

// kind is the kind of target that the profile has a program type's for.
func kind(programType uint32) int {
	p := profile.Profile{Programs: 1 << programType}
	for kind, has := range targets(&p) {
		if has {
			return kind
		}
	}
	return len(targets(&p)) // own sockets
}

// TestMatrixLoad has a grant of all and grants of all but one load everything.
func TestMatrixLoad(t *testing.T) {
	g := open(t)
	m := newMatrix(t)
	target := testtarget.New(t, testtarget.Alice)
	all := anyProfile(t, "any")
	var ids []uint64
	add := func(n uint32, programs, attachments profile.Mask) {
		p := *all
		p.Programs, p.Attachments = programs, attachments
		id, mount := bindTo(t, g, target, &p)
		ids = append(ids, id)
		if _, _, err := target.Do("addtoken", []string{strconv.Itoa(int(n))}, mount); err != nil {
			t.Fatal(err)
		}
		_ = mount.Close()
	}
	add(0, all.Programs, all.Attachments)
	for p := range m.programs {
		add(1+p, all.Programs&^(1<<p), all.Attachments)
	}
	for a := range m.attachments {
		add(1+64+a, all.Programs, all.Attachments&^(1<<a))
	}
	t.Cleanup(func() {
		_, _, _ = target.Do("droptokens", nil)
		testtarget.Eventually(t, "the grants are released", func() bool {
			left, err := g.Release(ids...)
			if err != nil {
				t.Fatal(err)
			}
			return len(left) == 0
		})
	})
	var own []cell // loaded for the attach type itself
	refused := map[string]int{}
	for i, c := range m.cells {
		if m.loads[i] == 0 {
			own = append(own, c)
		} else {
			refused[fmt.Sprintf("%s %v", m.programs[c.Type], syscall.Errno(m.loads[i]))]++
		}
	}
	counts := map[string]int{}
	for i, results := range onCells(t, target, "loadmatrix", nil, own) {
		c := own[i]
		// What it is loaded for when that isn't said (bpf_prog_load_fixup_attach_type).
		as := c.Attach
		if instead, ok := map[uint32]uint32{9: 2, 21: 39}[c.Type]; ok && as == 0 {
			as = instead
		}
		delegated := all.Programs.Has(int(c.Type)) && all.Attachments.Has(int(as))
		for j, want := range []bool{delegated, false, delegated && as != c.Attach} {
			if got := results[j]; (got == 0) != want || !want && got != int(unix.EPERM) {
				t.Errorf("%s, %s: got %v, delegated %t", m.name(c), []string{"everything", "not the program type", "not the attach type"}[j], syscall.Errno(got), want)
			}
			counts[fmt.Sprintf("delegated %t: %v", want, syscall.Errno(results[j]))]++
		}
	}
	fmt.Printf("matrix: %d program types × %d attach types = %d, of which root loads %d; by %d grants: %v\n",
		len(m.programs), len(m.attachments), len(m.cells), len(own), len(ids), counts)
	for _, line := range slices.Sorted(maps.Keys(refused)) {
		fmt.Printf("matrix: root can't load %s, for %d attach types\n", line, refused[line])
	}
}

// TestMatrixAttach has grants of each reach attach everything in every way, on
// the host and in a network namespace of their own, beside root that does.
func TestMatrixAttach(t *testing.T) {
	g := open(t)
	m := newMatrix(t)
	own, _ := cgroup(t, "matrix", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	hostNet := openFile(t, "/proc/self/ns/net")
	sockmap, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer sockmap.Close()
	tracepoint := tracepointID(t, "sched/sched_switch")
	// An lsm_cgroup program crashes kernels, so not even root attaches one.
	cells := slices.DeleteFunc(slices.Clone(m.cells), func(c cell) bool { return c.Attach == attachLSMCgroup && c.Type == typeLSM })
	try := func(p *testtarget.Process, where string, cells []cell) [][]int {
		t.Helper()
		net := openFile(t, fmt.Sprintf("/proc/%d/ns/net", p.PID))
		files := []*os.File{
			own, root, net, hostNet,
			perfEvent(t, p, unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_CPU_CLOCK),
			perfEvent(t, p, unix.PERF_TYPE_TRACEPOINT, uint64(tracepoint)),
			testtarget.Dup(t, sockmap.FD()),
		}
		defer files[len(files)-1].Close()
		return onCells(t, p, "attachmatrix", []string{where}, cells, files...)
	}
	const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	controls := map[string]map[cell][]int{}
	for where, flags := range map[string]uintptr{"host": 0, "own": unix.CLONE_NEWNET} {
		controls[where] = map[cell][]int{}
		for i, results := range try(testtarget.Start(t, testtarget.Attr{Namespaces: flags}), where, cells) {
			controls[where][cells[i]] = results
		}
	}
	table := map[uint32]map[string]int{}
	for _, reach := range []profile.Reach{profile.ReachNone, profile.ReachOwn, profile.ReachAny} {
		for where, flags := range map[string]uintptr{"host": 0, "own": unix.CLONE_NEWNET} {
			target := testtarget.NewWith(t, testtarget.Alice, namespaces|flags, testtarget.Root)
			all := anyProfile(t, reach.String())
			id, mount := bindTo(t, g, target, all)
			if _, _, err := target.Do("token", nil, mount); err != nil {
				t.Fatal(err)
			}
			// What not even root can attach is tried where nothing is confined.
			tried := cells
			if reach != profile.ReachAny || where == "host" {
				tried = slices.DeleteFunc(slices.Clone(cells), func(c cell) bool { return !slices.Contains(controls[where][c][:loaded], 0) })
			}
			for i, results := range try(target, where, tried) {
				c := tried[i]
				controls := controls[where][c]
				row := table[c.Type]
				if row == nil {
					row = map[string]int{}
					table[c.Type] = row
				}
				if want := all.Programs.Has(int(c.Type)) && all.Attachments.Has(int(c.Expected)); results[loaded] != 0 {
					row["not loaded"]++
					if controls[loaded] == 0 && want {
						t.Errorf("%s, %s network: %v, but it is delegated", m.name(c), where, syscall.Errno(results[loaded]))
					}
					continue
				}
				for way, got := range results[:loaded] {
					control := controls[way]
					if got == untried && control == untried {
						continue
					}
					want := allowed(c, way, reach, where)
					switch {
					case control != 0:
						row["not even root"]++
						if got == 0 {
							t.Errorf("%s, way %d, reach %v, %s network: attached, which root can't: %v", m.name(c), way, reach, where, syscall.Errno(control))
						}
					case want && got == 0:
						row["attached "+reach.String()]++
					case !want && got == int(unix.EPERM):
						row["refused "+reach.String()]++
					default:
						t.Errorf("%s, way %d, reach %v, %s network: got %v, allowed %t", m.name(c), way, reach, where, syscall.Errno(got), want)
					}
				}
			}
			expect(t, target, 0, "dropall", nil)
			target.Kill()
			release(t, id)
		}
	}
	fmt.Printf("matrix: %-24s %10s %10s %10s   attached/refused by reach\n", "", "none", "own", "any")
	for _, p := range slices.Sorted(maps.Keys(table)) {
		row := table[p]
		fmt.Printf("matrix: %-24s", m.programs[p])
		for _, reach := range []string{"none", "own", "any"} {
			fmt.Printf(" %10s", fmt.Sprintf("%d/%d", row["attached "+reach], row["refused "+reach]))
		}
		fmt.Printf("   root can't: %d, not loaded: %d\n", row["not even root"], row["not loaded"])
	}
}

// allowed says what the profile's [Attach] means for a program that the kernel
// would attach.
func allowed(c cell, way int, reach profile.Reach, where string) bool {
	kind := kind(c.Type)
	if kind == len(targets(&profile.Profile{})) || reach == profile.ReachAny {
		return true
	}
	if reach == profile.ReachNone {
		return false
	}
	switch way {
	case linkOwn:
		return true
	case attachOwn:
		// PROG_ATTACH shows no cgroup to the guard.
		return kind == 0
	}
	return false
}

func tracepointID(t *testing.T, name string) int {
	t.Helper()
	if err := unix.Mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, ""); err != nil && err != unix.EBUSY {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/sys/kernel/tracing/events/" + name + "/id")
	if err != nil {
		t.Fatal(err)
	}
	id, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func perfEvent(t *testing.T, p *testtarget.Process, kind uint32, config uint64) *os.File {
	t.Helper()
	attr := unix.PerfEventAttr{Type: kind, Config: config, Sample: 1_000_000, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}
	fd, err := unix.PerfEventOpen(&attr, p.PID, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "event")
	t.Cleanup(func() { f.Close() })
	return f
}
