// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package scenarios

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// holder is a process with a token that goes on loading programs until the test's
// end.
type holder struct {
	*output
	id, pid string
}

func hold(t *testing.T) holder {
	t.Helper()
	h := holder{output: &output{}}
	cmd := machine.Command(context.WithoutCancel(t.Context()), "alice", "bpfbroker", "run", "-p", "network", "--", "reach", "hold")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = h, h
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = machines.Signal(cmd, syscall.SIGTERM)
		_ = cmd.Wait()
	})
	h.says(t, "yes\n")
	var grants []struct {
		ID      string
		Process int
	}
	if err := json.Unmarshal([]byte(must(t, "alice", "bpfbroker list --json=short")), &grants); err != nil || len(grants) != 1 {
		t.Fatalf("%v, %d grants", err, len(grants))
	}
	h.id, h.pid = grants[0].ID, fmt.Sprint(grants[0].Process)
	return h
}

// says waits until all that it has said is that.
func (h holder) says(t *testing.T, text string) {
	t.Helper()
	defer func() {
		if got := h.String(); got != text {
			t.Logf("it has said %q", got)
		}
	}()
	eventually(t, fmt.Sprintf("it says %q", text), func() bool { return h.String() == text })
}

// inside is a command for the namespaces of the holder.
func (h holder) inside(command string) string {
	return "nsenter -t " + h.pid + " -U -m --preserve-credentials --keep-caps env LIBBPF_BPF_TOKEN_PATH=/sys/fs/bpf " + command
}

// denied waits for the journal's record of what the guard refused.
func denied(t *testing.T, reason, setting string) {
	t.Helper()
	journalHas(t, "MESSAGE_ID=f53738ae3c0143c393636def6bb4b110", "BPFBROKER_REASON="+reason, "BPFBROKER_SETTING="+setting)
}

// dropIn changes the profile "network" until the test's end.
func dropIn(t *testing.T, text string) {
	t.Helper()
	const dir = "/etc/bpfbroker/profiles.d/network.profile.d"
	must(t, "root", "mkdir -p "+dir+" && printf '"+text+"' >"+dir+"/guard.conf && systemctl try-reload-or-restart bpfbroker.service")
	t.Cleanup(func() { must(t, "root", "rm "+dir+"/guard.conf; systemctl try-reload-or-restart bpfbroker.service") })
}

const asAlice = "bpfbroker run -p network -- "

// What is one's own can be had, and nothing of the host.
func TestGuardAttach(t *testing.T) {
	leavesNothing(t)
	must(t, "alice", "bpfbroker run --root -p network -- unshare -n bash -ec 'ip link set lo up; reach xdp lo; reach tcx lo'")
	for _, command := range []string{"xdp lo", "tcx lo", "cgroup /sys/fs/cgroup"} {
		refused(t, "alice", asAlice+"reach "+command, 1, "cannot attach it: ")
	}
	denied(t, "link_create beyond what the profile lets programs be attached to", "[Attach] Interfaces=")
	denied(t, "a link of type 3 beyond what the profile lets programs be attached to", "[Attach] Cgroups=")
	// A raw tracepoint isn't in the profile; where it is, the guard says no.
	refused(t, "alice", asAlice+"reach tracepoint sys_enter", 1, "operation not permitted")
	refused(t, "root", "bpfbroker run -p tracing -- reach tracepoint sys_enter", 1, "cannot attach it: ")
	must(t, "root", "bpfbroker run -p unlimited -- reach tracepoint sys_enter")
	// Nothing is confined that has no grant.
	must(t, "root", "reach xdp lo && reach cgroup /sys/fs/cgroup && reach tracepoint sys_enter")
}

// Her own control groups are those that her manager was given.
func TestGuardAttachCgroup(t *testing.T) {
	leavesNothing(t)
	linger(t)
	const own = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice"
	must(t, "alice", fmt.Sprintf(service, "reach")+asAlice+"reach cgroup "+own)
	refused(t, "alice", fmt.Sprintf(service, "reach")+asAlice+"reach cgroup /sys/fs/cgroup/user.slice", 1, "cannot attach it: ")
}

