// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
)

// publish writes an object file, lets bob read the map packets of it and everybody
// the map everybody, and takes all that away at the end.
func publish(t *testing.T, name, text string) {
	t.Helper()
	t.Cleanup(func() {
		must(t, "root", "rm -f /etc/bpfbroker/objects.d/"+name+".object /etc/polkit-1/rules.d/10-objects.rules; systemctl reload-or-restart bpfbroker.service")
	})
	must(t, "root", `cat >/etc/bpfbroker/objects.d/`+name+`.object <<'END'
`+text+`END
cat >/etc/polkit-1/rules.d/10-objects.rules <<'END'
polkit.addRule(function(action, subject) {
    if (action.id == "org.bpfbroker.open-object" && action.lookup("object") == "packets" &&
        (action.lookup("map") == "packets" && subject.user == "bob" || action.lookup("map") == "everybody")) {
        return polkit.Result.YES;
    }
});
END
systemctl reset-failed bpfbroker.service; systemctl reload-or-restart bpfbroker.service`)
}

const packets = `[Object]
Description=Packets on the loopback interface
File=/usr/local/lib/count.bpf.o
[Map packets]
Access=read-only read-write
[Program count]
Attach=lo
Publish=yes
`

const varlink = "varlinkctl call " + broker + " org.bpfbroker.Broker."

// Whoever polkit lets reads a published map without any right of his own, by
// either front; nobody else does, and nobody writes.
func TestOpenMap(t *testing.T) {
	publish(t, "packets", packets)
	if out := must(t, "alice", varlink+"ListObjects '{}'"); !strings.Contains(out, `"unloaded"`) {
		t.Errorf("before its first use: %s", out)
	}
	const opened = `varlinkctl call --exec ` + broker + ` org.bpfbroker.Broker.OpenMap '{"object": "packets", "map": "packets", "access": "read-only"}' -- object-client`
	if out := must(t, "bob", opened); out != "00000000 0000000000000000\n" {
		t.Errorf("by varlinkctl: %s", out)
	}
	must(t, "root", "ip link set lo up; ping -c 3 -i 0.2 127.0.0.1 >/dev/null || curl -s http://127.0.0.1:9 || true; bash -c ': >/dev/udp/127.0.0.1/9; echo x >/dev/udp/127.0.0.1/9'")
	out := must(t, "bob", "object-client packets packets read-only")
	if !strings.HasPrefix(out, "00000000 ") || strings.HasSuffix(out, " 0000000000000000\n") {
		t.Errorf("by the bus, after packets: %s", out)
	}
	for _, test := range []struct{ user, command, text string }{
		{"alice", opened + " >/dev/null", "InteractionRequired"},
		{"alice", "object-client packets packets read-only", "polkit"},
		{"bob", "object-client packets packets read-write", "polkit"},
		{"bob", "object-client write packets packets read-only", "not permitted"},
		{"bob", "object-client packets packets consume", "not offered"},
		{"bob", "object-client packets nonesuch read-only", "no such map"},
		{"bob", "object-client nonesuch packets read-only", "no such object"},
		{"bob", `busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager OpenProgram ssa{sv} packets count 0`, "polkit"},
	} {
		refused(t, test.user, test.command, 1, test.text)
	}
	must(t, "root", "test -e /sys/fs/bpf/bpfbroker/objects/packets@*/links/count; rm /etc/bpfbroker/objects.d/packets.object; systemctl try-reload-or-restart bpfbroker.service")
	if left := must(t, "root", "ls -A /sys/fs/bpf/bpfbroker/objects; ip -o link show lo | grep -o prog/xdp || true"); left != "" {
		t.Errorf("left when the object has gone: %s", left)
	}
	journalHas(t, "BPFBROKER_OBJECT=packets", "BPFBROKER_ACCESS=read-only", "BPFBROKER_OWNER=1001")
}

