// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

// The tests' host has neither kprobes nor trampolines.

package catalog

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// Where the ELF file says what a program is for, the object need not.
func TestProbes(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("probes", "[Object]\nFile=ELF/probes.bpf.o\n[Map hits]\nAccess=read-only\n")
	for _, again := range []bool{false, true} {
		if again {
			f.again()
		}
		for kind := range uint32(6) {
			f.hits("probes", kind+1, func() { run(t, "sleep", "0.01") })
		}
	}
	d, err := f.Describe("probes")
	f.check(err)
	want := []LinkInfo{
		{"on_btf", "on_btf", "tracing", "sys_enter", true},
		{"on_fentry", "on_fentry", "tracing", "do_nanosleep", true},
		{"on_fexit", "on_fexit", "tracing", "do_nanosleep", true},
		{"on_iter", "on_iter", "iter", "task", true},
		{"on_kprobe", "on_kprobe", "kprobe", "do_nanosleep", true},
		{"on_kretprobe", "on_kretprobe", "kretprobe", "do_nanosleep", true},
		{"on_multi", "on_multi", "kprobe_multi", "do_nanosleep", true},
	}
	if diff := cmp.Diff(want, d.Links); diff != "" {
		t.Error(diff)
	}
	// Another function, said by the object.
	f.object("probes", "[Object]\nFile=ELF/probes.bpf.o\n[Map hits]\nAccess=read-only\n[Program on_fentry]\nAttach=hrtimer_nanosleep\n[Program on_kprobe]\nAttach=hrtimer_nanosleep+0x0\n[Program on_multi]\nAttach=do_nanosleep hrtimer_nanosleep\n")
	f.hits("probes", 1, func() { time.Sleep(time.Millisecond); run(t, "sleep", "0.01") })
	f.hits("probes", 4, func() { run(t, "sleep", "0.01") })
}