// What a program may call is what the profile says, and the journal says what
// wasn't.
func TestGuardHelpers(t *testing.T) {
	leavesNothing(t)
	must(t, "alice", asAlice+"reach helper ktime_get_ns")
	// The kernel's memory needs a capability that the profile keeps back, though
	// alice has it in her namespace.
	refused(t, "alice", asAlice+"reach kernel", 1, "reach: ")
	refused(t, "alice", "bpfbroker run --root -p network -- reach kernel", 1, "reach: ")
	denied(t, "CAP_PERFMON", "[Guard] Capabilities=")
	must(t, "root", "bpfbroker run -p tracing -- reach kernel")

	dropIn(t, "[Guard]\nHelpers=~ktime_get_ns\n")
	refused(t, "alice", asAlice+"reach helper ktime_get_ns", 1, "operation not permitted")
	denied(t, "the helper ktime_get_ns", "[Guard] Helpers=")
	must(t, "alice", asAlice+"reach helper get_prandom_u32")
	// What was loaded is there, too.
	journalHas(t, "MESSAGE_ID=efe0eee838e64e4ea0b287205fa80b64", "BPFBROKER_UID=1000", "BPFBROKER_COMMAND=reach")
}

// Quotas hold a grant, however many processes share it.
func TestGuardQuotas(t *testing.T) {
	leavesNothing(t)
	dropIn(t, "[Guard]\nMaxPrograms=20\nMaxMaps=30\nMaxMapBytes=64K\n")
	// Its library tries the kernel out with maps and programs of its own.
	for command, most := range map[string]int{"programs 40": 20, "maps 40": 16} {
		var n int
		if _, err := fmt.Sscan(must(t, "alice", asAlice+"reach "+command), &n); err != nil || n > most || n < most-4 {
			t.Errorf("reach %s: got %d, want %d: %v", command, n, most, err)
		}
	}
	denied(t, "more than 20 programs", "[Guard] MaxPrograms=")
	denied(t, "more than 65536 bytes of maps", "[Guard] MaxMapBytes=")
}

// A token that is held ends with the lease, whether or not the daemon is there to
// see to it.
func TestGuardLease(t *testing.T) {
	leavesNothing(t)
	dropIn(t, "[Profile]\nLease=15s\n")
	hold(t).says(t, "yes\nno\n")
	h := hold(t)
	stopDaemon(t)
	h.says(t, "yes\nno\n")
	startDaemon(t)
	journalHas(t, "MESSAGE_ID=0cb8180dc05f4d8f8b26b130fd98c31c", "BPFBROKER_GRANT="+h.id)
}

// A running program's token ends at once when its grant is revoked, or when its
// profile gives less.
func TestGuardRevoke(t *testing.T) {
	leavesNothing(t)
	h := hold(t)
	if list := must(t, "alice", "bpfbroker list --json=short"); !strings.Contains(list, `"notEnforced":[]`) {
		t.Errorf("something isn't enforced: %s", list)
	}
	must(t, "alice", h.inside("mkdir -m 0 /sys/fs/bpf/below"))
	must(t, "alice", h.inside("/usr/sbin/bpftool prog load "+object+" /sys/fs/bpf/count"))
	// Whoever stays in the file system still sees it when it isn't mounted any more.
	stays := strings.TrimSpace(must(t, "alice", h.inside("bash -c 'cd /sys/fs/bpf; (exec sleep 1000 </dev/null >/dev/null 2>&1) & echo $!'")))
	if there := must(t, "alice", h.inside("ls -A /proc/"+stays+"/cwd/")); there != "below\ncount\n" {
		t.Errorf("pinned are %q", there)
	}
	r := run(t, "alice", "bpfbroker revoke "+h.id)
	if r.code != 0 || strings.Contains(r.err, "tokens that were already created") {
		t.Errorf("revoke: %+v", r)
	}
	h.says(t, "yes\nno\n")
	if left := must(t, "alice", h.inside("ls -A /proc/"+stays+"/cwd/")); left != "" {
		t.Errorf("still pinned are %q", left)
	}
	must(t, "alice", "kill "+stays)

	h = hold(t)
	dropIn(t, "[Delegate]\nMaps=\nMaps=hash\n")
	h.says(t, "yes\nno\n")
	journalHas(t, "MESSAGE_ID=fcf1b7bb64b148f6ad5d4ca8a486e05b", "BPFBROKER_GRANT="+h.id)
}

// stopDaemon stops the daemon until startDaemon, or the test's end.
func stopDaemon(t *testing.T) {
	t.Helper()
	must(t, "root", "systemctl stop bpfbroker.socket bpfbroker.service")
	t.Cleanup(func() { startDaemon(t) })
}

func startDaemon(t *testing.T) {
	t.Helper()
	must(t, "root", "systemctl reset-failed bpfbroker.service; systemctl start bpfbroker.socket bpfbroker.service")
}

