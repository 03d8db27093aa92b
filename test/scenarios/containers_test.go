// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const (
	// podman is how rootless podman runs in a container without control groups.
	podman    = "podman --log-level=error "
	podmanRun = podman + "run --rm --network=none --cgroups=disabled --pids-limit=-1 "
	load      = "bpftool prog load " + object + " /sys/fs/bpf/count"
	rootfs    = "--rootfs $HOME/rootfs "
)

// containers makes what alice and bob run containers of: a directory with a few
// of the machine's own programs. Nothing in it knows of bpfbroker.
var containers = sync.OnceValue(func() result {
	cmd := machine.Command(machineContext, "root", "bash", "-ec", `
cd "$(mktemp -d)" && chmod 0755 .
mkdir -p usr/bin usr/sbin usr/lib usr/lib64 proc sys dev tmp etc run var/tmp root
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
for program in /usr/bin/{bash,cat,grep,head,id,ln,ls,mkdir,mkfifo,mv,rm,sleep} /usr/sbin/bpftool; do
	cp --parents $program .
	ldd $program | grep -o '/[^ ]*' | xargs cp --parents --dereference --target-directory=.
done
ln -s bash usr/bin/sh
cp --parents `+object+` .
echo 'root:x:0:0::/root:/bin/sh' >etc/passwd
for user in alice bob; do
	cp -a . /home/$user/rootfs
	chown -R $user: /home/$user/rootfs
done
test -e /dev/fuse || mknod /dev/fuse c 10 229
chmod 0666 /dev/fuse # as udev does
systemctl start bpfbroker-cdi.service`)
	var out, err strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &err
	r := result{}
	if cmd.Run() != nil {
		r.code = 1
	}
	r.out, r.err = out.String(), err.String()
	return r
})

// withContainers is the beginning of a test with containers.
func withContainers(t *testing.T) {
	t.Helper()
	if r := containers(); r.code != 0 {
		t.Fatalf("cannot prepare for containers: %s%s", r.out, r.err)
	}
	users := []string{"alice", "bob"}
	for _, user := range users {
		must(t, user, podman+"unshare true") // the process that keeps a user's namespaces stays
	}
	leavesNothing(t)
	t.Cleanup(func() {
		for _, user := range users {
			must(t, user, podman+"rm --force --all --time=0")
		}
		must(t, "root", "! ls -A /run/cdi | grep -v '^bpfbroker.org-profile.json$'")
	})
}

// startContainer starts a container that sleeps, and returns the pid of its
// process.
func startContainer(t *testing.T, user, name, options string) string {
	t.Helper()
	must(t, user, podmanRun+"--detach --name "+name+" "+options+" "+rootfs+"sleep 100")
	return strings.TrimSpace(must(t, user, podman+"inspect --format {{.State.Pid}} "+name))
}

func grants(t *testing.T, user string) string {
	t.Helper()
	return must(t, user, "bpfbroker list --no-legend")
}

