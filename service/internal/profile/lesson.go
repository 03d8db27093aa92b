// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"time"
)

// Lesson is what somebody used of a profile.
type Lesson struct {
	Commands, Maps, Programs, Attachments Mask
	Helpers, Kfuncs                       []string
	// ModuleKfuncs says that functions of kernel modules were called, which no
	// list can name.
	ModuleKfuncs bool
	// MaxPrograms, MaxMaps and MaxMapBytes are the most that there was at once.
	MaxPrograms, MaxMaps int
	MaxMapBytes          uint64
	// Attach is how far it was from what was attached to.
	Attach Attach
	Short  Short
}

// Short is what only programs of at most shortProgram instructions had: libraries
// try the kernel out with such, and do without what fails.
type Short struct {
	Programs, Attachments Mask
	Helpers               []string
}

// shortProgram is SHORT of guard.bpf.c.
const shortProgram = 8

const (
	// noHelper is a helper that does nothing for whoever may call it: an empty
	// list allows all.
	noHelper = "map_lookup_elem"
	// noKfunc is no function's name.
	noKfunc = "none"
	// leastObjects and leastMapBytes are the smallest quotas that are written.
	leastObjects  = 32
	leastMapBytes = 64 << 10
	// perLine is how many words of a list stand in a line.
	perLine = 8
)

// perfmonHelpers are those that the kernel gives to programs of all types if the
// token has CAP_PERFMON, and not without (bpf_base_func_proto).
var perfmonHelpers = strings.Fields(`trace_printk get_current_task get_current_task_btf probe_read_user probe_read_kernel
	probe_read_user_str probe_read_kernel_str snprintf_btf snprintf task_pt_regs trace_vprintk`)

// Text is the smallest profile that gives what was used, as a file, with a lease.
// The capabilities are those that its types and helpers ask for: a program that
// calculates with pointers in a way that takes CAP_PERFMON looks like any other.
func (l *Lesson) Text(lease time.Duration) string {
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	list := func(key string, names []string) {
		for some := range slices.Chunk(names, perLine) {
			line("%s=%s", key, strings.Join(some, " "))
		}
	}
	// spare says which of a line's words may be there for a library's tries alone.
	spare := func(names []string) {
		for some := range slices.Chunk(names, perLine) {
			line("# Perhaps not needed: %s", strings.Join(some, " "))
		}
	}
	if l.Short.Programs|l.Short.Attachments != 0 || len(l.Short.Helpers) > 0 {
		line("# \"Perhaps not needed\" is what programs of at most %d instructions alone had:\n# libraries try the kernel out with such, and do without what fails.", shortProgram)
	}
	line("[Profile]")
	if lease > 0 {
		line("Lease=%d", int(lease.Seconds()))
	}
	line("\n[Delegate]")
	if l.Commands&commands.mask("btf_load") != 0 && len(l.Kfuncs) == 0 {
		spare([]string{"btf_load"})
	}
	list("Commands", CommandNames(l.Commands))
	list("Maps", MapNames(l.Maps))
	spare(ProgramNames(l.Short.Programs))
	list("Programs", ProgramNames(l.Programs))
	attachments := l.Attachments
	if l.Programs&zeroSenders != 0 {
		attachments &^= 1 // said by the programs
	}
	spare(AttachmentNames(attachments & l.Short.Attachments))
	list("Attachments", AttachmentNames(attachments))

	line("\n[Guard]")
	capabilities := l.capabilities()
	needed := l.long().capabilities()
	spare(slices.DeleteFunc(slices.Clone(capabilities), func(c string) bool { return slices.Contains(needed, c) }))
	list("Capabilities", capabilities)
	if l.Programs != 0 {
		spare(l.Short.Helpers)
		l.calls(line, list)
	}
	// The kernel frees what was closed some time later: another run may have more
	// at once, as of the programs that libraries try the kernel out with.
	line("# There were at most %d programs, and %d maps of %d bytes in all. More is\n# allowed, for the kernel frees what is closed some time later.",
		l.MaxPrograms, l.MaxMaps, l.MaxMapBytes)
	line("MaxPrograms=%d", max(leastObjects, twice(uint64(l.MaxPrograms))))
	line("MaxMaps=%d", max(leastObjects, twice(uint64(l.MaxMaps))))
	line("MaxMapBytes=%d", max(leastMapBytes, twice(l.MaxMapBytes)))

	if l.Attach != (Attach{}) {
		line("\n[Attach]")
	}
	for _, a := range []struct {
		key   string
		reach Reach
	}{{"Interfaces", l.Attach.Interfaces}, {"Cgroups", l.Attach.Cgroups}, {"Processes", l.Attach.Processes}} {
		switch a.reach {
		case ReachAny:
			line("# Something was attached to what isn't the user's own.")
			fallthrough
		case ReachOwn:
			line("%s=%s", a.key, a.reach)
		}
	}
	return out.String()
}

// calls writes what programs called.
func (l *Lesson) calls(line func(string, ...any), list func(string, []string)) {
	if len(l.Helpers) == 0 {
		line("# No helper was called, and an empty list would allow all.")
		line("Helpers=%s", noHelper)
	}
	list("Helpers", l.Helpers)
	switch {
	case l.ModuleKfuncs:
		line("# Functions of kernel modules were called, or too many: no list of Kfuncs= can\n# allow them.")
	case len(l.Kfuncs) == 0:
		line("# No function of the kernel was called: this is the name of none.")
		line("Kfuncs=%s", noKfunc)
	default:
		list("Kfuncs", l.Kfuncs)
	}
}

// long is the lesson without what is perhaps not needed.
func (l *Lesson) long() *Lesson {
	return &Lesson{
		Maps: l.Maps, Programs: l.Programs &^ l.Short.Programs,
		Helpers: slices.DeleteFunc(slices.Clone(l.Helpers), func(h string) bool { return slices.Contains(l.Short.Helpers, h) }),
	}
}

// capabilities are those that the maps, programs and helpers need.
func (l *Lesson) capabilities() []string {
	names := (&Profile{Maps: l.Maps, Programs: l.Programs}).AmbientCapabilities()
	if !slices.Contains(names, capPerfmon) && slices.ContainsFunc(l.Helpers, func(h string) bool { return slices.Contains(perfmonHelpers, h) }) {
		names = append(names, capPerfmon)
	}
	if slices.Contains(l.Helpers, "probe_write_user") {
		names = append(names, capSysAdmin)
	}
	return names
}

// twice is at least double a number, and a power of two.
func twice(n uint64) uint64 {
	if n == 0 {
		return 1
	}
	return 1 << (bits.Len64(n-1) + 1)
}
