// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// Unmodified programs find the token that "bpfbroker run" sets up for them.
func TestRunUnmodifiedPrograms(t *testing.T) {
	for name, command := range map[string]string{
		"libbpf":      "/usr/sbin/bpftool prog load " + object + " /sys/fs/bpf/count && test -e /sys/fs/bpf/count",
		"cilium/ebpf": "ebpf-example",
	} {
		t.Run(name, func(t *testing.T) {
			leavesNothing(t)
			if r := run(t, "alice", command); r.code == 0 || r.code == 127 {
				t.Fatalf("it works, or fails, without a token: %+v", r)
			}
			must(t, "alice", "bpfbroker run -p network -- bash -c '"+command+"'")
			must(t, "alice", "bpfbroker run --root -p network -- bash -c '"+command+"'")
		})
	}
}

// The profile's rights and no more.
func TestRunHoldsToTheProfile(t *testing.T) {
	leavesNothing(t)
	r := run(t, "alice", "bpfbroker run -p network -- ebpf-example kprobe")
	if r.code != 1 || !strings.Contains(r.err, "operation not permitted") {
		t.Errorf("a kprobe program: %+v", r)
	}
}

func TestRunRefused(t *testing.T) {
	leavesNothing(t)
	for _, test := range []struct {
		user, profile string
		code          int
		text          string
	}{
		{"alice", "tracing", 77, "(polkit)"},
		{"bob", "network", 77, "(polkit)"},
		{"alice", "nonesuch", 1, "(profile)"},
		{"alice", "../../etc/passwd", 1, "(profile)"},
	} {
		refused(t, test.user, "bpfbroker run -p "+test.profile+" -- touch /tmp/it-ran", test.code, test.text)
	}
	must(t, "root", "! test -e /tmp/it-ran")
	journalHas(t, "MESSAGE_ID=7a7aea26eed040f2a24bebf37e302058", "BPFBROKER_OWNER=1001", "BPFBROKER_PROFILE=network")
}

func TestRunIsTransparent(t *testing.T) {
	leavesNothing(t)
	const run1 = "bpfbroker run -p network -- "
	for _, test := range []struct {
		command string
		code    int
	}{
		{"true", 0}, {"bash -c 'exit 7'", 7}, {"bash -c 'kill -9 $$'", 137}, {"/no/such/program", 127}, {"/etc/passwd", 126},
	} {
		if r := run(t, "alice", run1+test.command); r.code != test.code {
			t.Errorf("%s: %+v, want exit status %d", test.command, r, test.code)
		}
	}
	// What a program sees of itself is what it sees without bpfbroker.
	const self = `bash -c 'id -u; id -g; ulimit -n; ulimit -Hn; pwd; grep -E "^Sig(Blk|Ign)|^NoNewPrivs|^Seccomp:" /proc/self/status; ls /proc/self/fd; env | sort | grep -v -e ^_= -e ^LIBBPF_BPF_TOKEN_PATH='`
	if without, with := must(t, "alice", self), must(t, "alice", run1+self); without != with {
		t.Errorf("without bpfbroker run:\n%swith:\n%s", without, with)
	}
	if got := must(t, "alice", run1+"bash -c 'echo $LIBBPF_BPF_TOKEN_PATH; cat'"+" <<<input"); got != "/sys/fs/bpf\ninput\n" {
		t.Errorf("environment and input: %q", got)
	}
	if got := must(t, "alice", "bpfbroker run --root -p network id -u"); got != "0\n" {
		t.Errorf("--root: uid %q", got)
	}
}

func TestRunForwardsSignals(t *testing.T) {
	leavesNothing(t)
	cmd, _ := start(t, "alice", `exec bpfbroker run -p network -- bash -c 'trap "exit 3" USR1; echo ready; while :; do sleep 0.05; done'`)
	if err := machines.Signal(cmd, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("ended with %v, want exit status 3", err)
	}
}