// The guard enforces while the daemon is stopped, killed, restarted or replaced,
// and the daemon finds it again.
func TestGuardStays(t *testing.T) {
	leavesNothing(t)
	h := hold(t)
	confined := func(when string) {
		t.Helper()
		if r := run(t, "alice", h.inside("reach xdp lo")); r.code != 1 || !strings.Contains(r.err, "cannot attach it: ") {
			t.Errorf("%s: a program is attached: %+v", when, r)
		}
	}
	confined("at first")
	pins := must(t, "root", "find /sys/fs/bpf/bpfbroker | sort")
	stopDaemon(t)
	confined("stopped")
	startDaemon(t)
	must(t, "root", "systemctl kill --signal=KILL bpfbroker.service; systemctl stop bpfbroker.socket")
	confined("killed")
	startDaemon(t)
	must(t, "root", "systemctl restart bpfbroker.service")
	confined("restarted")
	if diff := cmp.Diff(pins, must(t, "root", "find /sys/fs/bpf/bpfbroker | sort")); diff != "" {
		t.Errorf("pins (-before +after):\n%s", diff)
	}

	// Another version replaces the programs, and takes over the grants.
	stopDaemon(t)
	must(t, "root", "cd /sys/fs/bpf/bpfbroker/guard && mv links-* links-0123456789abcdef")
	confined("of another version")
	startDaemon(t)
	confined("upgraded")
	if diff := cmp.Diff(pins, must(t, "root", "find /sys/fs/bpf/bpfbroker | sort")); diff != "" {
		t.Errorf("pins (-before +after):\n%s", diff)
	}
	h.says(t, "yes\n")
	must(t, "alice", "bpfbroker revoke "+h.id)
	h.says(t, "yes\nno\n")
	must(t, "root", "systemctl restart bpfbroker.service") // who attaches the programs holds them, too
}

// Neither a user nor the root of a user's namespace gets at the guard's maps and
// pins.
func TestGuardTampering(t *testing.T) {
	leavesNothing(t)
	h := hold(t)
	for _, command := range []string{
		"ls /sys/fs/bpf/bpfbroker",
		"rm -r /sys/fs/bpf/bpfbroker/guard",
		"/usr/sbin/bpftool map dump pinned /sys/fs/bpf/bpfbroker/guard/maps/grants",
		"/usr/sbin/bpftool map dump name grants",
		"/usr/sbin/bpftool map update name grants key 0 0 0 0 0 0 0 0 value 0",
		"/usr/sbin/bpftool link detach pinned /sys/fs/bpf/bpfbroker/guard/links-0/command",
	} {
		// The last one takes away the token's file system, which covers the host's.
		for _, as := range []string{"", "unshare -Urm ", "bpfbroker run --root -p network -- ", asAlice, h.inside(""), h.inside(`unshare -m bash -c 'umount /sys/fs/bpf; exec "$@"' - `)} {
			if r := run(t, "alice", as+command); r.code == 0 || r.out != "" {
				t.Errorf("%s%s: %+v", as, command, r)
			}
		}
	}
	h.says(t, "yes\n")
	must(t, "root", "test $(ls /sys/fs/bpf/bpfbroker/guard/maps | wc -l) -gt 5")
}

// Root can unload the guard. The next start notices: what was granted with it
// ends, and the journal says so.
func TestGuardUnloaded(t *testing.T) {
	leavesNothing(t)
	h := hold(t)
	stopDaemon(t)
	must(t, "root", "rm -r /sys/fs/bpf/bpfbroker/guard")
	startDaemon(t)
	if list := must(t, "alice", "bpfbroker list --no-legend"); list != "" {
		t.Errorf("there are grants: %s", list)
	}
	journalHas(t, "MESSAGE=the guard has lost a grant: somebody has unloaded it grant="+h.id)
	journalHas(t, "MESSAGE_ID=fcf1b7bb64b148f6ad5d4ca8a486e05b", "BPFBROKER_GRANT="+h.id)
	refused(t, "alice", asAlice+"reach xdp lo", 1, "cannot attach it: ")

	// All that the daemon has there.
	must(t, "root", "systemctl stop bpfbroker.service; rm -r /sys/fs/bpf/bpfbroker")
	refused(t, "alice", asAlice+"true", 1, "restart bpfbroker.socket")
	must(t, "root", "systemctl restart bpfbroker.socket")
	must(t, "alice", asAlice+"true")
	must(t, "root", "systemctl restart bpfbroker.service") // who attaches the programs holds them, too
}

// The example for a group, by what its members get.
func TestExampleWithGuard(t *testing.T) {
	leavesNothing(t)
	const get = "bpfbroker run --no-ask-password -p %s -- true"
	for _, profile := range []string{"basic", "network"} {
		must(t, "alice", fmt.Sprintf(get, profile))
		must(t, "root", session("alice")+fmt.Sprintf(get, profile))
		refused(t, "bob", fmt.Sprintf(get, profile), 77, "(polkit)")
	}
	for _, profile := range []string{"tracing", "unlimited"} {
		refused(t, "alice", fmt.Sprintf(get, profile), 77, "(polkit)")
	}
}