// A container that runs gets a token, without anything of ours in it.
func TestContainerMount(t *testing.T) {
	withContainers(t)
	const mount = "bpfbroker mount -p network --pid "
	pid := startContainer(t, "alice", "running", "--cap-add=BPF,NET_ADMIN")
	exec := podman + "exec running "
	if r := run(t, "alice", exec+load); r.code == 0 {
		t.Error("a program can be loaded without a token")
	}
	id := strings.TrimSpace(must(t, "alice", mount+pid))
	must(t, "alice", exec+load+" && "+exec+"ls /sys/fs/bpf/count")
	if list := grants(t, "alice"); !strings.Contains(list, id) || !strings.Contains(list, pid) {
		t.Errorf("list: %s", list)
	}
	must(t, "alice", "bpfbroker revoke "+id)
	if r := run(t, "alice", exec+"ls /sys/fs/bpf/count"); r.code == 0 {
		t.Error("after revoking, the file system is still there")
	}

	// Another place, and nobody else's business.
	must(t, "alice", exec+"mkdir -p /tmp/bpf && "+mount+pid+" --path /tmp/bpf")
	must(t, "alice", podman+"exec --env LIBBPF_BPF_TOKEN_PATH=/tmp/bpf running bpftool prog load "+object+" /tmp/bpf/count")
	must(t, "alice", manager+"MountToken susa{sv} network "+pid+" /bpf 1 root s /tmp")
	if n := must(t, "root", "grep -c ' /tmp/bpf .* - bpf ' /proc/"+pid+"/mountinfo"); n != "2\n" {
		t.Errorf("%s mounts below a root that was given, want the second", n)
	}
	refused(t, "bob", mount+pid, 77, "the user namespace belongs to uid 1000")
	if r := run(t, "bob", "nsenter -t "+pid+" -U -m true"); r.code == 0 {
		t.Error("bob enters alice's container")
	}

	// It ends with the container.
	must(t, "alice", podman+"rm --force --time=0 running")
	eventually(t, "the grant has ended", func() bool { return grants(t, "alice") == "" })
	journalHas(t, "MESSAGE_ID=ef1a2001282246b7a9173eec22681e37", "BPFBROKER_PROCESS="+pid)
	refused(t, "alice", mount+pid, 1, "")
}

// bob's container gets nothing from alice.
func TestContainerOfAnother(t *testing.T) {
	withContainers(t)
	pid := startContainer(t, "bob", "bobs", "--cap-add=BPF,NET_ADMIN")
	refused(t, "alice", "bpfbroker mount -p network --pid "+pid, 77, "the user namespace belongs to uid 1001")
	journalHas(t, "MESSAGE_ID=7a7aea26eed040f2a24bebf37e302058", "BPFBROKER_OWNER=1000", "BPFBROKER_ERROR=NamespaceNotOwned")
	refused(t, "bob", "bpfbroker mount -p network --pid "+pid, 77, "(polkit)")
	// A namespace in a container of alice's that isn't hers.
	_, nested := start(t, "alice", "exec "+othersNamespace)
	refused(t, "alice", "bpfbroker mount -p network --pid "+strings.TrimSpace(nested), 1, "inside another user's")
}

// What is inside one's own namespace is one's own, for bpfbroker run too.
func TestNamespaceInside(t *testing.T) {
	leavesNothing(t)
	must(t, "alice", "unshare -Urm unshare -Urm ebpf-example 2>/dev/null && exit 1; unshare -Urm bpfbroker run -p network -- ebpf-example")
	must(t, "alice", "unshare -Urm bpfbroker check | grep '^user namespaces *ok'")
}

// othersNamespace runs a shell in a user namespace that belongs to another uid
// than the one around it.
const othersNamespace = "unshare -Um --map-root-user --map-auto setpriv --reuid 5 --regid 5 --clear-groups unshare -Urm bash -c 'echo $$; exec sleep 60'"

// A word on the command line of podman is enough.
func TestContainerHooks(t *testing.T) {
	withContainers(t)
	for i, option := range []string{
		"--annotation org.bpfbroker.profile=network",
		"--device bpfbroker.org/profile=network",
		"--annotation org.bpfbroker.profile=network --device bpfbroker.org/profile=network",
	} {
		for j, more := range []string{"", "--userns=keep-id", "--userns=auto", "--userns=nomap", "--network=host", "--read-only"} {
			if share > 1 && i != j%3 {
				continue // once each, where all takes long
			}
			t.Run(option+" "+more, func(t *testing.T) {
				command := podmanRun
				if more == "--network=host" {
					command = strings.Replace(command, "--network=none ", "", 1)
				}
				out := must(t, "alice", command+option+" "+more+" "+rootfs+"sh -c '"+load+" && ls /sys/fs/bpf && echo $LIBBPF_BPF_TOKEN_PATH && grep -c \" - bpf \" /proc/self/mountinfo'")
				if !strings.Contains(out, "count\n") || !strings.Contains(out, "\n/sys/fs/bpf\n") {
					t.Errorf("got %s", out)
				}
			})
		}
	}
	if list := grants(t, "alice"); list != "" {
		t.Errorf("containers that have ended have grants: %s", list)
	}
	// Without a word there is nothing, and with one no more than that.
	if out := must(t, "alice", podmanRun+rootfs+"sh -c '! "+load+" 2>/dev/null; grep ^CapEff /proc/self/status'"); !strings.Contains(out, "00000000800405fb") {
		t.Errorf("a container without a profile: %s", out)
	}
	if out := must(t, "alice", podmanRun+"--annotation org.bpfbroker.profile=network "+rootfs+"grep ^CapEff /proc/self/status"); !strings.Contains(out, "00000080800415fb") {
		t.Errorf("a container with a profile: %s", out)
	}
}

