// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// mounted makes a grant for a new target of alice's, and returns the target's pid
// and the grant's id.
func mounted(t *testing.T) (pid, id string) {
	t.Helper()
	_, pid = start(t, "alice", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
	pid = strings.TrimSpace(pid)
	return pid, strings.TrimSpace(must(t, "alice", "token-client mount "+pid+" network /mnt"))
}

// Every method says what is wrong with a call, and nothing comes of it.
func TestNonsenseOnTheBus(t *testing.T) {
	leavesNothing(t)
	must(t, "bob", manager+"ListProfiles a{sv} 0")
	_, others := mounted(t)
	_, ended := mounted(t)
	must(t, "alice", "bpfbroker -q revoke "+ended)
	daemon := strings.TrimSpace(must(t, "root", "systemctl show -P MainPID bpfbroker.service"))
	want := map[string]string{
		"signature": "InvalidArgs", "option": "InvalidArgs", "large": "MessageTooLarge", "path": "UnknownObject", "object": "UnknownInterface", "id": "NoSuchGrant",
		"pid-0": "InvalidArgs", "pid-4194305": "InvalidArgs", "pid-4294967295": "InvalidArgs",
		"pid-4194303": "ProcessGone", "pid-1": "NamespaceInitial", "pid-" + daemon: "NamespaceInitial",
	}
	also := map[string][]string{
		"path":  {"UnknownInterface", "QuotaExceeded"}, // an object that is there for walking down; a long path
		"large": {"QuotaExceeded"},                     // each KiB counts as a request
	}
	out := must(t, "bob", "hostile bus-nonsense "+others+" "+ended+" 0 1 4194303 4194305 4294967295 "+daemon)
	lines := 0
	for line := range strings.Lines(out) {
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		member, got, _ := strings.Cut(rest, " ")
		lines++
		if got != want[kind] && !slices.Contains(also[kind], got) {
			t.Errorf("%s: %s: got %s, want %s", kind, member, got, want[kind])
		}
	}
	if lines < 140 || !strings.Contains(out, "MessageTooLarge") {
		t.Errorf("only %d lines:\n%s", lines, out)
	}
	// A path that is none at all makes the bus hang up on the caller.
	if r := run(t, "bob", "busctl --system call org.bpfbroker.Broker1 //org org.bpfbroker.Broker1.Manager ListProfiles a{sv} 0"); r.code == 0 {
		t.Errorf("got %+v", r)
	}
	must(t, "alice", "bpfbroker list --no-legend | grep -q "+others)
}

// The bus lets no descriptor through, whatever it comes with.
func TestDescriptorsOnTheBus(t *testing.T) {
	leavesNothing(t)
	must(t, "bob", manager+"ListProfiles a{sv} 0")
	before := look(t)
	const messages = 10_000 / share
	out := must(t, "bob", fmt.Sprintf("hostile bus-fds %d", messages))
	if out != fmt.Sprintf("map[AccessDenied:%d]\n", messages-(messages+1)/3) { // the others are signals
		t.Errorf("got %s", out)
	}
	if after := look(t); after.files > before.files {
		t.Errorf("the daemon has %d descriptors, and had %d", after.files, before.files)
	}
}

// One user's thousand calls leave the others theirs.
func TestThousandCalls(t *testing.T) {
	leavesNothing(t)
	must(t, "bob", manager+"ListProfiles a{sv} 0")
	start(t, "alice", fmt.Sprintf("exec hostile bus-crowd %d", max(100, 1000/share)))
	answered(t, "bob", manager+"ListProfiles a{sv} 0")
	answered(t, "bob", "bpfbroker profiles")
	answered(t, "root", manager+"ListGrants a{sv} 1 all b true")
}

// answered wants an answer within a second. A busy machine may keep one from it,
// but not five.
func answered(t *testing.T, user, command string) {
	t.Helper()
	var last result
	for range 5 {
		if last = run(t, user, within(1, command)); last.code == 0 {
			return
		}
	}
	t.Errorf("%s: %s: not answered within a second: %+v", user, command, last)
}

// Who leaves while a password is asked for takes the question along. The caller
// has another process make the call with its own agent, so that only one of them
// is killed.
func TestLeavingDuringTheQuestionOnTheBus(t *testing.T) {
	leavesNothing(t)
	session := login(t, "bob")
	cmd := session.Command(t.Context(), "script", "--quiet", "--return", "--command",
		"bash -c 'pkttyagent --process $$ --fallback & sleep 1; exec unshare -cUm "+manager+"AcquireToken sa{sv} tracing 0'", "/dev/null")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = machines.Signal(cmd, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	eventually(t, "a password is asked for", func() bool { return run(t, "root", "pgrep -x polkit-agent-he").code == 0 })
	must(t, "root", "pkill -KILL -x busctl")
	eventually(t, "nobody is asked any more", func() bool { return run(t, "root", "pgrep -x polkit-agent-he").code != 0 })
	must(t, "root", "bpfbroker list --all --no-legend | wc -l | grep -qx 0")
}

// What is mounted goes when the grant's process ends, also where others stay in
// its namespaces.
func TestUnmountedAfterExit(t *testing.T) {
	leavesNothing(t)
	pid, id := mounted(t)
	_, beside := start(t, "alice", "exec nsenter -t "+pid+" -U -m --preserve-credentials bash -c 'echo $$; exec sleep 60'")
	beside = strings.TrimSpace(beside)
	must(t, "root", "grep -q ' /mnt .* - bpf ' /proc/"+beside+"/mountinfo")
	must(t, "root", "kill "+pid)
	journalHas(t, "MESSAGE_ID=ef1a2001282246b7a9173eec22681e37", "BPFBROKER_GRANT="+id)
	must(t, "root", "! grep ' /mnt .* - bpf ' /proc/"+beside+"/mountinfo")
}

// A reload ends the grants that have more than their profile gives, and cuts
// their leases; a mistake in a file ends none.
func TestNarrowing(t *testing.T) {
	leavesNothing(t)
	const dropIn = "/etc/bpfbroker/profiles.d/network.profile.d/narrow.conf"
	t.Cleanup(func() { must(t, "root", "rm -f "+dropIn+"; systemctl try-reload-or-restart bpfbroker.service") })
	reload := func(text string) {
		must(t, "root", "mkdir -p $(dirname "+dropIn+") && printf '"+text+"' >"+dropIn+" && systemctl try-reload-or-restart bpfbroker.service")
	}
	left := func(id string) string {
		return must(t, "alice", "bpfbroker list --json=short | grep -o '\"id\":\""+id+"\".*' | grep -o '\"expires\":[0-9]*' | head -n1")
	}
	pid, id := mounted(t)
	before := left(id)
	reload(`[Profile]\nLease=1h\n`)
	if after := left(id); after == "" || after >= before {
		t.Errorf("the lease ended at %s, and now at %s", before, after)
	}
	reload(`[Delegate]\nMapps=hash\n`)
	journalHas(t, "MESSAGE_ID=bc63d51c50ee4ac29f423fc6d16fa04d", "BPFBROKER_PROFILE=network")
	refused(t, "alice", "bpfbroker renew "+id, 1, "narrow.conf:2")
	reload(`[Profile]\nLease=1h\n`)
	must(t, "alice", "bpfbroker renew "+id)
	reload(`[Delegate]\nMaps=\nMaps=hash\n`)
	if list := must(t, "alice", "bpfbroker list --no-legend"); list != "" {
		t.Errorf("after the reload there are:\n%s", list)
	}
	journalHas(t, "MESSAGE_ID=fcf1b7bb64b148f6ad5d4ca8a486e05b", "BPFBROKER_GRANT="+id)
	eventually(t, "it is unmounted", func() bool { return run(t, "root", "grep ' /mnt .* - bpf ' /proc/"+pid+"/mountinfo").code != 0 })
	refused(t, "alice", "bpfbroker renew "+id, 1, "no such grant")

	// The same when the daemon was away.
	must(t, "root", "rm "+dropIn+"; systemctl try-reload-or-restart bpfbroker.service")
	_, id = mounted(t)
	must(t, "root", "systemctl reset-failed bpfbroker.service; systemctl stop bpfbroker.service")
	must(t, "root", `printf '[Guard]\nMaxMaps=1\n' >`+dropIn)
	if list := must(t, "alice", "bpfbroker list --no-legend"); list != "" {
		t.Errorf("after the restart there are:\n%s", list)
	}
	journalHas(t, "MESSAGE_ID=fcf1b7bb64b148f6ad5d4ca8a486e05b", "BPFBROKER_GRANT="+id)
}

// The target's owner can keep a helper from answering, and gets an error for it;
// others notice nothing, and nothing stays.
func TestTargetHangs(t *testing.T) {
	leavesNothing(t)
	_, pid := start(t, "alice", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
	pid = strings.TrimSpace(pid)
	daemon := strings.TrimSpace(must(t, "root", "systemctl show -P MainPID bpfbroker.service"))
	stopper, _ := start(t, "alice", "exec hostile stop "+daemon)
	for _, command := range []string{"token-client mount " + pid + " network /mnt", manager + "MountToken susa{sv} network " + pid + " /mnt 0"} {
		eventually(t, "a helper is stopped", func() bool {
			begun := time.Now()
			r := run(t, "alice", command)
			if took := time.Since(begun); took > slow*12*time.Second {
				t.Errorf("it took %v", took)
			}
			return strings.Contains(r.err, "the target does not answer")
		})
		must(t, "root", within(2, "bpfbroker run -p network -- true"))
	}
	_ = machines.Signal(stopper, syscall.SIGKILL)
	must(t, "alice", "bpfbroker -q revoke $(bpfbroker list --no-legend | cut -d' ' -f1) 2>/dev/null || true")
}
