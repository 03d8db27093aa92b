// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"strconv"
	"strings"
	"testing"
)

// What isn't a call gets an error of its own, and nobody else notices.
func TestNonsenseOnTheSocket(t *testing.T) {
	leavesNothing(t)
	const get = `{"method":"org.varlink.service.GetInfo"}`
	for name, test := range map[string]struct{ command, want string }{
		"bad JSON":               {`raw '{"method"'`, "InvalidMessage"},
		"unknown interface":      {`raw '{"method":"org.example.X"}'`, "InterfaceNotFound"},
		"unknown method":         {`raw '{"method":"org.bpfbroker.Broker.X"}'`, "MethodNotFound"},
		"unknown parameter":      {`raw '{"method":"org.bpfbroker.Broker.ListProfiles","parameters":{"x":1}}'`, "InvalidParameter"},
		"wrong type":             {`raw '{"method":"org.bpfbroker.Broker.DescribeProfile","parameters":{"profile":1}}'`, "InvalidParameter"},
		"missing parameter":      {`raw '{"method":"org.bpfbroker.Broker.DescribeProfile"}'`, "InvalidParameter"},
		"10 MiB without an end":  {`flood 10485760`, "MessageTooLarge"},
		"descriptor, no index":   {`fds 1 '` + get + `'`, "UnexpectedFileDescriptor"},
		"three descriptors":      {`fds 3 '{"method":"org.bpfbroker.Broker.MountToken","parameters":{"profile":"network","processFileDescriptor":0,"path":"/mnt"}}'`, "TooManyFileDescriptors"},
		"index, no descriptor":   {`raw '{"method":"org.bpfbroker.Broker.MountToken","parameters":{"profile":"network","processFileDescriptor":0,"path":"/mnt"}}'`, "NoSuchFileDescriptor"},
		"wrong index":            {`fds 1 '{"method":"org.bpfbroker.Broker.MountToken","parameters":{"profile":"network","processFileDescriptor":7,"path":"/mnt"}}'`, "NoSuchFileDescriptor"},
		"descriptor of no pidfd": {`fds 1 '{"method":"org.bpfbroker.Broker.MountToken","parameters":{"profile":"network","processFileDescriptor":0,"path":"/mnt"}}' </dev/null`, "NotAPidFD"},
	} {
		if r := run(t, "alice", "hostile "+test.command); !strings.Contains(r.out, "."+test.want) {
			t.Errorf("%s: got %+v, want %s", name, r, test.want)
		}
	}
	must(t, "alice", within(20, "hostile half"))
	must(t, "alice", within(30, "hostile deaf"))
	must(t, "bob", within(1, "bpfbroker profiles"))
}

// One user's thousand connections leave room for the others.
func TestThousandConnections(t *testing.T) {
	leavesNothing(t)
	_, kept := start(t, "alice", "exec hostile hold 1000")
	if n, err := strconv.Atoi(strings.TrimSpace(kept)); err != nil || n > 128 {
		t.Errorf("the broker keeps %q connections of one user", kept)
	}
	must(t, "bob", within(1, "bpfbroker profiles"))
	must(t, "root", within(1, "bpfbroker run -p network -- true"))
}

// Nor do those of the thousands of uids that a user has for containers (subuid(5)).
func TestConnectionsOfSubordinateUsers(t *testing.T) {
	leavesNothing(t)
	_, ready := start(t, "alice", `exec unshare --map-root-user --map-auto bash -c 'trap "kill \$(jobs -p)" TERM
for uid in $(seq 10); do
    sleep 60 | setpriv --reuid=$uid --clear-groups hostile hold 128 >/tmp/kept.$uid &
done
until test $(cat /tmp/kept.* | wc -l) -eq 10; do sleep 0.1; done
cat /tmp/kept.*; rm -f /tmp/kept.*; wait'`)
	sum := 0
	for _, kept := range strings.Fields(ready) {
		n, err := strconv.Atoi(kept)
		if err != nil {
			t.Errorf("%q: %v", kept, err)
		}
		sum += n
	}
	if sum > 128 {
		t.Errorf("the broker keeps %d connections of one user's", sum)
	}
	must(t, "bob", within(1, "bpfbroker profiles"))
	must(t, "root", within(1, "bpfbroker run -p network -- true"))
}