// Whoever looks at the bus finds what is published, and hears of it.
func TestObjectsOnTheBus(t *testing.T) {
	publish(t, "loopback-packets", packets)
	const path = "/org/bpfbroker/Broker1/object/loopback_2dpackets"
	if tree := must(t, "alice", "busctl --system --list tree org.bpfbroker.Broker1"); !strings.Contains(tree, path+"\n") {
		t.Errorf("busctl tree: %s", tree)
	}
	out := must(t, "alice", "busctl --system get-property org.bpfbroker.Broker1 "+path+" org.bpfbroker.Broker1.Object Name State Maps Programs")
	if out != "s \"loopback-packets\"\ns \"unloaded\"\nas 1 \"packets\"\nas 1 \"count\"\n" {
		t.Errorf("properties: %s", out)
	}
	cmd, first := start(t, "alice", "exec object-client watch loopback-packets >/tmp/heard & watcher=$!; until test -s /tmp/heard; do sleep 0.05; done; echo ready; wait $watcher")
	if first != "ready\n" {
		t.Fatal(first)
	}
	t.Cleanup(func() { must(t, "root", "rm -f /tmp/heard") })
	must(t, "root", "object-client loopback-packets packets read-only; echo '[Map packets]\nMaxEntries=2' >>/etc/bpfbroker/objects.d/loopback-packets.object; systemctl reload bpfbroker.service; rm /etc/bpfbroker/objects.d/loopback-packets.object; systemctl reload bpfbroker.service")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	want := "found " + path + ` "unloaded"` + "\nchanged " + path + ` "loaded"` + "\nchanged " + path + ` "loaded"` + "\nremoved " + path + "\n"
	if heard := must(t, "root", "cat /tmp/heard"); heard != want {
		t.Errorf("alice heard %s", heard)
	}
}

