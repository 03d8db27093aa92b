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
	"runtime"
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
	typeKprobe       = 2
	typeSchedAct     = 4
	typeLWTIn        = 10
	typeLWTOut       = 11
	typeLWTXmit      = 12
	typeLWTSeg6Local = 19
	typeLirc         = 20
	typeSKReuseport  = 21
	typeTracing      = 26
	typeStructOps    = 27
	typeExt          = 28
	typeLSM          = 29
	typeSyscall      = 31

	attachLirc          = 16
	attachFlowDissector = 17
	attachRawTP         = 23
	attachFentry        = 24
	attachFexit         = 25
	attachModify        = 26
	attachLSM           = 27
	attachIter          = 28
	attachXDPDevmap     = 33
	attachXDPCPUMap     = 35
	attachKprobeMulti   = 42
	attachLSMCgroup     = 43
	attachStructOps     = 44
	attachTCXEgress     = 47
	attachUprobeMulti   = 48
	attachNetkit        = 54
	attachNetkitPeer    = 55
	attachKprobeSession = 56
	attachUprobeSession = 57
	attachFsession      = 58
	attachFentryMulti   = 59
	attachFsessionMulti = 61
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
	Function uint32 // of what a tracing_multi link is for
	First    bool   // of those that root loads, among a type's
	// Congestion is for struct_ops as such.
	Congestion *congestion
}

func (c cell) program() program {
	p := program{Type: c.Type, Attach: c.Expected, BTF: c.BTF, Instructions: []uint64{uint64(c.Result)<<32 | 0xb7, exit}}
	if c.Type == typeSyscall {
		p.Flags = 1 << 4 // BPF_F_SLEEPABLE
	}
	return p
}

// The ways to attach a program, to what is the grant's own and to what isn't.
const (
	linkOwn = iota
	linkOther
	updateOwn // the link that was made
	updateOther
	attachOwn
	attachOther
	ioctlOwn
	ioctlOther
	openRawTP
	intoMap
	toSocket
	byNetlink
	run
	loaded // no way: whether there is anything to attach
	ways
)

var wayNames = [...]string{
	"link to own", "link to other", "update of own link", "update of other link", "attach to own", "attach to other",
	"ioctl of own event", "ioctl of other event", "raw tracepoint", "own map", "own socket", "netlink", "run",
}

// untried is the result of what makes no sense to try.
const untried = -1

// targets of the matrix, as they come to a process's operation.
const (
	fileCells = iota
	fileResults
	fileProgram // with a function that can be replaced
	fileCgroup
	fileRootCgroup
	fileNet // owned, if the process has one
	fileHostNet
	fileEvent
	fileTracepoint
	fileKprobe
	fileSockmap
	// Of a congestion control: to be linked, linked, and to take the linked one's place.
	fileMap
	fileLinkedMap
	fileLink
	fileNewMap
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
	ops["rootmatrix"] = matrixOp(func(c cell, _ []string, files []*os.File) (answer []int) {
		for _, c.Result = range []uint32{1, 0, 2} {
			if answer = []int{loadCell(c, files), int(c.Result)}; answer[0] == 0 {
				break
			}
		}
		return answer
	})
	// loadmatrix CELLS RESULTS: loads each with the first token, with the one
	// that lacks its program type, and the one that lacks its attach type.
	ops["loadmatrix"] = matrixOp(func(c cell, _ []string, files []*os.File) (results []int) {
		for _, i := range []uint32{0, 1 + c.Type, 1 + 64 + c.Attach} {
			held.token = matrixTokens[i]
			results = append(results, loadCell(c, files))
		}
		held.token = nil
		return results
	})
	// attachmatrix HOST CELLS RESULTS …: attaches each in all ways.
	ops["attachmatrix"] = matrixOp(tryCell)
	// equip: see equipNetwork.
	ops["equip"] = func([]string, []*os.File) (string, []*os.File, error) { return "", nil, equipNetwork() }
}

// matrixTokens are a token for everything, and from 1 and 65 on those that lack
// the program type or the attach type of that number.
var matrixTokens = map[uint32]*os.File{}

