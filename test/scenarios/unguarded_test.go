// SPDX-License-Identifier: Apache-2.0

//go:build !kernels

package scenarios

// These are about a kernel that refuses the guard, which Debian's don't: what the
// guard changes is in guard_test.go.

import (
	"fmt"
	"strings"
	"testing"
)

// A profile whose limits the kernel's masks don't hold is refused where nothing
// else does, unless the administrator has said otherwise.
func TestGuardUnavailable(t *testing.T) {
	leavesNothing(t)
	must(t, "root", "mv /etc/bpfbroker/profiles.d/network.profile.d /tmp/ && systemctl try-reload-or-restart bpfbroker.service")
	t.Cleanup(func() {
		must(t, "root", "mv /tmp/network.profile.d /etc/bpfbroker/profiles.d/ && systemctl try-reload-or-restart bpfbroker.service")
	})
	refused(t, "alice", "bpfbroker run -p network -- true", 1, "(guard)")
	refused(t, "root", "bpfbroker run -p network -- true", 1, "Guard=optional")
}

// Exit statuses of pkcheck(1).
const (
	yes       = 0
	no        = 1 // and no password changes it
	challenge = 2 // an administrator's password would do
)

// ask asks polkitd in the broker's stead: also about what can't be had here, as
// the guard isn't there. details is what pkcheck takes.
func ask(t *testing.T, user, action string, details string) int {
	t.Helper()
	return run(t, "root", `setpriv --reuid `+user+` --regid `+user+` --init-groups sleep 60 & pid=$!
trap "kill $pid" EXIT
until grep -qx sleep /proc/$pid/comm; do sleep 0.01; done
for detail in `+details+`; do args+=(--detail "${detail%%=*}" "${detail#*=}"); done
pkcheck --action-id org.bpfbroker.`+action+` --process $pid "${args[@]}"`).code
}

// Each example allows what it says, and nothing else. alice is in group bpf, bob
// isn't.
func TestExamples(t *testing.T) {
	leavesNothing(t)
	must(t, "root", "useradd --system profiler")
	t.Cleanup(func() { must(t, "root", "userdel profiler") })
	// The machine's own example is in every row.
	const guarded, unguarded = " guard=active target.uid=1000", " guard=absent target.uid=1000"
	const hers = " peer.unit=user@1000.service peer.user-unit=profiler.service"
	type question struct {
		user, action, details string
		want                  int
	}
	for names, questions := range map[string][]question{
		"05-no-tracing.rules": {
			{"alice", "token-tracing", "profile=tracing tier=tracing" + guarded, no},
			{"bob", "token-tracing", "profile=tracing tier=tracing" + guarded, no},
			{"alice", "token-tracing-others", "profile=tracing tier=tracing" + guarded, no},
			{"alice", "token-unlimited", "profile=unlimited tier=unlimited" + guarded, no},
			{"alice", "token-unlimited-others", "profile=unlimited tier=unlimited" + guarded, no},
			{"alice", "token-tracing", "profile=basic tier=tracing" + unguarded, no},
			{"alice", "token-unlimited", "profile=network tier=unlimited" + unguarded, no},
			{"alice", "token-basic", "profile=basic tier=basic" + guarded, challenge},
			{"alice", "token-network", "profile=network tier=network" + guarded, challenge},
		},
		"05-no-tracing.rules 10-bpf-group.rules": {
			{"alice", "token-network", "profile=network tier=network" + guarded, yes},
			{"alice", "token-tracing", "profile=tracing tier=tracing" + guarded, no},
			{"bob", "token-network", "profile=network tier=network" + guarded, challenge},
		},
		"10-bpf-group.rules": {
			{"alice", "token-basic", "profile=basic tier=basic" + guarded, yes},
			{"alice", "token-network", "profile=network tier=network" + guarded, yes},
			{"alice", "token-basic", "profile=maps tier=basic guard=unneeded target.uid=1000", yes},
			{"alice", "token-basic-others", "profile=basic tier=basic" + guarded, challenge},
			{"alice", "token-network-others", "profile=network tier=network" + guarded, challenge},
			{"alice", "token-tracing", "profile=tracing tier=tracing" + guarded, challenge},
			{"alice", "token-tracing", "profile=basic tier=tracing" + unguarded, challenge},
			{"alice", "token-unlimited", "profile=unlimited tier=unlimited" + guarded, challenge},
			{"alice", "manage-grants", "", challenge},
			{"bob", "token-basic", "profile=basic tier=basic" + guarded, challenge},
			{"bob", "token-network", "profile=network tier=network" + guarded, challenge},
		},
		"20-network-without-guard.rules": {
			{"alice", "token-unlimited", "profile=network tier=unlimited" + unguarded, yes},
			{"alice", "token-unlimited-others", "profile=network tier=unlimited" + unguarded, challenge},
			{"alice", "token-unlimited", "profile=network tier=unlimited" + guarded, challenge},
			{"alice", "token-unlimited", "profile=tracing tier=unlimited" + unguarded, challenge},
			{"alice", "token-network", "profile=network tier=network" + guarded, challenge},
			{"bob", "token-unlimited", "profile=network tier=unlimited" + unguarded, challenge},
		},
		"30-one-service.rules": {
			{"profiler", "token-tracing", "profile=tracing tier=tracing peer.unit=profiler.service" + guarded, yes},
			{"profiler", "token-unlimited", "profile=tracing tier=unlimited peer.unit=profiler.service" + unguarded, yes},
			{"profiler", "token-unlimited", "profile=tracing tier=unlimited peer.unit=profiler.service" + guarded, challenge},
			{"profiler", "token-tracing-others", "profile=tracing tier=tracing peer.unit=profiler.service" + guarded, challenge},
			{"profiler", "token-tracing", "profile=basic tier=tracing peer.unit=profiler.service" + unguarded, challenge},
			{"profiler", "token-tracing", "profile=tracing tier=tracing peer.unit=cron.service" + guarded, challenge},
			{"profiler", "token-tracing", "profile=tracing tier=tracing peer.unit=user@1000.service peer.user-unit=profiler.service" + guarded, challenge},
			{"alice", "token-tracing", "profile=tracing tier=tracing peer.unit=profiler.service" + guarded, challenge},
		},
		"31-one-user-service.rules": {
			{"alice", "token-tracing", "profile=tracing tier=tracing" + hers + guarded, yes},
			{"alice", "token-unlimited", "profile=tracing tier=unlimited" + hers + unguarded, yes},
			{"alice", "token-unlimited", "profile=tracing tier=unlimited" + hers + guarded, challenge},
			{"alice", "token-tracing-others", "profile=tracing tier=tracing" + hers + guarded, challenge},
			{"alice", "token-unlimited", "profile=unlimited tier=unlimited" + hers + guarded, challenge},
			{"alice", "token-tracing", "profile=tracing tier=tracing peer.unit=user@1000.service peer.user-unit=other.service" + guarded, challenge},
			{"alice", "token-tracing", "profile=tracing tier=tracing peer.unit=profiler.service" + guarded, challenge},
			{"bob", "token-tracing", "profile=tracing tier=tracing" + hers + guarded, challenge},
		},
	} {
		t.Run(names, func(t *testing.T) {
			rules(t, strings.Fields(names)...)
			for _, q := range questions {
				if got := ask(t, q.user, q.action, q.details); got != q.want {
					t.Errorf("%s, %s, %s: pkcheck says %d, want %d", q.user, q.action, q.details, got, q.want)
				}
			}
		})
	}
}

