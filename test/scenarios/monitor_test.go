// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package scenarios

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// offer has the administrator offer profiles, and let alice have every one, until
// the test's end.
func offer(t *testing.T, profiles map[string]string) {
	t.Helper()
	script := "mkdir -p /etc/bpfbroker/profiles.d\n"
	var files []string
	for name, text := range profiles {
		file := "/etc/bpfbroker/profiles.d/" + name + ".profile"
		script += "cat >" + file + " <<'END'\n" + text + "\nEND\n"
		files = append(files, file)
	}
	const rule = "/etc/polkit-1/rules.d/01-alice.rules"
	script += "cat >" + rule + ` <<'END'
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.bpfbroker.token-") == 0 && subject.user == "alice") {
        return polkit.Result.YES;
    }
});
END
`
	const reload = "systemctl reset-failed bpfbroker.service; systemctl reload-or-restart bpfbroker.service"
	t.Cleanup(func() { must(t, "root", "rm -f "+rule+" "+strings.Join(files, " ")+"; "+reload) })
	must(t, "root", script+reload)
}

// monitor runs bpfbroker monitor until the test's end, and returns what it prints.
func monitor(t *testing.T, user string, options ...string) *transcript {
	t.Helper()
	said := &transcript{}
	cmd := machine.Command(context.WithoutCancel(t.Context()), user, "bpfbroker", append([]string{"monitor"}, options...)...)
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = machines.Signal(cmd, syscall.SIGTERM)
		_ = cmd.Wait()
	})
	eventually(t, "a monitor of "+user+"'s", func() bool { return strings.Contains(said.String(), "Monitoring") })
	return said
}

// grant waits for the last grant of a profile that a monitor told of, by its id.
func (o *transcript) grant(t *testing.T, profile string) (id string) {
	t.Helper()
	eventually(t, "a grant of "+profile, func() bool {
		for line := range strings.Lines(o.String()) {
			var event struct{ Kind, Grant, Profile string }
			if json.Unmarshal([]byte(line), &event) == nil && event.Kind == "made" && event.Profile == profile {
				id = event.Grant
			}
		}
		return id != ""
	})
	return id
}

// explained is what "bpfbroker explain" prints as JSON.
type explained struct {
	Profile  string
	Ended    bool
	Denials  []denial
	Withheld []withheld
}

type denial struct {
	Event struct{ Grant, Reason, Layer, Setting, Program, Command string }
	Allow string
	Count int
}

type withheld struct {
	Layer, Setting string
	Names          []string
}

func explain(t *testing.T, user, id string) (e explained) {
	t.Helper()
	if err := json.Unmarshal([]byte(must(t, user, "bpfbroker explain -j "+id)), &e); err != nil {
		t.Fatal(err)
	}
	return e
}

const strict = `[Delegate]
Commands=map_create prog_load btf_load
Maps=array
Programs=xdp socket_filter
Attachments=xdp
[Guard]
Capabilities=CAP_BPF CAP_NET_ADMIN
Helpers=~map_lookup_elem`

// alice sees what happens to her grants, and why something didn't work; bob sees
// nothing of it.
func TestMonitorAndExplain(t *testing.T) {
	leavesNothing(t)
	offer(t, map[string]string{"strict": strict})
	alice, bob := monitor(t, "alice", "--json=short"), monitor(t, "bob")

	if r := run(t, "alice", "bpfbroker run -p strict -- bash -c "+"'/usr/sbin/bpftool prog load "+object+" /sys/fs/bpf/x; ebpf-example; exit 3'"); r.code != 3 {
		t.Errorf("got %+v", r)
	}
	must(t, "alice", "! bpfbroker run -p nonesuch -- true")
	eventually(t, "all of it is told", func() bool { return strings.Contains(alice.String(), "refused") })
	seen := alice.String()
	for _, want := range []string{`"kind":"made"`, `"kind":"loaded"`, `"kind":"denied"`, `the helper map_lookup_elem`, `"setting":"[Guard] Helpers="`, `"kind":"ended"`, `"reason":"exited"`, `"layer":"profile"`} {
		if !strings.Contains(seen, want) {
			t.Errorf("%s is not in\n%s", want, seen)
		}
	}
	if got := bob.String(); got != "Monitoring grants.\n" {
		t.Errorf("bob sees %s", got)
	}
	refused(t, "bob", "bpfbroker --no-ask-password monitor --all", 77, "(polkit)")

	id := regexp.MustCompile(`"kind":"denied".*?"grant":"([0-9a-f]{16})"`).FindStringSubmatch(seen)
	if id == nil {
		t.Fatalf("no id in %s", seen)
	}
	e := explain(t, "alice", id[1])
	if len(e.Denials) == 0 || e.Denials[0].Event.Layer != "guard" || e.Denials[0].Allow != "[Guard] Helpers= without ~map_lookup_elem" || !e.Ended || e.Profile != "strict" {
		t.Errorf("got %+v", e)
	}
	if !slices.ContainsFunc(e.Withheld, func(w withheld) bool {
		return w.Layer == "token mask" && w.Setting == "[Delegate] Programs=" && slices.Contains(w.Names, "kprobe")
	}) {
		t.Errorf("nothing says that kprobes aren't delegated: %+v", e.Withheld)
	}
	if all := explain(t, "alice", ""); len(all.Denials) < 2 || all.Denials[len(all.Denials)-1].Event.Layer != "profile" {
		t.Errorf("all that was refused: %+v", all)
	}
	refused(t, "bob", "bpfbroker --no-ask-password explain "+id[1], 1, "no such grant")
	t.Log(must(t, "alice", "bpfbroker explain "+id[1]))
}

