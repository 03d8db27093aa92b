// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"strings"
	"testing"
)

const (
	examples = "/usr/share/doc/bpfbroker/"
	// ofAlice is for commands that talk to alice's service manager.
	ofAlice = "export XDG_RUNTIME_DIR=/run/user/1000; "
	// service runs what follows as alice's service of the name %s, waits for it,
	// and has its status and output.
	service = ofAlice + "systemd-run --user --quiet --collect --wait --pipe --expand-environment=no -p NotifyAccess=main --unit=%s -- "
)

// linger has alice's manager run without a session of hers until the test's end.
func linger(t *testing.T) {
	t.Helper()
	must(t, "root", "loginctl enable-linger alice")
	eventually(t, "alice's manager runs", func() bool {
		return run(t, "alice", ofAlice+"systemctl --user is-system-running --wait").code == 0
	})
	t.Cleanup(func() {
		must(t, "root", "loginctl disable-linger alice")
		eventually(t, "alice's manager ends", func() bool { return run(t, "root", "systemctl is-active user@1000.service").code != 0 })
	})
	if sessions := must(t, "root", "loginctl list-sessions --no-legend | grep -vw manager || true"); sessions != "" {
		t.Fatalf("somebody is logged in: %s", sessions)
	}
}

// rules has polkit read examples of the documentation until the test's end.
func rules(t *testing.T, names ...string) {
	t.Helper()
	copied := []string{"-f"}
	for _, name := range names {
		to := "/etc/polkit-1/rules.d/" + name
		if run(t, "root", "test -e "+to).code == 0 {
			continue // the whole machine's
		}
		copied = append(copied, to)
		must(t, "root", "cp "+examples+"polkit/"+name+" "+to)
	}
	// polkitd reads new rules by itself, some time later.
	const reread = "systemctl reset-failed polkit.service; systemctl restart polkit.service"
	must(t, "root", reread)
	t.Cleanup(func() { must(t, "root", "rm "+strings.Join(copied, " ")+"; "+reread) })
}

