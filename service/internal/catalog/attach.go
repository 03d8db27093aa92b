// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// attachment is one link to be made.
type attachment struct {
	// name is the link's, program the program's name in the ELF file.
	name, program string
	kind          kind
	// target is as it is written, or as the ELF file has it.
	target string
	attach ebpf.AttachType
}

// kind is a way to attach.
type kind string

const (
	xdp           kind = "xdp"
	tcx           kind = "tcx"
	tracepoint    kind = "tracepoint"
	rawTracepoint kind = "raw_tracepoint"
	tracing       kind = "tracing"
	lsm           kind = "lsm"
	iterator      kind = "iter"
	kprobe        kind = "kprobe"
	kretprobe     kind = "kretprobe"
	kprobeMulti   kind = "kprobe_multi"
	uprobe        kind = "uprobe"
	uretprobe     kind = "uretprobe"
	sampling      kind = "perf_event"
	cgroup        kind = "cgroup"
)

// kindOf says how programs of a type are attached, and whether each target is a
// link of its own; "" is not at all.
func kindOf(p *ebpf.ProgramSpec) kind {
	section, _, _ := strings.Cut(p.SectionName, "/")
	switch p.Type {
	case ebpf.XDP:
		return xdp
	case ebpf.SchedCLS:
		if p.AttachType == ebpf.AttachTCXIngress || p.AttachType == ebpf.AttachTCXEgress {
			return tcx
		}
	case ebpf.TracePoint:
		return tracepoint
	case ebpf.RawTracepoint, ebpf.RawTracepointWritable:
		return rawTracepoint
	case ebpf.Tracing:
		if p.AttachType == ebpf.AttachTraceIter {
			return iterator
		}
		return tracing
	case ebpf.LSM:
		// Linux 6.16 and 6.18 have a bug that programs for control groups run into.
		if p.AttachType == ebpf.AttachLSMMac {
			return lsm
		}
	case ebpf.Kprobe:
		switch section {
		case "kprobe":
			return kprobe
		case "kretprobe":
			return kretprobe
		case "kprobe.multi", "kretprobe.multi":
			return kprobeMulti
		case "uprobe", "uprobe.s":
			return uprobe
		case "uretprobe", "uretprobe.s":
			return uretprobe
		}
	case ebpf.PerfEvent:
		return sampling
	case ebpf.CGroupSKB, ebpf.CGroupSock, ebpf.CGroupSockAddr, ebpf.SockOps, ebpf.CGroupDevice, ebpf.CGroupSysctl, ebpf.CGroupSockopt:
		return cgroup
	}
	return ""
}

// attachments says what is attached where, and puts into spec what has to be
// known when a program is loaded.
func attachments(o *Object, spec *ebpf.CollectionSpec) ([]attachment, error) {
	said := map[string]*Program{}
	for _, p := range o.Programs {
		said[p.From] = p
	}
	var all []attachment
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		program := spec.Programs[name]
		k := kindOf(program)
		var targets []string
		if p := said[name]; p != nil && p.Attach != nil {
			targets = p.Attach
		} else if program.AttachTo != "" && k != "" && k != xdp && k != tcx && k != cgroup && k != sampling {
			targets = []string{program.AttachTo}
		}
		if len(targets) > 0 && k == "" {
			return nil, fmt.Errorf("cannot attach the program %s of section %q: that kind of program isn't known here", name, program.SectionName)
		}
		for _, target := range targets {
			if err := checkTarget(k, target); err != nil {
				return nil, fmt.Errorf("cannot attach the program %s to %.64q: %w", name, target, err)
			}
		}
		switch k {
		case tracing, lsm, iterator:
			if len(targets) > 1 {
				return nil, fmt.Errorf("cannot attach the program %s to more than one target: it is loaded for one", name)
			}
			if len(targets) == 1 {
				program.AttachTo = targets[0]
			}
		case kprobeMulti:
			if len(targets) > 0 {
				targets = []string{strings.Join(targets, " ")}
			}
		case sampling:
			var err error
			if targets, err = onEachCPU(targets); err != nil {
				return nil, err
			}
		}
		for i, target := range targets {
			a := attachment{name: name, program: name, kind: k, target: target, attach: program.AttachType}
			if len(targets) > 1 {
				a.name = name + "-" + strconv.Itoa(i+1)
			}
			all = append(all, a)
		}
	}
	return all, nil
}

// checkTarget looks at how a target is written, and not at whether it is there.
func checkTarget(k kind, target string) error {
	switch k {
	case xdp, tcx:
		if len(target) > 15 || strings.Contains(target, "/") {
			return errors.New("that is no name of an interface")
		}
	case tracepoint:
		if group, name, ok := strings.Cut(target, "/"); !ok || group == "" || name == "" {
			return errors.New("a tracepoint is GROUP/NAME")
		}
	case uprobe, uretprobe:
		if file, symbol, ok := cutLast(target, ":"); !ok || !path.IsAbs(file) || symbol == "" {
			return errors.New("a uprobe is /FILE:SYMBOL or /FILE:SYMBOL+OFFSET")
		}
	case sampling:
		if _, err := frequency(target); err != nil {
			return err
		}
	case cgroup:
		if !path.IsAbs(target) || path.Clean(target) != target {
			return errors.New("a control group is an absolute path from the hierarchy's root")
		}
	}
	return nil
}