// What is learnt from a program is enough for it, and every word of it is needed,
// but for those that are said not to be, perhaps. What isn't there is explained.
func TestLearn(t *testing.T) {
	leavesNothing(t)
	for name, test := range map[string]struct {
		options, command string
		needed           []string // although it looks like a try
	}{
		"libbpf": {"--root", "unshare -n bash -ec 'ip link set lo up; /usr/sbin/bpftool prog load " + object + " /sys/fs/bpf/count type classifier; /usr/sbin/bpftool net attach tcx_ingress pinned /sys/fs/bpf/count dev lo'",
			[]string{"socket_filter"}}, // libbpf loads nothing if it can't load that
		"cilium/ebpf": {"", "ebpf-example", nil},
	} {
		t.Run(name, func(t *testing.T) {
			offer(t, nil)
			must(t, "alice", fmt.Sprintf("bpfbroker learn %s -o /tmp/learnt -- %s", test.options, test.command))
			text := must(t, "root", "cat /tmp/learnt; rm /tmp/learnt")
			t.Log(text)
			words := narrowed(text)
			profiles := map[string]string{"learnt": text}
			for i, w := range words {
				profiles[fmt.Sprintf("learnt-%d", i)] = w.profile
			}
			offer(t, profiles)
			heard := monitor(t, "alice", "--json=short")
			must(t, "alice", fmt.Sprintf("bpfbroker run %s -p learnt -- %s", test.options, test.command))
			for i, w := range words {
				r := run(t, "alice", fmt.Sprintf("bpfbroker run %s -p learnt-%d -- %s", test.options, i, test.command))
				if spare := w.spare && !slices.Contains(test.needed, w.word); spare != (r.code == 0) {
					t.Errorf("without %s: %+v", w.line(), r)
				}
				if r.code == 0 {
					continue
				}
				if e := explain(t, "alice", heard.grant(t, fmt.Sprintf("learnt-%d", i))); !e.allows(w) {
					t.Errorf("without %s, the explanation is %+v", w.line(), e)
				}
			}
		})
	}
	offer(t, nil)
	// Whatever the command does, there is a profile, or an error.
	for _, command := range []string{"true", "bash -c 'ebpf-example & exit 7'", "bash -c 'kill -9 $$'"} {
		if r := run(t, "alice", "bpfbroker learn -- "+command); !strings.Contains(r.out, "[Delegate]") {
			t.Errorf("%s: %+v", command, r)
		}
	}
	refused(t, "alice", "bpfbroker learn -- /no/such/program", 127, "cannot run")
	refused(t, "bob", "bpfbroker --no-ask-password learn -- touch /tmp/it-ran", 77, "(polkit)")
	if out := must(t, "alice", "bpfbroker learn -- bash -c 'for i in {1..20}; do ebpf-example; done'"); strings.Count(out, "\nPrograms=") != 1 {
		t.Errorf("many programs: %s", out)
	}
}

// less is a profile with one word less than another has.
type less struct {
	section, key, word string
	profile            string
	spare              bool // the profile says that it is perhaps not needed
}

func (l less) line() string { return fmt.Sprintf("[%s] %s=%s", l.section, l.key, l.word) }

// allows says whether the explanation has the layer that refuses what a profile
// lacks, and the line that would allow it.
func (e explained) allows(lack less) bool {
	line := lack.line()
	if lack.key == "MaxMapBytes" {
		line = "[Guard] MaxMapBytes=2 or more" // than the one that there was
	}
	return slices.ContainsFunc(e.Denials, func(d denial) bool {
		return d.Event.Layer == "guard" && strings.HasPrefix(d.Allow, line)
	}) || slices.ContainsFunc(e.Withheld, func(w withheld) bool {
		layer := "token mask"
		if lack.key == "Capabilities" {
			layer = "namespace capability"
		}
		return w.Layer == layer && w.Setting == fmt.Sprintf("[%s] %s=", lack.section, lack.key) && slices.Contains(w.Names, lack.word)
	})
}