// A user's service with the drop-in of the documentation is one like any other:
// to its manager, what runs is the service's own program.
func TestUserService(t *testing.T) {
	leavesNothing(t)
	linger(t)
	for _, name := range []string{"profiler", "other"} {
		must(t, "alice", `mkdir -p ~/.config/systemd/user/`+name+`.service.d && cd ~/.config/systemd/user && cat >`+name+`.service <<END
[Service]
Type=notify
ExecStart=/usr/local/bin/service
ExecReload=kill -HUP \$MAINPID
WatchdogSec=1s
WatchdogSignal=SIGKILL
END
cat >`+name+`.socket <<END
[Socket]
ListenStream=%t/`+name+`
END
sed -e 's|-p network|-p tracing|' -e 's|/usr/bin/example --option|/usr/local/bin/service|' `+examples+`units/profile.conf >`+name+`.service.d/profile.conf`)
	}
	must(t, "alice", ofAlice+"systemctl --user daemon-reload && systemd-analyze --user verify --man=no profiler.service && systemctl --user start profiler.socket")
	t.Cleanup(func() {
		must(t, "alice", ofAlice+"systemctl --user stop profiler.socket profiler.service other.service; rm -r ~/.config/systemd; systemctl --user daemon-reload; systemctl --user reset-failed")
	})
	show := func(unit, property string) string {
		return strings.TrimSpace(must(t, "alice", ofAlice+"systemctl --user show -P "+property+" "+unit+".service"))
	}
	refusedStart := func(unit string) {
		t.Helper()
		if r := run(t, "alice", ofAlice+"systemctl --user start "+unit+".service"); r.code == 0 || show(unit, "ExecMainStatus") != "77" {
			t.Errorf("%s.service: %+v, its exit status is %s", unit, r, show(unit, "ExecMainStatus"))
		}
		must(t, "alice", ofAlice+"systemctl --user reset-failed "+unit+".service")
	}
	output := func() string {
		t.Helper()
		out, err := machine.Journal(t.Context(), "--output=cat", "USER_UNIT=profiler.service", "+", "_SYSTEMD_USER_UNIT=profiler.service", "+", "_UID=1000", "SYSLOG_IDENTIFIER=bpfbroker")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	refusedStart("profiler")
	if out := output(); !strings.Contains(out, "ask the administrator for a polkit rule") {
		t.Errorf("the journal has no reason:\n%s", out)
	}
	rules(t, "31-one-user-service.rules")
	refusedStart("other")

	must(t, "alice", ofAlice+"systemctl --user start profiler.service")
	pid := show("profiler", "MainPID")
	if want := "pid " + pid + ", 1 sockets, watchdog 1s, direct true"; show("profiler", "StatusText") != want {
		t.Errorf("it says %q, want %q", show("profiler", "StatusText"), want)
	}
	for command, want := range map[string]string{
		"cat /proc/" + pid + "/comm":                                              "service",
		"grep PPid /proc/" + pid + "/status | cut -f2":                            strings.TrimSpace(must(t, "root", "systemctl show -P MainPID user@1000.service")),
		"cat /sys/fs/cgroup" + show("profiler", "ControlGroup") + "/cgroup.procs": pid,
		"grep -c ' /sys/fs/bpf .* - bpf ' /proc/" + pid + "/mountinfo":            "2",
		"bpfbroker list --all --no-legend | grep -c profiler.service":             "1",
	} {
		if got := strings.TrimSpace(must(t, "root", command)); got != want {
			t.Errorf("%s: got %q, want %q", command, got, want)
		}
	}
	must(t, "alice", ofAlice+"sleep 2; systemctl --user reload profiler.service")
	if show("profiler", "ActiveState") != "active" || show("profiler", "MainPID") != pid {
		t.Errorf("after more time than its watchdog has it is %s", show("profiler", "ActiveState"))
	}
	must(t, "alice", ofAlice+"systemctl --user stop profiler.service")
	if result := show("profiler", "Result") + show("profiler", "ExecMainStatus"); result != "exit-code3" {
		t.Errorf("it ended with %s", result)
	}
	out := output()
	for text, count := range map[string]int{"got hangup": 1, "got terminated": 1, "further signals: 0": 1, "not our child": 0} {
		if strings.Count(out, text) != count {
			t.Errorf("the journal has %q other than %d times:\n%s", text, count, out)
		}
	}

	must(t, "alice", ofAlice+"systemctl --user reset-failed profiler.service; systemctl --user start profiler.service; systemctl --user kill --signal=STOP profiler.service")
	eventually(t, "its watchdog bites", func() bool { return show("profiler", "Result") == "watchdog" })
	must(t, "alice", ofAlice+"systemctl --user reset-failed profiler.service")
}

// A service's end is that of its program, however that ends.
func TestUserServiceStatus(t *testing.T) {
	leavesNothing(t)
	linger(t)
	must(t, "alice", "printf '#!/no/such/interpreter\n' >~/broken && chmod +x ~/broken")
	t.Cleanup(func() { must(t, "alice", "rm ~/broken") })
	for command, want := range map[string]int{
		"true": 0, "bash -c 'exit 7'": 7, "~/broken": 126, "/no/such/program": 127, "ebpf-example": 0,
		"bash -c 'test $(ulimit -n):$(ulimit -Hn) = 321:654'":                           0,
		"bash -c '! test -v LISTEN_PID && test $SYSTEMD_EXEC_PID = $$'":                 0,
		"bash -c 'bpfbroker run -p network -- bash -c \"exit 5\" 2>/dev/null; exit $?'": 5, // nested
	} {
		if r := run(t, "alice", strings.Replace(fmt.Sprintf(service, "status"), "-p ", "-p LimitNOFILE=321:654 -p ", 1)+"bpfbroker run -p network -- "+command); r.code != want {
			t.Errorf("%s: %+v, want exit status %d", command, r, want)
		}
	}
	// It ignores the signals that it would ignore without bpfbroker: what the
	// machine was started with is among them.
	ignored := fmt.Sprintf(service, "status") + "%s grep ^SigIgn: /proc/self/status"
	plain, granted := must(t, "alice", fmt.Sprintf(ignored, "")), must(t, "alice", fmt.Sprintf(ignored, "bpfbroker run -p network --"))
	if granted != plain {
		t.Errorf("it ignores %q, a service without bpfbroker %q", granted, plain)
	}
	// What isn't a service's main process waits for its command.
	for command, want := range map[string]int{
		"bash -c 'bpfbroker run -p network -- bash -c \"sleep 0.2; exit 5\"; exit $(($? + 1))'": 6,
	} {
		if r := run(t, "alice", fmt.Sprintf(service, "status")+command); r.code != want {
			t.Errorf("%s: %+v, want exit status %d", command, r, want)
		}
	}
	// What has a user namespace of the manager's making gets one inside that.
	sandboxed := strings.Replace(fmt.Sprintf(service, "status"), "-p ", "-p PrivateUsers=yes -p ", 1)
	must(t, "alice", sandboxed+"bpfbroker run -p network -- ebpf-example")
	r := run(t, "alice", strings.Replace(fmt.Sprintf(service, "status"), "-p NotifyAccess=main", "", 1)+"bpfbroker run -p network -- bash -c 'exit 7'")
	if r.code != 7 {
		t.Errorf("without a manager that listens: %+v", r)
	}
}

// What "peer.user-unit" is worth: it is the word of whoever has the manager.
func TestUserUnitForged(t *testing.T) {
	leavesNothing(t)
	linger(t)
	rules(t, "31-one-user-service.rules")
	const tracing = "bpfbroker run --no-ask-password -p tracing -- true"
	refused(t, "alice", tracing, 77, "(polkit)")
	refused(t, "alice", fmt.Sprintf(service, "other")+tracing, 77, "(polkit)")
	refused(t, "alice", fmt.Sprintf(service, "profiler")+"bpfbroker run --no-ask-password -p unlimited -- true", 77, "(polkit)")

	// alice can be that service by her manager, and by her control groups.
	must(t, "alice", fmt.Sprintf(service, "profiler")+tracing)
	const move = `bash -c 'cd /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/../ && mkdir -p profiler.service && echo $$ >profiler.service/cgroup.procs && exec `
	must(t, "alice", strings.Replace(fmt.Sprintf(service, "other"), "-p NotifyAccess=main", "", 1)+move+tracing+"'")
	// But not from where she has been put by others, and no unit of the system's.
	const group = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/profiler.service"
	refused(t, "alice", "mkdir -p "+group+" && bash -c 'echo $$ >"+group+"/cgroup.procs'", 1, "Permission denied")
	must(t, "alice", "rmdir "+group)
	refused(t, "alice", "mkdir /sys/fs/cgroup/system.slice/profiler.service", 1, "Permission denied")

	// The name alone is nothing: bob's own service has it too.
	must(t, "root", "loginctl enable-linger bob")
	t.Cleanup(func() { must(t, "root", "loginctl disable-linger bob") })
	eventually(t, "bob's manager runs", func() bool {
		return run(t, "bob", "XDG_RUNTIME_DIR=/run/user/1001 systemctl --user is-system-running --wait").code == 0
	})
	refused(t, "bob", strings.ReplaceAll(fmt.Sprintf(service, "profiler"), "1000", "1001")+tracing, 77, "(polkit)")
	refused(t, "bob", "bash -c 'echo $$ >/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.procs'", 1, "Permission denied")
}

// Whoever kills bpfbroker before its command runs has killed the command too.
func TestUserServiceKilledEarly(t *testing.T) {
	leavesNothing(t)
	linger(t)
	must(t, "root", "systemctl start polkit.service && systemctl kill --signal=STOP polkit.service")
	resume := func() { must(t, "root", "systemctl kill --signal=CONT polkit.service") }
	t.Cleanup(resume)
	must(t, "alice", ofAlice+"systemd-run --user --quiet --collect -p NotifyAccess=main -p KillMode=process --unit=killed bpfbroker run -p network -- touch /tmp/it-ran")
	// bpfbroker, and what is to be the command.
	const processes = "pgrep -c -u alice -f 'bpfbroker run -p network' || true"
	eventually(t, "bpfbroker waits for polkit", func() bool { return must(t, "root", processes) == "2\n" })
	must(t, "alice", ofAlice+"systemctl --user kill --kill-whom=main --signal=KILL killed.service")
	eventually(t, "both have gone", func() bool { return must(t, "root", processes) == "0\n" })
	resume()
	must(t, "root", "sleep 0.5; ! test -e /tmp/it-ran")
}