// The examples, by what users get of them where there is no guard.
func TestExamplesWithoutGuard(t *testing.T) {
	leavesNothing(t)
	mapsProfile(t)
	const get = "bpfbroker run --no-ask-password -p %s -- true"
	t.Run("bpf group", func(t *testing.T) {
		refused(t, "alice", fmt.Sprintf(get, "maps"), 77, "(polkit)")
		rules(t, "10-bpf-group.rules")
		must(t, "alice", fmt.Sprintf(get, "maps"))
		must(t, "root", session("alice")+fmt.Sprintf(get, "maps"))
		refused(t, "alice", fmt.Sprintf(get, "basic"), 77, "(polkit)")
		refused(t, "bob", fmt.Sprintf(get, "maps"), 77, "(polkit)")
	})
	t.Run("one service", func(t *testing.T) {
		rules(t, "30-one-service.rules")
		must(t, "root", "useradd --system profiler")
		t.Cleanup(func() { must(t, "root", "userdel profiler") })
		const start = "systemd-run --quiet --collect --wait --pipe -p NotifyAccess=main -p User=profiler --unit="
		must(t, "root", start+"profiler "+fmt.Sprintf(get, "tracing"))
		refused(t, "root", start+"profiler "+fmt.Sprintf(get, "unlimited"), 77, "(polkit)")
		refused(t, "root", start+"other "+fmt.Sprintf(get, "tracing"), 77, "(polkit)")
	})
	t.Run("no tracing", func(t *testing.T) {
		rules(t, "05-no-tracing.rules")
		must(t, "root", "printf '%s' 'polkit.addRule(function(action, subject) { if (action.id == \"org.bpfbroker.token-unlimited\") return polkit.Result.YES; });' >/etc/polkit-1/rules.d/06-yes.rules; systemctl reset-failed polkit.service; systemctl restart polkit.service")
		t.Cleanup(func() { must(t, "root", "rm -f /etc/polkit-1/rules.d/0[46]-yes.rules") })
		const denied = "polkit denies it (polkit)"
		for _, profile := range []string{"basic", "network", "tracing", "unlimited"} {
			refused(t, "alice", fmt.Sprintf(get, profile), 77, denied)
		}
		// An administrator sits beside bob, and nobody is asked.
		s := login(t, "bob")
		agent := startAgent(t, s, "wait")
		out, err := s.Command(t.Context(), "bpfbroker", "run", "-p", "tracing", "--", "true").CombinedOutput()
		if code := exitCode(t, err); code != 77 || !strings.Contains(string(out), denied) {
			t.Errorf("in a session: exit status %d\n%s", code, out)
		}
		if asked := agent.String(); asked != "registered\n" {
			t.Errorf("somebody is asked: %s", asked)
		}
		must(t, "root", "bpfbroker run -p tracing -- true")
		// The first file that has an answer decides.
		must(t, "root", "cd /etc/polkit-1/rules.d; mv 06-yes.rules 04-yes.rules; systemctl reset-failed polkit.service; systemctl restart polkit.service")
		must(t, "alice", fmt.Sprintf(get, "tracing"))
	})
}