func loadCell(c cell, files []*os.File) int {
	fd, err := openCell(c, files)
	if err == nil {
		_ = unix.Close(fd)
	}
	return number0(err)
}

// openCell loads a cell's program.
func openCell(c cell, files []*os.File) (int, error) {
	p := c.program()
	if c.Type == typeExt {
		types, err := typedTypes()
		if err != nil {
			return -1, err
		}
		defer unix.Close(types)
		p.Types, p.Target = uint32(types), uint32(files[fileProgram].Fd())
	}
	return load(p)
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
	p, err := openCell(c, files)
	results[loaded] = number0(err)
	if err != nil {
		return results
	}
	defer unix.Close(p)
	if c.Congestion != nil {
		tryCongestion(*c.Congestion, files, results)
		return results
	}
	onHost := args[0] == "host"
	for _, other := range []bool{false, true} {
		link, update, attach := linkOwn, updateOwn, attachOwn
		if other {
			link, update, attach = linkOther, updateOther, attachOther
		}
		target, ok := matrixTarget(c, other, onHost, files)
		if !ok {
			continue
		}
		fd, err := linkCell(c, uint32(p), target, other)
		if results[link] = number0(err); err == nil {
			err = updateLink(fd, p)
			_ = unix.Close(fd)
		}
		results[update] = number0(err)
		attr := struct{ target, program, kind, flags, replace uint32 }{target, uint32(p), c.Attach, 0, 0}
		_, err = call(8, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		if results[attach] = number0(err); err == nil {
			if _, err := call(9, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
				panic(fmt.Sprintf("cannot detach %+v: %v", c, err))
			}
		}
	}
	if typed := c.Type == typeTracing || c.Type == typeLSM || c.Type == typeExt; typed || c.First {
		name := "sys_enter"
		if typed {
			name = ""
		}
		fd, err := openRaw(uint32(p), name)
		if err == nil {
			_ = unix.Close(fd)
		}
		results[openRawTP] = number0(err)
	}
	if c.Attach == attachPerfEvent {
		// Events keep what they are given.
		for way, other := range map[int]bool{ioctlOwn: false, ioctlOther: true} {
			event, _ := matrixTarget(c, other, onHost, files)
			results[way] = number0(unix.IoctlSetInt(int(event), unix.PERF_EVENT_IOC_SET_BPF, p))
		}
	}
	if c.Attach != c.Expected {
		return results
	}
	switch {
	case c.Type == typeXDP && c.Attach == attachXDPDevmap:
		results[intoMap] = number0(putIntoMap(mapDevmap, p))
	case c.Type == typeXDP && c.Attach == attachXDPCPUMap:
		results[intoMap] = number0(putIntoMap(mapCPUMap, p))
	case c.Type == typeSKReuseport:
		results[toSocket] = number0(attachToSocket(p, unix.SO_ATTACH_REUSEPORT_EBPF))
	}
	if !c.First {
		return results
	}
	// These know of no attach types.
	switch c.Type {
	case typeSocketFilter:
		results[toSocket] = number0(attachToSocket(p, unix.SO_ATTACH_BPF))
	case typeXDP, typeSchedCLS, typeSchedAct, typeLWTIn, typeLWTOut, typeLWTXmit, typeLWTSeg6Local:
		results[byNetlink] = number0(attachByNetlink(c.Type, p))
	}
	if err = testRun(uint32(p), 64); err != nil {
		err = testRun(uint32(p), 0)
	}
	results[run] = number0(err)
	return results
}

// tryCongestion is tryCell for struct_ops, where it is maps that are attached.
// An own map is one that the process makes, others are made for it.
func tryCongestion(c congestion, files []*os.File, results []int) {
	linked := func(make func() (int, error)) int {
		fd, err := make()
		if err != nil {
			return number0(err)
		}
		defer unix.Close(fd)
		link, err := linkMap(fd)
		if err == nil {
			_ = unix.Close(link)
		}
		return number0(err)
	}
	results[linkOwn] = linked(func() (int, error) { return c.make("hostile") })
	results[linkOther] = linked(func() (int, error) { return dup(int(files[fileMap].Fd())), nil })
	results[intoMap] = number0(c.register())
	link := int(files[fileLink].Fd())
	err := updateLink(link, int(files[fileNewMap].Fd()))
	if results[updateOther] = number0(err); err == nil {
		if err := updateLink(link, int(files[fileLinkedMap].Fd())); err != nil {
			panic(err)
		}
	}
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
	if c.Type == typeExt {
		if other {
			return uint32(files[fileProgram].Fd()), true
		}
		return uint32(replaceable()), true
	}
	switch c.Attach {
	case attachXDP, attachTCXIngress, attachTCXEgress, attachNetfilter:
		return 1, other == onHost // of the process's network namespace
	case attachNetkit, attachNetkitPeer:
		return netkit(), other == onHost
	case attachFlowDissector, attachSKLookup:
		if !other && onHost {
			return 0, false
		}
		return pick(fileNet, fileHostNet)
	case attachPerfEvent:
		if c.Type == typeKprobe {
			return pick(fileEvent, fileKprobe)
		}
		return pick(fileEvent, fileTracepoint)
	case 4, 5, 7, 38: // sk_skb_…, sk_msg_verdict
		return uint32(files[fileSockmap].Fd()), !other
	case attachUprobeMulti, attachUprobeSession:
		return 0, true
	case attachRawTP, attachFentry, attachFexit, attachModify, attachLSM, attachIter, attachKprobeMulti, attachKprobeSession, attachFsession,
		attachFentryMulti, attachFentryMulti + 1, attachFsessionMulti:
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
	var pointers [2]any // the kernel's pointers aren't the collector's
	pointer := func(i int, p any, address unsafe.Pointer) {
		pointers[i] = p
		attr.rest[i] = uint64(uintptr(address))
	}
	switch c.Attach {
	case attachNetfilter:
		attr.target = 0
		attr.rest[0] = 2 | 1<<32 // IPv4, NF_INET_LOCAL_IN
		attr.rest[1] = 1
	case attachKprobeMulti, attachKprobeSession:
		// flags, count, symbols
		symbol, _ := unix.BytePtrFromString("bpf_fentry_test1")
		symbols := &[1]*byte{symbol}
		pointer(1, symbols, unsafe.Pointer(symbols))
		attr.rest[0] = 1 << 32
	case attachUprobeMulti, attachUprobeSession:
		// path, offsets, ref_ctr_offsets, cookies, count, flags, pid
		path, _ := unix.BytePtrFromString("/proc/self/exe")
		offsets := &[1]uint64{4096}
		pointer(0, path, unsafe.Pointer(path))
		pointer(1, offsets, unsafe.Pointer(offsets))
		attr.rest[4] = 1
		if !other {
			attr.rest[5] = uint64(os.Getpid())
		}
	case attachFentryMulti, attachFentryMulti + 1, attachFsessionMulti:
		// ids, cookies, count
		ids := &[1]uint32{c.Function}
		pointer(0, ids, unsafe.Pointer(ids))
		attr.rest[2] = 1
	}
	if c.Type == typeExt {
		attr.rest = [6]uint64{typedFunction}
	}
	fd, err := call(28, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(pointers)
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
	program               *os.File
	congestion            *congestion
	lirc                  bool // the kernel has receivers to attach to
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
	m.lirc = id("lirc_prog_attach", (*btf.Func)(nil)) != 0
	congestion := findCongestion(t, types)
	m.congestion = &congestion
	program, err := loadReplaceable()
	if err != nil {
		t.Fatal(err)
	}
	m.program = os.NewFile(uintptr(program), "program")
	t.Cleanup(func() { m.program.Close() })
	tracing := map[uint32]uint32{
		attachRawTP: id("btf_trace_sched_switch", (*btf.Typedef)(nil)),
		attachIter:  id("bpf_iter_task", (*btf.Func)(nil)),
	}
	for _, a := range []uint32{attachFentry, attachFexit, attachModify, attachFsession} {
		tracing[a] = id("bpf_modify_return_test", (*btf.Func)(nil))
	}
	for _, p := range slices.Sorted(maps.Keys(m.programs)) {
		for _, a := range slices.Sorted(maps.Keys(m.attachments)) {
			c := cell{Type: p, Attach: a, Expected: a, Function: id("bpf_fentry_test1", (*btf.Func)(nil))}
			switch p {
			case typeTracing:
				c.BTF = tracing[a]
			case typeLSM:
				c.BTF = id("bpf_lsm_file_receive", (*btf.Func)(nil))
			case typeStructOps:
				c.BTF = congestion.Type
			case typeExt:
				c.BTF = typedFunction
			}
			m.cells = append(m.cells, c)
		}
	}
	root := testtarget.Start(t, testtarget.Attr{})
	loadable := map[uint32]cell{}
	for i, result := range onCells(t, root, "rootmatrix", nil, m.cells, m.program) {
		m.loads = append(m.loads, result[0])
		m.cells[i].Result = uint32(result[1])
		c := m.cells[i]
		if _, ok := loadable[c.Type]; !ok && result[0] == 0 {
			loadable[c.Type] = c
			m.cells[i].First = true
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
	for i, c := range m.cells {
		if c.Type == typeStructOps && c.Attach == attachStructOps {
			m.cells[i].Congestion = m.congestion
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
	for i, results := range onCells(t, target, "loadmatrix", nil, own, m.program) {
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
	loadModules(t)
	own, _ := cgroup(t, "matrix", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	hostNet := openFile(t, "/proc/self/ns/net")
	sockmap, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer sockmap.Close()
	tracepoint := tracepointID(t, "sched/sched_switch")
	congestions := m.congestions(t)
	// An lsm_cgroup program crashes kernels, so not even root attaches one.
	cells := slices.DeleteFunc(slices.Clone(m.cells), func(c cell) bool { return c.Attach == attachLSMCgroup && c.Type == typeLSM })
	try := func(p *testtarget.Process, where string, cells []cell) [][]int {
		t.Helper()
		events := []*os.File{
			perfEvent(t, p, unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_CPU_CLOCK),
			perfEvent(t, p, unix.PERF_TYPE_TRACEPOINT, uint64(tracepoint)),
			kprobeEvent(t, p),
		}
		defer func() {
			for _, f := range events {
				_ = f.Close() // and with it what was attached to it
			}
		}()
		if where == "own" {
			p.Must("equip")
		}
		files := slices.Concat(
			[]*os.File{m.program, own, root, openFile(t, fmt.Sprintf("/proc/%d/ns/net", p.PID)), hostNet}, events,
			[]*os.File{testtarget.Dup(t, sockmap.FD())}, congestions)
		return onCells(t, p, "attachmatrix", []string{where}, cells, files...)
	}
	const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	controls := map[string]map[cell][]int{}
	testtarget.Start(t, testtarget.Attr{}).Must("equip")
	for where, flags := range map[string]uintptr{"host": 0, "own": unix.CLONE_NEWNET} {
		controls[where] = map[cell][]int{}
		for i, results := range try(testtarget.Start(t, testtarget.Attr{Namespaces: flags}), where, cells) {
			controls[where][cells[i]] = results
		}
	}
	m.checkCovered(t, controls)
	table := map[uint32]map[string]int{}
	verdicts := 0
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
					verdicts++
					want := allowed(c, way, reach, where)
					switch {
					case control != 0:
						row["not even root"]++
						if got == 0 {
							t.Errorf("%s, %s, reach %v, %s network: attached, which root can't: %v", m.name(c), wayNames[way], reach, where, syscall.Errno(control))
						}
					case want && got == 0:
						row["attached "+reach.String()]++
					case !want && got == int(unix.EPERM):
						row["refused "+reach.String()]++
					default:
						t.Errorf("%s, %s, reach %v, %s network: got %v, allowed %t", m.name(c), wayNames[way], reach, where, syscall.Errno(got), want)
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
	fmt.Printf("matrix: %d tries to attach in %d ways\n", verdicts, loaded)
}

// checkCovered fails the test if there is a program type, or an attach type,
// that root has attached nowhere: whoever adds one to the kernel has it tried
// here, or proves that it can't be.
func (m *matrix) checkCovered(t *testing.T, controls map[string]map[cell][]int) {
	t.Helper()
	programs, attachments, loads := map[uint32]bool{}, map[uint32]bool{}, map[uint32]bool{}
	for _, results := range controls {
		for c, errnos := range results {
			programs[c.Type] = programs[c.Type] || slices.Contains(errnos[:loaded], 0)
			if c.Attach == c.Expected || c.Congestion != nil {
				attachments[c.Attach] = attachments[c.Attach] || slices.Contains(errnos[:run], 0)
			}
		}
	}
	for i, c := range m.cells {
		loads[c.Type] = loads[c.Type] || m.loads[i] == 0
	}
	noPrograms, noAttachments := map[uint32]string{}, map[uint32]string{attachLSMCgroup: "no profile can delegate it"} // which TestMatrixLoad sees
	if !m.lirc && !loads[typeLirc] {
		// CONFIG_BPF_LIRC_MODE2 wants infrared receivers in the kernel itself, not in a module.
		const why = "this kernel has nothing to attach it to, and root can't load one"
		noPrograms[typeLirc], noAttachments[attachLirc] = why, why
	}
	check := func(what string, names map[uint32]string, attached map[uint32]bool, not map[uint32]string) {
		n := 0
		for value, name := range names {
			switch why := not[value]; {
			case attached[value]:
				n++
			case why == "":
				t.Errorf("root has attached no %s %s", what, name)
			default:
				fmt.Printf("matrix: %s %s isn't tried: %s\n", what, name, why)
			}
		}
		fmt.Printf("matrix: root has attached %d %ss of %d\n", n, what, len(names))
	}
	check("program type", m.programs, programs, noPrograms)
	check("attach type", m.attachments, attachments, noAttachments)
}

// congestions are the maps and links of congestion controls that root makes, in
// the order in which they are passed.
func (m *matrix) congestions(t *testing.T) (files []*os.File) {
	t.Helper()
	keep := func(fd int, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "congestion")
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
		return fd
	}
	keep(m.congestion.make("rootmap"))
	linked := keep(m.congestion.make("rootlink"))
	keep(linkMap(linked))
	keep(m.congestion.make("rootlink"))
	return files
}

// allowed says what the profile's [Attach] means for a program that the kernel
// would attach.
func allowed(c cell, way int, reach profile.Reach, where string) bool {
	switch way {
	case byNetlink:
		// The kernel's to say: CAP_NET_ADMIN over the network namespace.
		return where == "own"
	case run:
		return reach == profile.ReachAny || where == "own"
	case updateOwn, updateOther, ioctlOwn, ioctlOther:
		// These show no program to the guard, and every reach confines something.
		return reach == profile.ReachAny
	case intoMap:
		// On a processor it runs for frames that another program sends there.
		return reach == profile.ReachAny || c.Attach == attachXDPCPUMap
	}
	kind := kind(c.Type)
	if kind == len(targets(&profile.Profile{})) || reach == profile.ReachAny {
		return true
	}
	if reach == profile.ReachNone {
		return false
	}
	switch way {
	case linkOwn:
		// There is no such thing as an own one for the guard.
		return c.Type != typeExt && c.Type != typeStructOps
	case attachOwn:
		// PROG_ATTACH shows no cgroup to the guard, and no netkit device.
		return kind == 0 && c.Attach != attachNetkit && c.Attach != attachNetkitPeer
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
	return openEvent(t, p, &attr)
}

// kprobeEvent is an event of a kernel function's, when the process calls it.
func kprobeEvent(t *testing.T, p *testtarget.Process) *os.File {
	t.Helper()
	text, err := os.ReadFile("/sys/bus/event_source/devices/kprobe/type")
	if err != nil {
		t.Fatal(err)
	}
	kind, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	function, _ := unix.BytePtrFromString("bpf_fentry_test1")
	attr := unix.PerfEventAttr{Type: uint32(kind), Ext1: uint64(uintptr(unsafe.Pointer(function))), Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}
	f := openEvent(t, p, &attr)
	runtime.KeepAlive(function)
	return f
}

func openEvent(t *testing.T, p *testtarget.Process, attr *unix.PerfEventAttr) *os.File {
	t.Helper()
	fd, err := unix.PerfEventOpen(attr, p.PID, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "event")
	t.Cleanup(func() { f.Close() })
	return f
}