// A restarted container gets its profile anew, and revoking takes it away.
func TestContainerRestart(t *testing.T) {
	withContainers(t)
	pid := startContainer(t, "alice", "restarted", "--device bpfbroker.org/profile=network")
	first := grants(t, "alice")
	if !strings.Contains(first, " "+pid+" ") || !strings.Contains(first, " /sys/fs/bpf ") {
		t.Errorf("list: %s", first)
	}
	must(t, "alice", podman+"restart --time=0 restarted")
	var second string
	eventually(t, "one grant ends as the other begins", func() bool {
		second = grants(t, "alice")
		return strings.Count(second, "\n") == 1 && second[:16] != first[:16]
	})
	must(t, "alice", podman+"exec restarted "+load)
	if r := run(t, "alice", "bpfbroker revoke "+second[:16]); strings.Contains(r.err, "not mounted") || r.code != 0 {
		t.Errorf("revoke: %+v", r)
	}
	if r := run(t, "alice", podman+"exec restarted ls /sys/fs/bpf/count"); r.code == 0 {
		t.Error("after revoking, the file system is still there")
	}
}

// A profile that can't be had fails the start, and says why.
func TestContainerRefused(t *testing.T) {
	withContainers(t)
	for name, test := range map[string]struct{ user, option, reason string }{
		"polkit":       {"alice", "--annotation org.bpfbroker.profile=tracing", "cannot grant tracing: polkit wants authentication"},
		"polkit, bob":  {"bob", "--device bpfbroker.org/profile=network", "cannot grant network: polkit"},
		"no profile":   {"alice", "--annotation org.bpfbroker.profile=nonesuch", `"nonesuch": no such profile`},
		"a path":       {"alice", "--annotation org.bpfbroker.profile=../../etc/passwd", "no such profile"},
		"an option":    {"alice", "--annotation org.bpfbroker.profile=--help", "no such profile"},
		"an escape":    {"alice", "--annotation $'org.bpfbroker.profile=\\e[2J'", "no such profile"},
		"no device":    {"alice", "--device bpfbroker.org/profile=nonesuch", "unresolvable CDI devices"},
		"a link":       {"alice", "--annotation org.bpfbroker.profile=network --volume $HOME/links:/sys/fs", "symbolic link"},
		"a FIFO":       {"alice", "--annotation org.bpfbroker.profile=network --volume $HOME/fifo:/sys/fs", "not a directory"},
		"no directory": {"alice", "--annotation org.bpfbroker.profile=network --volume $HOME/empty:/sys/fs", "no such directory"},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, "alice", "cd $HOME && rm -rf links fifo empty && mkdir links fifo empty && ln -s / links/bpf && mkfifo fifo/bpf")
			// podman's errors go where the user has opened something for them.
			r := run(t, test.user, podmanRun+test.option+" "+rootfs+"sh -c 'echo it ran' 2>&1 | cat")
			if !strings.Contains(r.out, test.reason) || strings.Contains(r.out, "it ran") || strings.Contains(r.out, "\x1b") {
				t.Errorf("got %s, want %q", r.out, test.reason)
			}
		})
	}
	if list := grants(t, "alice") + grants(t, "bob"); list != "" {
		t.Errorf("there are grants: %s", list)
	}
	// Somebody else's pipe can't be opened again, and the status says it still.
	if r := run(t, "alice", podmanRun+"--annotation org.bpfbroker.profile=tracing "+rootfs+"true"); r.code != 126 || !strings.Contains(r.err, "exit code: 77") {
		t.Errorf("got %+v", r)
	}
}

