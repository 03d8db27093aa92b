// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package scenarios

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
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

// explained is what "bpfbroker explain" prints as JSON.
type explained struct {
	Profile string
	Ended   bool
	Denials []struct {
		Event struct{ Grant, Reason, Layer, Setting, Program, Command string }
		Allow string
		Count int
	}
	Withheld []struct {
		Layer, Setting string
		Names          []string
	}
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
	if !slices.ContainsFunc(e.Withheld, func(w struct {
		Layer, Setting string
		Names          []string
	}) bool {
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

// What is learnt from a program is enough for it, and every word of it is needed.
func TestLearn(t *testing.T) {
	leavesNothing(t)
	for name, test := range map[string]struct {
		command string
		// spare are words that the library's tries of the kernel use, and that it
		// can do without.
		spare []string
	}{
		"libbpf": {command: "/usr/sbin/bpftool prog load " + object + " /sys/fs/bpf/count", spare: []string{
			"Commands=btf_load", "Programs=kprobe", "Programs=cgroup_sock", "Attachments=cgroup_inet_sock_create",
			"Capabilities=CAP_PERFMON", "Helpers=get_func_ip",
		}},
		"cilium/ebpf": {command: "ebpf-example", spare: []string{"Programs=kprobe", "Capabilities=CAP_PERFMON"}},
	} {
		t.Run(name, func(t *testing.T) {
			offer(t, nil)
			must(t, "alice", "bpfbroker learn -o /tmp/learnt -- "+test.command)
			text := must(t, "root", "cat /tmp/learnt; rm /tmp/learnt")
			t.Log(text)
			profiles, words := without(text)
			profiles["learnt"] = text
			offer(t, profiles)
			must(t, "alice", "bpfbroker run -p learnt -- "+test.command)
			for i, word := range words {
				r := run(t, "alice", fmt.Sprintf("bpfbroker run -p learnt-%d -- %s", i, test.command))
				if spare := slices.Contains(test.spare, word); spare != (r.code == 0) {
					t.Errorf("without %s: %+v", word, r)
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
	if out := must(t, "alice", "bpfbroker learn -- bash -c 'for i in {1..20}; do ebpf-example; done'"); strings.Count(out, "Programs=") != 2 {
		t.Errorf("many programs: %s", out)
	}
}

// without is a profile with one word less each, and the words.
func without(text string) (profiles map[string]string, words []string) {
	profiles = map[string]string{}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		key, value, _ := strings.Cut(line, "=")
		if strings.HasPrefix(key, "Max") || strings.HasPrefix(key, "#") || key == "Lease" || value == "" || key == "Kfuncs" {
			continue
		}
		for _, word := range strings.Fields(value) {
			less := strings.Join(slices.DeleteFunc(strings.Fields(value), func(w string) bool { return w == word }), " ")
			if less == "" && (key == "Helpers" || key == "Capabilities") { // which would be all
				less = map[string]string{"Helpers": "ktime_get_boot_ns", "Capabilities": "CAP_PERFMON"}[key]
			}
			changed := slices.Clone(lines)
			changed[i] = key + "=" + less
			profiles[fmt.Sprintf("learnt-%d", len(words))] = strings.Join(changed, "\n")
			words = append(words, key+"="+word)
		}
	}
	return profiles, words
}