// maxFrequency is the highest rate of samples, which takes some hundredths of
// each processor.
const maxFrequency = 10000

// frequency reads "99Hz".
func frequency(target string) (uint64, error) {
	number, ok := strings.CutSuffix(target, "Hz")
	n, err := strconv.ParseUint(number, 10, 64)
	if !ok || err != nil || n == 0 || n > maxFrequency {
		return 0, fmt.Errorf("a rate of samples is 1Hz to %dHz", maxFrequency)
	}
	return n, nil
}

// onEachCPU makes a target for each processor: "99Hz" becomes "99Hz cpu0" and so
// on.
func onEachCPU(targets []string) ([]string, error) {
	if len(targets) == 0 {
		return nil, nil
	}
	cpus, err := kernel.OnlineCPUs()
	if err != nil {
		return nil, err
	}
	var all []string
	for _, target := range targets {
		for _, cpu := range cpus {
			all = append(all, fmt.Sprintf("%s cpu%d", target, cpu))
		}
	}
	return all, nil
}

// onInterface says whether a's target is an interface, which comes and goes.
func (a attachment) onInterface() bool { return a.kind == xdp || a.kind == tcx }

// errNoInterface means that an interface isn't there now.
var errNoInterface = errors.New("there is no such interface")

func interfaceIndex(name string) (int, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0, errNoInterface
	}
	return i.Index, nil
}

// make makes the link. The caller closes it.
func (a attachment) make(p *ebpf.Program) (link.Link, error) {
	switch a.kind {
	case xdp, tcx:
		index, err := interfaceIndex(a.target)
		if err != nil {
			return nil, err
		}
		if a.kind == xdp {
			return link.AttachXDP(link.XDPOptions{Program: p, Interface: index})
		}
		return link.AttachTCX(link.TCXOptions{Program: p, Interface: index, Attach: a.attach})
	case tracepoint:
		group, name, _ := strings.Cut(a.target, "/")
		return link.Tracepoint(group, name, p, nil)
	case rawTracepoint:
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: a.target, Program: p})
	case tracing:
		return link.AttachTracing(link.TracingOptions{Program: p, AttachType: a.attach})
	case lsm:
		return link.AttachLSM(link.LSMOptions{Program: p})
	case iterator:
		return link.AttachIter(link.IterOptions{Program: p})
	case kprobe, kretprobe:
		symbol, offset, err := cutOffset(a.target)
		if err != nil {
			return nil, err
		}
		if a.kind == kprobe {
			return link.Kprobe(symbol, p, &link.KprobeOptions{Offset: offset})
		}
		return link.Kretprobe(symbol, p, &link.KprobeOptions{Offset: offset})
	case kprobeMulti:
		return link.KprobeMulti(p, link.KprobeMultiOptions{Symbols: strings.Fields(a.target)})
	case uprobe, uretprobe:
		file, symbol, _ := cutLast(a.target, ":")
		symbol, offset, err := cutOffset(symbol)
		if err != nil {
			return nil, err
		}
		executable, err := link.OpenExecutable(file)
		if err != nil {
			return nil, err
		}
		if a.kind == uprobe {
			return executable.Uprobe(symbol, p, &link.UprobeOptions{Offset: offset})
		}
		return executable.Uretprobe(symbol, p, &link.UprobeOptions{Offset: offset})
	case sampling:
		return a.sample(p)
	case cgroup:
		root, err := kernel.CgroupRoot()
		if err != nil {
			return nil, err
		}
		return link.AttachCgroup(link.CgroupOptions{Path: path.Join(root, a.target), Attach: a.attach, Program: p})
	}
	return nil, fmt.Errorf("cannot attach by %q", a.kind)
}

// sample attaches to a clock of one processor.
func (a attachment) sample(p *ebpf.Program) (link.Link, error) {
	rate, cpu, _ := strings.Cut(a.target, " cpu")
	hertz, err := frequency(rate)
	if err != nil {
		return nil, err
	}
	number, err := strconv.Atoi(cpu)
	if err != nil {
		return nil, err
	}
	event, err := kernel.OpenSampling(number, hertz)
	if err != nil {
		return nil, err
	}
	// The link holds the event from here on.
	defer event.Close()
	return link.AttachRawLink(link.RawLinkOptions{Target: int(event.Fd()), Program: p, Attach: ebpf.AttachPerfEvent})
}

// cutOffset cuts SYMBOL+OFFSET.
func cutOffset(target string) (symbol string, offset uint64, err error) {
	symbol, text, found := strings.Cut(target, "+")
	if found {
		if offset, err = strconv.ParseUint(text, 0, 64); err != nil {
			return "", 0, fmt.Errorf("%.64q is no offset", text)
		}
	}
	return symbol, offset, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