// The root of a container does what it can to mislead the broker.
func TestContainerHostile(t *testing.T) {
	withContainers(t)
	pid := startContainer(t, "alice", "hostile", "--cap-add=BPF,NET_ADMIN")
	must(t, "alice", podman+"exec hostile sh -c 'cd /tmp && ln -s /sys/fs/bpf link && mkfifo fifo && mkdir dir && ln -s /proc/1/root/tmp/dir dir/magic'")
	for path, reason := range map[string]string{
		"/tmp/link": "symbolic link", "/tmp/link/x": "symbolic link", "/tmp/fifo": "not a directory", "/tmp/dir/magic": "symbolic link",
		"/proc/1/root/tmp/dir": "symbolic link", "/tmp/none": "no such directory", "/tmp/../tmp/dir": "normalized", "tmp/dir": "normalized",
	} {
		refused(t, "alice", "bpfbroker mount -p network --pid "+pid+" --path "+path, 1, reason)
	}
	// A directory that becomes a link and back, all the while.
	start(t, "alice", podman+"exec hostile sh -c 'cd /tmp && echo ready && while :; do mv dir real; ln -s / dir; rm dir; mv real dir; done'")
	for range max(5, 20/share) {
		r := run(t, "alice", "bpfbroker mount -p network --pid "+pid+" --path /tmp/dir")
		if r.code != 0 && !strings.Contains(r.err, "symbolic link") && !strings.Contains(r.err, "no such directory") {
			t.Errorf("got %+v", r)
		}
	}
	if mounts := must(t, "root", "grep ' - bpf ' /proc/"+pid+"/mountinfo | grep -v -e ' /tmp/dir ' -e ' /tmp/real ' || true"); mounts != "" {
		t.Errorf("mounted elsewhere: %s", mounts)
	}

	// Containers that end while the request is under way.
	for range max(2, 5/share) {
		pid := startContainer(t, "alice", "brief", "")
		r := run(t, "alice", "("+podman+"kill --signal=KILL brief >/dev/null) & bpfbroker mount -p network --pid "+pid+"; s=$?; wait; exit $s")
		if r.code != 0 && !strings.Contains(r.err, "the process has exited") && !strings.Contains(r.err, "process already finished") {
			t.Errorf("got %+v", r)
		}
		eventually(t, "the container has gone", func() bool { return run(t, "alice", podman+"container exists brief").code != 0 })
	}

	// The hooks themselves.
	for _, hook := range []string{"precreate", "createRuntime -p network"} {
		for name, input := range map[string]string{
			"1 MiB of garbage": "head -c 1048576 /dev/urandom",
			"17 MiB":           "head -c 17825792 /dev/zero",
			"nothing":          "true",
			"deep nesting":     "yes '[' | head -c 1048576",
		} {
			if r := run(t, "alice", input+" | timeout 10 bpfbroker hook "+hook); r.code != 1 || r.out != "" || len(r.err) > 1000 {
				t.Errorf("hook %s with %s: exit status %d, %d bytes, %.200s", hook, name, r.code, len(r.out), r.err)
			}
		}
	}
	for _, pid := range []string{"0", "-1", "1", "4194304", "1e9", `"1"`} {
		state := `mkdir -p $HOME/bundle && echo '{"root":{"path":"/"}}' >$HOME/bundle/config.json && echo '{"pid":` + pid + `,"bundle":"/home/alice/bundle"}' | `
		refused(t, "alice", state+"bpfbroker hook createRuntime -p network", 1, "")
	}
}