func TestListAndRevoke(t *testing.T) {
	leavesNothing(t)
	start(t, "alice", "exec bpfbroker run -p network -- bash -c 'echo ready; exec sleep 60'")
	var grants []struct {
		ID, Profile, Tier, Path string
		Owner, Process          int
	}
	list := must(t, "alice", "bpfbroker list --json=short")
	if err := json.Unmarshal([]byte(list), &grants); err != nil || len(grants) != 1 {
		t.Fatalf("%v in %s", err, list)
	}
	g := grants[0]
	if g.Profile != "network" || g.Tier != tiers["network"] || g.Path != "/sys/fs/bpf" || g.Owner != 1000 {
		t.Errorf("got %+v", g)
	}
	journalHas(t, "MESSAGE_ID=6a2746b8426c40ad84aa22ae58c4d647", "BPFBROKER_GRANT="+g.ID)

	// Others neither see it nor end it, nor learn that it is there.
	if got := must(t, "bob", "bpfbroker list --no-legend"); got != "" {
		t.Errorf("bob sees %s", got)
	}
	refused(t, "bob", "bpfbroker revoke "+g.ID, 1, "no such grant")
	refused(t, "bob", "bpfbroker revoke 0123456789abcdef", 1, "no such grant")

	mounts := fmt.Sprintf("grep -c ' /sys/fs/bpf .* - bpf ' /proc/%d/mountinfo", g.Process)
	before := must(t, "root", mounts)
	const unguarded = kernel == "" // nothing reaches tokens that were created
	if r := run(t, "alice", "bpfbroker revoke "+g.ID); r.code != 0 || strings.Contains(r.err, "did not reach") != unguarded {
		t.Errorf("revoke: %+v", r)
	}
	if got := must(t, "alice", "bpfbroker list --no-legend"); got != "" {
		t.Errorf("after revoking there is %s", got)
	}
	if after := must(t, "root", mounts); after == before {
		t.Errorf("%s mounts before and after revoking", strings.TrimSpace(after))
	}
	journalHas(t, "MESSAGE_ID=ff336156ee674fca9617fa85942fadb4", "BPFBROKER_GRANT="+g.ID)
}