// An unmodified program finds the map by its path, in the caller's namespace or
// in another one of the user's.
func TestMountObjects(t *testing.T) {
	leavesNothing(t)
	publish(t, "packets", packets)
	mount := varlink + `MountObjects '{"objects": ["packets"], "path": "/mnt"}'`
	refused(t, "bob", mount+" >/dev/null", 1, "NamespaceInitial")
	_, pid := start(t, "bob", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
	pid = strings.TrimSpace(pid)
	inside := "nsenter -t " + pid + " -U -m --preserve-credentials "
	reply := must(t, "bob", inside+"busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager MountObjects 'asusa{sv}' 1 packets 0 /mnt 0")
	if !strings.HasPrefix(reply, `asas 1 "packets/packets" 1 "the `+readOnlyHolder+` does not hold read-only`) {
		t.Errorf("MountObjects: %s", reply)
	}
	if list := must(t, "bob", inside+"ls -l /mnt/packets"); !strings.Contains(list, "-r--r--r--") {
		t.Errorf("pinned: %s", list)
	}
	// It is for reading, and so the program must say that it reads.
	refused(t, "bob", inside+"object-client /mnt/packets/packets", 1, "permission denied")
	if out := must(t, "bob", inside+"object-client read /mnt/packets/packets"); !strings.HasPrefix(out, "00000000 ") {
		t.Errorf("by its path: %s", out)
	}
	for _, command := range []string{"rm /mnt/packets/packets", "touch /mnt/x", "chmod 666 /mnt/packets/packets", "mount -o remount,mode=777 /mnt"} {
		if r := run(t, "bob", inside+command); r.code == 0 {
			t.Errorf("bob can: %s", command)
		}
	}
	// Others have nothing of it, and may not put anything into his namespace.
	refused(t, "alice", "busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager MountObjects 'asusa{sv}' 1 packets "+pid+" /mnt 0", 1, "belongs to uid 1001")
	_, own := start(t, "alice", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
	refused(t, "alice", "busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager MountObjects 'asusa{sv}' 1 packets "+strings.TrimSpace(own)+" /mnt 0", 1, "polkit")
	must(t, "root", "busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager MountObjects 'asusa{sv}' 1 packets "+pid+" /mnt 0")
	must(t, "bob", inside+"object-client /mnt/packets/packets")
}

// Each kind of attachment is possible for the daemon as its unit starts it.
func TestObjectKinds(t *testing.T) {
	for name, test := range map[string]struct{ key, program, do string }{
		"raw tracepoint": {"01", "[Program on_raw]\nAttach=\n", "true"},
		"tracepoint":     {"02", "[Program on_tracepoint]\nAttach=\n", "true"},
		"uprobe":         {"03", "[Program on_uprobe]\nAttach=/usr/bin/bash:main\n", "bash -c true"},
		"xdp":            {"04", "[Program on_xdp]\nAttach=lo\n", "echo x >/dev/udp/127.0.0.1/9"},
		"tcx":            {"05", "[Program on_tcx]\nAttach=lo\n", "echo x >/dev/udp/127.0.0.1/9"},
		"cgroup":         {"06", "[Program on_cgroup]\nAttach=/system.slice\n", "echo x >/dev/udp/127.0.0.1/9"},
		"samples":        {"07", "[Program on_sample]\nAttach=999Hz\n", "timeout 0.1 yes >/dev/null || true"},
	} {
		t.Run(name, func(t *testing.T) {
			publish(t, "packets", strings.Replace(kinds, "END", test.program, 1))
			must(t, "root", "ip link set lo up")
			must(t, "bob", "object-client packets packets read-only")
			must(t, "root", test.do)
			if out := must(t, "bob", "object-client packets packets read-only"); !strings.Contains(out, test.key+"000000 ") {
				t.Errorf("counted: %q", out)
			}
		})
	}
}

const kinds = `[Object]
File=/usr/local/lib/kinds.bpf.o
[Map packets]
From=hits
Access=read-only
[Program on_raw]
Attach=none
[Program on_tracepoint]
Attach=none
END`

// What is loaded outlives the daemon, however that ends; what is for boot is there
// when the service has started; and what was edited meanwhile is loaded anew.
func TestObjectsOutliveTheDaemon(t *testing.T) {
	text := strings.Replace(packets, "[Map", "Load=boot\n[Map", 1)
	publish(t, "packets", text)
	pins := func() string { return must(t, "root", "ls -id /sys/fs/bpf/bpfbroker/objects/*/maps/*") }
	before := pins()
	for _, end := range []string{
		"systemctl stop bpfbroker.service",
		"systemctl kill --signal=KILL bpfbroker.service; sleep 0.2; systemctl reset-failed bpfbroker.service",
	} {
		must(t, "root", end)
		if now := pins(); now != before {
			t.Errorf("%s: before\n%safter\n%s", end, before, now)
		}
		must(t, "bob", "object-client packets packets read-only")
		if now := pins(); now != before {
			t.Errorf("%s, and started again: before\n%safter\n%s", end, before, now)
		}
	}
	must(t, "root", "systemctl stop bpfbroker.service; rm -r /sys/fs/bpf/bpfbroker/objects; systemctl start bpfbroker.service; test -e /sys/fs/bpf/bpfbroker/objects/packets@*")
	before = pins()
	must(t, "root", "systemctl stop bpfbroker.service; printf '[Map packets]\nMaxEntries=2\n' >>/etc/bpfbroker/objects.d/packets.object")
	if out := must(t, "bob", "object-client packets packets read-only | wc -l"); out != "2\n" {
		t.Errorf("after editing there are %s entries", out)
	}
	if now := pins(); now == before || strings.Count(now, "\n") != 1 {
		t.Errorf("after editing: %s", now)
	}
}

// What is wrong is said to the administrator and to who asks, with the verifier's
// words.
func TestBadObject(t *testing.T) {
	publish(t, "packets", "[Object]\nFile=/usr/local/lib/bad.bpf.o\n[Program on_bad]\nPublish=yes\n")
	open := `busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager OpenProgram ssa{sv} packets on_bad 0`
	refused(t, "root", open, 1, "the verifier's last lines: ")
	if record := journalHas(t, "BPFBROKER_OBJECT=packets", "PRIORITY=3"); !strings.Contains(record, "invalid mem access") {
		t.Errorf("the journal: %s", record)
	}
	must(t, "root", "cp /usr/local/lib/kinds.bpf.o /home/bob/; chown bob: /home/bob/kinds.bpf.o; sed -i s,/usr/local/lib/bad,/home/bob/kinds, /etc/bpfbroker/objects.d/packets.object; systemctl try-reload-or-restart bpfbroker.service")
	refused(t, "root", open, 1, "/home/bob/kinds.bpf.o")
	r := run(t, "root", "/usr/libexec/bpfbrokerd --check-config")
	if r.code != 1 || !strings.Contains(r.err+r.out, "kinds.bpf.o: not owned by uid 0") {
		t.Errorf("--check-config: %+v", r)
	}
}

// Many at once, by both ways, leave nothing behind.
func TestManyOpen(t *testing.T) {
	publish(t, "packets", packets)
	must(t, "bob", "object-client packets packets read-only")
	leavesNothing(t)
	const each = max(15, 100/share)
	// As many at a time as a user may, which is 32.
	out := must(t, "bob", fmt.Sprintf(`many() { seq %d | xargs -P 15 -I{} "$@"; }
many object-client packets packets read-only &
many varlinkctl call --exec %s org.bpfbroker.Broker.OpenMap '{"object": "packets", "map": "packets", "access": "read-only"}' -- object-client &
wait`, each, broker))
	if n := strings.Count(out, "\n"); n != 2*each {
		t.Errorf("%d of %d were served", n, 2*each)
	}
}

// The daemon can make packet sockets as its unit starts it, and hands them out by
// both fronts.
func TestOpenSocket(t *testing.T) {
	publish(t, "packets", "[Object]\nFile=/usr/local/lib/xsk.bpf.o\n[Map sockets]\nAccess=receive\n[Program on_packet]\nAttach=lo\n")
	must(t, "root", "ip link set lo up")
	bus := "busctl --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1 org.bpfbroker.Broker1.Manager OpenSocket ssua{sv} packets sockets 0 0"
	refused(t, "bob", bus, 1, "polkit") // who may only read
	if out := must(t, "root", bus); !strings.HasPrefix(out, "hhsuu ") || !strings.HasSuffix(out, ` "lo" 1024 2048`+"\n") {
		t.Errorf("by the bus: %s", out)
	}
	leavesNothing(t)
	eventually(t, "the queue is free again", func() bool {
		return run(t, "root", `varlinkctl call --exec `+broker+` org.bpfbroker.Broker.OpenSocket '{"object": "packets", "map": "sockets"}' -- sh -c 'ls -l /proc/self/fd | grep -q memfd:packets'`).code == 0
	})
	// A Go program receives packets without a capability.
	var r result
	eventually(t, "the queue is free once more", func() bool {
		r = run(t, "root", `while sleep 0.1; do echo over the wire >/dev/udp/127.0.0.1/9; done & sender=$!
setpriv --bounding-set=-all --inh-caps=-all object-client receive packets sockets "over the wire"; code=$?; kill $sender; exit $code`)
		return !strings.Contains(r.err, "receives from that queue already")
	})
	if r.out != "waiting\nlo xdp lo true\n" || r.code != 0 {
		t.Errorf("by package client: %+v", r)
	}
}

// A thousand users at once all have the map, and nothing is left of that.
func TestThousandUsersOpen(t *testing.T) {
	publish(t, "packets", strings.Replace(packets, "[Map packets]", "[Map everybody]\nFrom=packets", 1))
	leavesNothing(t)
	must(t, "root", within(20, "hostile open 1 packets everybody")) // which loads it
	const users = 1000 / share
	if out := must(t, "root", within(20, fmt.Sprintf("hostile open %d packets everybody", users))); out != fmt.Sprintln(users) {
		t.Errorf("of %d users: %.1000s", users, out)
	}
	must(t, "bob", within(1, "object-client packets everybody read-only"))
}

// Who consumes a ring buffer and never reads it loses records, and nobody else
// does anything.
func TestReaderThatNeverReads(t *testing.T) {
	publish(t, "packets", strings.Replace(kinds, "END", "[Program on_xdp]\nAttach=lo\n[Map everybody]\nFrom=events\nAccess=consume\n", 1))
	start(t, "alice", `exec varlinkctl call --exec `+broker+` org.bpfbroker.Broker.OpenMap '{"object": "packets", "map": "everybody", "access": "consume"}' -- bash -c 'echo ready; exec sleep 60'`)
	// There is room for 170 records.
	must(t, "root", "ip link set lo up; for i in $(seq 500); do echo x >/dev/udp/127.0.0.1/9 || true; done")
	out := must(t, "bob", within(1, "object-client packets packets read-only"))
	_, value, _ := strings.Cut(strings.TrimSpace(out), "04000000 ")
	var count uint64
	if data, err := hex.DecodeString(value); err == nil && len(data) == 8 {
		count = binary.LittleEndian.Uint64(data)
	}
	if count < 500 {
		t.Errorf("of 500 packets %d are counted: %q", count, out)
	}
}