// narrowed gives the profiles that have a word less. Of the quotas it narrows the
// one that shows at once: a library's tries may take up the others or not, as the
// kernel frees what was closed some time later.
func narrowed(text string) (all []less) {
	lines := strings.Split(text, "\n")
	var section string
	var spare []string
	for i, line := range lines {
		if name, ok := strings.CutPrefix(line, "# Perhaps not needed: "); ok {
			spare = append(spare, strings.Fields(name)...)
			continue
		}
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(key, "#") || section == "Profile" || key == "MaxPrograms" || key == "MaxMaps" || key == "Kfuncs" {
			continue
		}
		for _, word := range strings.Fields(value) {
			rest := strings.Join(slices.DeleteFunc(strings.Fields(value), func(w string) bool { return w == word }), " ")
			if rest == "" { // which would be all
				rest = map[string]string{"Helpers": "ktime_get_boot_ns", "Capabilities": "CAP_PERFMON", "MaxMapBytes": "1"}[key]
			}
			changed := slices.Clone(lines)
			changed[i] = key + "=" + rest
			all = append(all, less{section, key, word, strings.Join(changed, "\n"), slices.Contains(spare, word)})
		}
		spare = nil
	}
	return all
}

// Whatever refuses something, the explanation says which layer that is, and what
// would allow it; and that does.
func TestExplainLayers(t *testing.T) {
	leavesNothing(t)
	const text = `[Delegate]
Commands=map_create prog_load btf_load
Maps=array
Programs=%s socket_filter
Attachments=xdp
[Guard]
Capabilities=CAP_BPF %s
Helpers=%s
[Attach]
Processes=any`
	const paranoid = "/proc/sys/kernel/perf_event_paranoid"
	was := strings.TrimSpace(must(t, "root", "cat "+paranoid))
	t.Cleanup(func() { must(t, "root", "echo "+was+" >"+paranoid) })
	offer(t, map[string]string{
		"plain":   fmt.Sprintf(text, "xdp", "CAP_NET_ADMIN", "map_lookup_elem"),
		"kprobe":  fmt.Sprintf(text, "kprobe", "CAP_PERFMON", "map_lookup_elem"),
		"no-net":  fmt.Sprintf(text, "xdp", "", "map_lookup_elem"),
		"no-call": fmt.Sprintf(text, "xdp", "CAP_NET_ADMIN", "~map_lookup_elem"),
		"samples": fmt.Sprintf(text, "perf_event", "CAP_PERFMON", "map_lookup_elem"),
	})
	heard := monitor(t, "alice", "--json=short")
	const get, count = "bpfbroker --no-ask-password run -p %s -- %s", "/usr/sbin/bpftool prog load " + object + " /sys/fs/bpf/count"
	for _, test := range []struct {
		layer, profile, command string
		setting, name, allow    string // what the explanation has
		mend, instead           string // what root does, and the profile that allows it
	}{
		{"token mask", "plain", "ebpf-example kprobe", "[Delegate] Programs=", "kprobe", "", "", "kprobe"},
		{"namespace capability", "no-net", count, "[Guard] Capabilities=", "CAP_NET_ADMIN", "", "", "plain"},
		{"guard", "no-call", count, "", "", "[Guard] Helpers= without ~map_lookup_elem", "", "plain"},
		{"sysctl", "samples", "reach samples", "kernel.perf_event_paranoid=" + was, "perf_event_open(2): kprobe, tracepoint and perf_event programs are attached by that", "", "echo 2 >" + paranoid, "samples"},
	} {
		t.Run(test.layer, func(t *testing.T) {
			if r := run(t, "alice", fmt.Sprintf(get, test.profile, test.command)); r.code == 0 {
				t.Errorf("nothing refuses it: %+v", r)
			}
			id := heard.grant(t, test.profile)
			e := explain(t, "alice", id)
			if !slices.ContainsFunc(e.Denials, func(d denial) bool { return d.Event.Layer == test.layer && d.Allow == test.allow }) &&
				!slices.ContainsFunc(e.Withheld, func(w withheld) bool {
					return w.Layer == test.layer && w.Setting == test.setting && slices.Contains(w.Names, test.name)
				}) {
				t.Errorf("the explanation: %+v", e)
			}
			if said := must(t, "alice", "bpfbroker explain "+id); !strings.Contains(said, test.layer) || !strings.Contains(strings.Join(strings.Fields(said), " "), test.name+test.allow) {
				t.Errorf("in words: %s", said)
			}
			if test.mend != "" {
				must(t, "root", test.mend)
			}
			must(t, "alice", fmt.Sprintf(get, test.instead, test.command))
		})
	}
	for layer, test := range map[string]struct{ user, profile, allow, mend string }{
		"profile": {"alice", "strict", "bpfbroker profiles", "cp /etc/bpfbroker/profiles.d/plain.profile /etc/bpfbroker/profiles.d/strict.profile; systemctl try-reload-or-restart bpfbroker.service"},
		"polkit": {"bob", "plain", "ask the administrator for a polkit rule", `sed s/alice/bob/ /etc/polkit-1/rules.d/01-alice.rules >/etc/polkit-1/rules.d/02-bob.rules
systemctl reset-failed polkit.service; systemctl restart polkit.service`},
	} {
		t.Run(layer, func(t *testing.T) {
			t.Cleanup(func() {
				must(t, "root", "rm -f /etc/bpfbroker/profiles.d/strict.profile /etc/polkit-1/rules.d/02-bob.rules; systemctl try-reload-or-restart bpfbroker.service")
			})
			if r := run(t, test.user, fmt.Sprintf(get, test.profile, "true")); r.code == 0 {
				t.Errorf("nothing refuses it: %+v", r)
			}
			// There is no grant that it could be asked of.
			e := explain(t, test.user, "")
			if last := e.Denials[len(e.Denials)-1]; last.Event.Layer != layer || !strings.Contains(last.Allow, test.allow) {
				t.Errorf("the explanation: %+v", e)
			}
			must(t, "root", test.mend)
			must(t, test.user, fmt.Sprintf(get, test.profile, "true"))
		})
	}
}