// A grant ends with its process.
func TestGrantEndsWithProcess(t *testing.T) {
	leavesNothing(t)
	cmd, _ := start(t, "alice", "exec bpfbroker run -p network -- bash -c 'echo ready; exec sleep 60'")
	id := must(t, "alice", "bpfbroker list --no-legend | cut -d' ' -f1")
	if err := machines.Signal(cmd, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	journalHas(t, "MESSAGE_ID=ef1a2001282246b7a9173eec22681e37", "BPFBROKER_GRANT="+strings.TrimSpace(id))
}

// A process that is in a namespace of its own gets a token for itself, with
// the profile's masks and nothing else.
func TestTokenForOneself(t *testing.T) {
	leavesNothing(t)
	_, first := start(t, "alice", "exec unshare -Urm token-client token network")
	for _, line := range []string{"allowed_cmds:\t0x40021\n"} {
		if !strings.Contains(first, line) {
			t.Errorf("the token says %q, want %q", first, line)
		}
	}
	refused := run(t, "alice", "token-client token network")
	if !strings.HasPrefix(refused.out, "NamespaceInitial target") {
		t.Errorf("in the initial namespace: %+v", refused)
	}
}

func TestProfilesAndCheck(t *testing.T) {
	var profiles []struct{ Name, Tier string }
	if err := json.Unmarshal([]byte(must(t, "alice", "bpfbroker profiles -j")), &profiles); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, p := range profiles {
		got[p.Name] = p.Tier
	}
	if diff := cmp.Diff(tiers, got); diff != "" {
		t.Errorf("tiers (-want +got):\n%s", diff)
	}
	if show := must(t, "bob", "bpfbroker profile show network"); !strings.Contains(show, "xdp") {
		t.Errorf("profile show: %s", show)
	}
	if check := must(t, "alice", "bpfbroker check"); !strings.Contains(check, "BPF tokens") || !strings.Contains(check, "polkit rule") {
		t.Errorf("check: %s", check)
	}
}

// Only polkit decides for others than root, and only root passes without it.
func TestPolkitAbsent(t *testing.T) {
	leavesNothing(t)
	must(t, "root", "systemctl mask --runtime --now polkit.service")
	t.Cleanup(func() { must(t, "root", "systemctl unmask --runtime polkit.service && systemctl start polkit.service") })
	refused(t, "alice", "bpfbroker run -p network -- true", 77, "polkit")
	must(t, "root", "bpfbroker run -p network -- true")
}

// A hanging polkit holds up nobody else, and a caller who leaves leaves nothing.
func TestPolkitHangs(t *testing.T) {
	leavesNothing(t)
	pid := strings.TrimSpace(must(t, "root", "systemctl start polkit.service && systemctl show -P MainPID polkit.service"))
	must(t, "root", "kill -STOP "+pid)
	resume := func() { must(t, "root", "kill -CONT "+pid) }
	t.Cleanup(resume)
	if r := run(t, "alice", within(1, "bpfbroker run -p network -- touch /tmp/it-ran")); r.code != 124 {
		t.Errorf("with a stopped polkit: %+v", r)
	}
	must(t, "root", within(5, "bpfbroker run -p network -- true"))
	must(t, "bob", within(5, "bpfbroker profiles"))
	resume() // it answers after the client has gone
	must(t, "root", "sleep 0.5; ! test -e /tmp/it-ran")
	if got := must(t, "alice", "bpfbroker list --no-legend"); got != "" {
		t.Errorf("a grant for nobody: %s", got)
	}
}

// On a terminal, bpfbroker brings an agent, and an administrator's password
// opens what a rule doesn't.
func TestPassword(t *testing.T) {
	leavesNothing(t)
	session := login(t, "bob")
	for password, want := range map[string]int{"secret": 0, "wrong": 77} {
		cmd := session.Command(t.Context(), "script", "--quiet", "--return", "--command", "bpfbroker run -p tracing -- id -un", "/dev/null")
		// script needs an input that doesn't end.
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var out transcript
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a password is asked for", func() bool { return strings.Contains(out.String(), "Password: ") })
		time.Sleep(slow * 200 * time.Millisecond) // what is typed before it listens is lost
		if _, err := stdin.Write([]byte(password + "\n")); err != nil {
			t.Fatal(err)
		}
		err = cmd.Wait()
		if code := exitCode(t, err); code != want || (code == 0) != strings.Contains(out.String(), "bob\r\n") {
			t.Errorf("password %q: exit status %d, want %d\n%s", password, code, want, out.String())
		}
	}
}

// polkit's question goes away with the one who asked.
func TestLeavingDuringTheQuestion(t *testing.T) {
	leavesNothing(t)
	session := login(t, "bob")
	cmd := session.Command(t.Context(), "script", "--quiet", "--return", "--command", "bpfbroker run -p tracing -- touch /tmp/it-ran", "/dev/null")
	// script needs an input that doesn't end.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a password is asked for", func() bool { return run(t, "root", "pgrep -x polkit-agent-he").code == 0 })
	if err := machines.Signal(cmd, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, "nobody is asked any more", func() bool { return run(t, "root", "pgrep -x pkttyagent").code != 0 })
	must(t, "root", "! test -e /tmp/it-ran")
}

// Whoever sits at the machine gets what the tier basic is, unasked.
func TestActiveSession(t *testing.T) {
	leavesNothing(t)
	mapsProfile(t)
	refused(t, "bob", "bpfbroker run -p maps -- true", 77, "(polkit)")
	session := login(t, "bob")
	out, err := session.Command(t.Context(), "bpfbroker", "run", "-p", "maps", "--", "id", "-un").CombinedOutput()
	if err != nil || string(out) != "bob\n" {
		t.Errorf("in an active session: %v\n%s", err, out)
	}
	// While bob sits there, polkit takes his services for his session's.
	must(t, "bob", "XDG_RUNTIME_DIR=/run/user/1001 systemd-run --user --quiet --collect --wait --pipe bpfbroker run -p maps -- true")
}