// A container whose root directory is on FUSE, as where the kernel's overlay
// can't be used.
func TestContainerFuse(t *testing.T) {
	withContainers(t)
	const fuse = podman + "--root $HOME/fuse --storage-driver overlay --storage-opt overlay.mount_program=/usr/bin/fuse-overlayfs "
	t.Cleanup(func() { must(t, "alice", fuse+"system reset --force") })
	must(t, "alice", "tar -C $HOME/rootfs -c . | "+fuse+"import - tiny")
	const options = "--rm --network=none --cgroups=disabled --pids-limit=-1 "
	must(t, "alice", fuse+"run "+options+"--device bpfbroker.org/profile=network tiny sh -c 'grep -q fuse /proc/self/mountinfo && "+load+"'")
	must(t, "alice", fuse+"run --detach --name fuse "+options+"--cap-add=BPF,NET_ADMIN tiny sh -c 'mkdir -p /tmp/bpf && exec sleep 100'")
	pid := must(t, "alice", fuse+"inspect --format {{.State.Pid}} fuse")
	eventually(t, "the directory is there", func() bool { return run(t, "alice", fuse+"exec fuse ls /tmp/bpf").code == 0 })
	must(t, "alice", "bpfbroker mount -p network --path /tmp/bpf --pid "+pid)
	must(t, "alice", fuse+"exec --env LIBBPF_BPF_TOKEN_PATH=/tmp/bpf fuse bpftool prog load "+object+" /tmp/bpf/count")
}

// The devices are the profiles, also when these change.
func TestContainerDevices(t *testing.T) {
	withContainers(t)
	devices := func() string {
		var spec struct {
			CDIVersion string
			Kind       string
			Devices    []struct{ Name string }
		}
		if err := json.Unmarshal([]byte(must(t, "alice", "cat /run/cdi/bpfbroker.org-profile.json")), &spec); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, d := range spec.Devices {
			names = append(names, d.Name)
		}
		return spec.Kind + " " + strings.Join(names, " ")
	}
	const shipped = "bpfbroker.org/profile basic network tracing unlimited"
	if got := devices(); got != shipped {
		t.Errorf("the devices are %s", got)
	}
	must(t, "root", "systemctl start bpfbroker.service; printf '[Delegate]\\nCommands=map_create\\nMaps=array\\n' >/etc/bpfbroker/profiles.d/maps.profile; systemctl try-reload-or-restart bpfbroker.service")
	t.Cleanup(func() {
		must(t, "root", "rm -f /etc/bpfbroker/profiles.d/maps.profile; systemctl try-reload-or-restart bpfbroker.service")
		eventually(t, "the device has gone", func() bool { return devices() == shipped })
	})
	eventually(t, "the new profile is a device", func() bool { return strings.Contains(devices(), " maps ") })
	refused(t, "alice", "bpfbroker cdi", 1, "permission denied")
	// Readers never see half of it.
	_, _ = start(t, "root", "echo ready; while :; do bpfbroker cdi; done")
	for range max(2, 10/share) {
		must(t, "alice", "for i in {1..20}; do tail -c 2 /run/cdi/bpfbroker.org-profile.json | grep -q '^}$' || exit 1; done")
	}
	must(t, "root", "systemd-analyze verify --man=no bpfbroker-cdi.service && systemd-analyze security --threshold=20 bpfbroker-cdi.service")
}

// A container engine that asks for many at once gets them all.
func TestContainersAtOnce(t *testing.T) {
	withContainers(t)
	const n = max(4, 8/share)
	must(t, "alice", "for i in {1.."+strconv.Itoa(n)+"}; do "+podmanRun+"--device bpfbroker.org/profile=network "+rootfs+"sh -c '"+load+"' & all+=($!); done; for p in ${all[@]}; do wait $p || exit 1; done")
	if list := grants(t, "alice"); list != "" {
		t.Errorf("there are grants: %s", list)
	}
}