// Events that nobody reads are kept, and those that there is no room for are
// counted, while the daemon is stopped and while it hangs; and nobody is told
// twice.
func TestLostEvents(t *testing.T) {
	leavesNothing(t)
	offer(t, map[string]string{"strict": strings.Replace(strict, "~map_lookup_elem", "~ktime_get_ns", 1)})
	const tries = 400
	_, first := start(t, "alice", fmt.Sprintf(`exec bpfbroker run -p strict -- bash -c 'echo ready; for go in /tmp/go-1 /tmp/go-2; do until test -e $go; do sleep 0.1; done; reach denied %d >$go.done; done; exec sleep 60'`, tries))
	if first != "ready\n" {
		t.Fatalf("got %q", first)
	}
	t.Cleanup(func() { must(t, "root", "rm -f /tmp/go-*") })
	burst := func(file string) {
		t.Helper()
		must(t, "root", "touch "+file)
		eventually(t, "the programs are refused", func() bool { return run(t, "root", "cat "+file+".done").out == fmt.Sprintln(tries) })
	}
	// told gives what the journal says of denials, and of those that were lost.
	told := func(cursor string) (denied, lost int) {
		t.Helper()
		for _, record := range records(t, cursor) {
			switch record["MESSAGE_ID"] {
			case "f53738ae3c0143c393636def6bb4b110":
				denied++
			case "b33c0669ffee42c4a6d0e97e98395942":
				n, err := strconv.Atoi(record["BPFBROKER_LOST"])
				if err != nil {
					t.Errorf("%v: %+v", err, record)
				}
				lost += n
			}
		}
		return denied, lost
	}
	all := func(cursor string) {
		t.Helper()
		var denied, lost int
		eventually(t, "all denials are told or counted", func() bool {
			denied, lost = told(cursor)
			return denied+lost >= tries
		})
		// The library's own programs are among those that are counted.
		if denied == 0 || lost == 0 || denied+lost > tries+50 {
			t.Errorf("of %d denials %d are told, and %d counted", tries, denied, lost)
		}
	}

	stopDaemon(t)
	cursor := journalEnd(t)
	burst("/tmp/go-1")
	if denied, lost := told(cursor); denied+lost != 0 {
		t.Errorf("the daemon is stopped, and tells of %d and %d", denied, lost)
	}
	startDaemon(t)
	all(cursor)

	cursor = journalEnd(t)
	must(t, "root", "systemctl restart bpfbroker.service")
	heard := monitor(t, "alice", "--json=short")
	must(t, "root", "systemctl kill --signal=STOP bpfbroker.service")
	burst("/tmp/go-2")
	must(t, "root", "systemctl kill --signal=CONT bpfbroker.service")
	all(cursor)
	eventually(t, "the monitor tells of lost events", func() bool { return strings.Contains(heard.String(), `"kind":"lost"`) })
}