// Whatever ends the daemon, the grants go on, and the next start finds what
// became of them.
func TestDaemonKilled(t *testing.T) {
	leavesNothing(t)
	start(t, "alice", "exec bpfbroker run -p network -- bash -c 'echo ready; exec sleep 60'")
	start(t, "alice", "exec bpfbroker run -p network -- bash -c 'echo ready; exec sleep 60'")
	must(t, "root", "systemctl reset-failed bpfbroker.service; systemctl kill --signal=KILL bpfbroker.service")
	must(t, "root", "pkill -u alice -x -f 'sleep 60' -n; echo garbage >/run/bpfbroker/grants/0000000000000001")
	if list := must(t, "alice", "bpfbroker list --no-legend"); strings.Count(list, "\n") != 1 {
		t.Errorf("of two grants, one whose process ended, there are:\n%s", list)
	}
	must(t, "root", "! test -e /run/bpfbroker/grants/0000000000000001")
}

// Stopping and starting loses no request: systemd keeps the socket.
func TestNoRequestIsLost(t *testing.T) {
	leavesNothing(t)
	// systemd thinks that a service fails which is started so often.
	must(t, "root", `for i in $(seq 5); do systemctl reset-failed bpfbroker.service; systemctl stop bpfbroker.service; sleep 0.4; done & stopper=$!
while kill -0 $stopper 2>/dev/null; do varlinkctl info `+broker+` >/dev/null || exit 1; sleep 0.2; done`)
}

func TestCheckConfig(t *testing.T) {
	write := func(text string) {
		must(t, "root", "cat >/etc/bpfbroker/profiles.d/broken.profile <<'END'\n"+text+"\nEND")
	}
	t.Cleanup(func() {
		must(t, "root", "rm -f /etc/bpfbroker/profiles.d/broken.profile; systemctl try-reload-or-restart bpfbroker.service")
	})
	const check = "/usr/libexec/bpfbrokerd --check-config"
	must(t, "root", check)
	for text, want := range map[string]string{
		"[Delegate]\nComands=map_create":              "broken.profile:2",
		"[Delegate]\nCommands=map_create\nMaps=hashh": "broken.profile:3",
		"[Delegate]\nMaps=hash 7 array":               "broken.profile:2",
		"[Nonsense]\nX=1":                             "broken.profile:1",
		"[Delegate]\nAttachments=lsm_cgroup":          "broken.profile:2",
	} {
		write(text)
		refused(t, "root", check, 1, want)
	}
	must(t, "root", "head -c 1048576 /dev/zero | tr '\\0' '#' >/etc/bpfbroker/profiles.d/broken.profile")
	refused(t, "root", check, 1, "broken.profile")
	// The others are offered all the same.
	must(t, "root", "systemctl try-reload-or-restart bpfbroker.service")
	must(t, "alice", "bpfbroker run -p network -- true")
	refused(t, "alice", "bpfbroker run -p broken -- true", 1, "broken.profile")
}

// What is installed is what systemd, polkit and varlinkctl take.
func TestInstalled(t *testing.T) {
	must(t, "root", "systemd-analyze verify --man=no bpfbroker.service bpfbroker.socket")
	must(t, "root", "varlinkctl introspect "+broker+" org.bpfbroker.Broker | varlinkctl validate-idl /dev/stdin")
	must(t, "root", "pkaction --action-id org.bpfbroker.token-tracing --verbose | grep -q 'implicit active:.*auth_admin'")
	// It is 3.5. What is left: root, its capabilities, namespaces to enter, mount(2)
	// and bpf(2), and what they need; and for published objects the host's network
	// interfaces, perf_event_open(2), netlink and packet sockets.
	must(t, "root", "systemd-analyze security --threshold=36 bpfbroker.service")
	must(t, "root", "journalctl --update-catalog && journalctl --catalog --list-catalog | grep -c bpfbroker")
	for _, shell := range []string{"bash-completion/completions/bpfbroker", "zsh/site-functions/_bpfbroker", "fish/vendor_completions.d/bpfbroker.fish"} {
		must(t, "root", "test -s /usr/share/"+shell)
	}
}
