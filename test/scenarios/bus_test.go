// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"strings"
	"testing"
)

const manager = "busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager "

// busctl is all that one needs: to start the broker, to get a token for a
// process of one's own, and to see, renew and end the grant.
func TestBus(t *testing.T) {
	leavesNothing(t)
	must(t, "root", "systemctl reset-failed bpfbroker.service; systemctl stop bpfbroker.service")
	if out := must(t, "alice", manager+"ListProfiles a{sv} 0"); !strings.Contains(out, `"network"`) {
		t.Errorf("ListProfiles: %s", out)
	}
	if state := must(t, "root", "systemctl is-active bpfbroker.service"); state != "active\n" {
		t.Errorf("after a call the service is %s", state)
	}

	_, pid := start(t, "alice", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
	pid = strings.TrimSpace(pid)
	reply := must(t, "alice", manager+"MountToken susa{sv} network "+pid+" /sys/fs/bpf 0")
	_, grant, _ := strings.Cut(reply, `"`)
	grant = strings.TrimSuffix(strings.TrimSpace(grant), `"`)
	if !strings.HasPrefix(grant, "/org/bpfbroker/Broker1/grant/") {
		t.Fatalf("MountToken: %s", reply)
	}
	must(t, "alice", "nsenter -t "+pid+" -U -m --preserve-credentials env LIBBPF_BPF_TOKEN_PATH=/sys/fs/bpf ebpf-example")

	property := "busctl --system get-property org.bpfbroker.Broker1 " + grant + " org.bpfbroker.Broker1.Grant "
	for name, want := range map[string]string{"Profile": `s "network"`, "OwnerUID": "u 1000", "Process": "u " + pid, "Path": `s "/sys/fs/bpf"`} {
		if got := strings.TrimSpace(must(t, "alice", property+name)); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	before := must(t, "alice", property+"Expires")
	must(t, "alice", "sleep 0.1; busctl --system call org.bpfbroker.Broker1 "+grant+" org.bpfbroker.Broker1.Grant Renew a{sv} 0")
	if after := must(t, "alice", property+"Expires"); after <= before {
		t.Errorf("Expires is %s after renewal, was %s", after, before)
	}

	// The same on the other front.
	if list := must(t, "alice", "bpfbroker list --no-legend"); !strings.Contains(list, pid) {
		t.Errorf("list: %s", list)
	}
	refused(t, "bob", property+"Profile", 1, "")
	refused(t, "bob", "busctl --system call org.bpfbroker.Broker1 "+grant+" org.bpfbroker.Broker1.Grant Revoke a{sv} 0", 1, "no such grant")
	must(t, "root", "bpfbroker list --all --no-legend | grep -q "+pid)
	must(t, "alice", "busctl --system call org.bpfbroker.Broker1 "+grant+" org.bpfbroker.Broker1.Grant Revoke a{sv} 0")
	if list := must(t, "alice", "bpfbroker list --no-legend"); list != "" {
		t.Errorf("after revoking: %s", list)
	}
	journalHas(t, "MESSAGE_ID=ff336156ee674fca9617fa85942fadb4", "BPFBROKER_PROCESS="+pid)
}

// Both fronts refuse the same things with the same names.
func TestSameRefusals(t *testing.T) {
	leavesNothing(t)
	_, bobs := start(t, "bob", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
	bobs = strings.TrimSpace(bobs)
	_, nested := start(t, "alice", "exec "+othersNamespace)
	nested = strings.TrimSpace(nested)
	_, shared := start(t, "alice", "exec unshare -Ur bash -c 'echo $$; exec sleep 60'")
	shared = strings.TrimSpace(shared)
	_, own := start(t, "alice", "exec unshare -Urm bash -c 'mkdir /tmp/d; ln -s /tmp/d /tmp/link; touch /tmp/file; echo $$; exec sleep 60'")
	own = strings.TrimSpace(own)
	t.Cleanup(func() { must(t, "root", "rm -rf /tmp/d /tmp/link /tmp/file") })
	for name, test := range map[string]struct{ pid, profile, path string }{
		"NoSuchProfile":          {own, "nonesuch", "/mnt"},
		"NamespaceInitial":       {"1", "network", "/mnt"},
		"NamespaceNotOwned":      {bobs, "network", "/mnt"},
		"NamespaceNested":        {nested, "network", "/mnt"},
		"MountNamespaceNotOwned": {shared, "network", "/mnt"},
		"PathInvalid":            {own, "network", "mnt/../mnt"},
		"PathNotFound":           {own, "network", "/mnt/nothing"},
		"PathIsLink":             {own, "network", "/tmp/link"},
		"PathNotDirectory":       {own, "network", "/tmp/file"},
		"PathDenied":             {own, "network", "/root/x"},
		"InteractionRequired":    {own, "tracing", "/mnt"},
	} {
		socket := run(t, "alice", "token-client mount "+test.pid+" "+test.profile+" "+test.path)
		if got, _, _ := strings.Cut(socket.out, " "); got != name {
			t.Errorf("the socket says %q, want %s\n%s", got, name, socket.err)
		}
		bus := run(t, "alice", manager+"MountToken susa{sv} "+test.profile+" "+test.pid+" "+test.path+" 0")
		reason, _, _ := strings.Cut(strings.TrimPrefix(socket.err, "token-client: "), " (")
		if bus.code == 0 || !strings.Contains(bus.err, strings.TrimSpace(reason)) {
			t.Errorf("%s: the bus says %q, the socket %q", name, bus.err, socket.err)
		}
	}
}

func TestBusLogLevel(t *testing.T) {
	must(t, "root", "systemctl service-log-level bpfbroker.service debug")
	if got := must(t, "root", "systemctl service-log-level bpfbroker.service"); got != "debug\n" {
		t.Errorf("the level is %s", got)
	}
	must(t, "root", "systemctl service-log-level bpfbroker.service info")
	if r := run(t, "alice", "busctl --system set-property org.bpfbroker.Broker1 /org/freedesktop/LogControl1 org.freedesktop.LogControl1 LogLevel s debug"); r.code == 0 {
		t.Error("alice sets the level")
	}
}

// The bus goes and comes back; the socket and the grants stay.
func TestBusRestarts(t *testing.T) {
	start(t, "alice", "exec bpfbroker run -p network -- bash -c 'echo ready; exec sleep 60'")
	must(t, "root", "systemctl kill --signal=KILL dbus.service; sleep 1; systemctl restart dbus.service systemd-logind.service polkit.service")
	must(t, "alice", "bpfbroker list --no-legend | grep -q network")
	eventually(t, "it is back on the bus", func() bool { return run(t, "alice", manager+"ListProfiles a{sv} 0").code == 0 })
	must(t, "alice", "bpfbroker run -p network -- true")
}
