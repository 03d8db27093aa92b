// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// mayRead lets alice read what the shipped objects publish, until the test's
// end.
func mayRead(t *testing.T) {
	t.Helper()
	const rule = "/etc/polkit-1/rules.d/10-shipped.rules"
	t.Cleanup(func() {
		// They would stay loaded for a while.
		must(t, "root", "rm -f "+rule+`
cd /etc/bpfbroker/objects.d
for name in execs syscall-latency tcp-connections; do ln -s /dev/null $name.object; done
systemctl reset-failed bpfbroker.service
systemctl reload-or-restart bpfbroker.service
rm *.object
systemctl try-reload-or-restart bpfbroker.service
! ls /sys/fs/bpf/bpfbroker/objects | grep .`)
	})
	must(t, "root", `cat >`+rule+` <<'END'
polkit.addRule(function(action, subject) {
    if (action.id == "org.bpfbroker.open-object" && subject.user == "alice" &&
        ["execs", "syscall-latency", "tcp-connections"].indexOf(action.lookup("object")) >= 0) {
        return polkit.Result.YES;
    }
});
END
systemctl reset-failed bpfbroker.service`)
}

// The shipped objects, by the client's commands and by somebody who may not
// load anything.
func TestShippedObjects(t *testing.T) {
	mayRead(t)
	list := must(t, "alice", "bpfbroker objects")
	for _, name := range []string{"execs", "syscall-latency", "tcp-connections"} {
		if !strings.Contains(list, name+" ") {
			t.Errorf("%s is not there:\n%s", name, list)
		}
		if show := must(t, "alice", "bpfbroker object show "+name); !strings.Contains(show, "Available: yes\n") || !strings.Contains(show, "struct ") {
			t.Errorf("%s:\n%s", name, show)
		}
	}
	refused(t, "bob", "bpfbroker object dump execs/commands", 77, "polkit")
	refused(t, "alice", "bpfbroker object dump execs/nothing", 1, "no such map")

	// The first look loads the object.
	must(t, "alice", "bpfbroker object dump execs/commands")
	must(t, "alice", "cp /bin/true ~/counted; for i in 1 2 3 4 5; do ~/counted; done; rm ~/counted")
	if out := must(t, "alice", "bpfbroker object dump execs/commands"); !strings.Contains(out, "\n1000 counted ") || !strings.Contains(out, " 5\n") {
		t.Errorf("the commands:\n%s", out)
	}
	var entries []struct {
		Key   struct{ UID, Command any }
		Value struct{ Execs int }
	}
	if err := json.Unmarshal([]byte(must(t, "alice", "bpfbroker -qj object dump execs/commands")), &entries); err != nil {
		t.Error(err)
	}
	found := false
	for _, e := range entries {
		found = found || e.Key.Command == "counted" && e.Key.UID == float64(1000) && e.Value.Execs == 5
	}
	if !found {
		t.Errorf("the commands in JSON: %v", entries)
	}
	if out := must(t, "alice", "bpfbroker object dump syscall-latency/syscalls"); !strings.Contains(out, "\nbpf ") {
		t.Errorf("system calls:\n%s", out)
	}

	// Records as they come.
	event := must(t, "alice", `(sleep 1; exec /bin/echo 'an argument' >/dev/null) &
timeout 20 bpfbroker -q object watch execs/events | grep -m 1 '^[^"]* file=/bin/echo '`)
	if !strings.Contains(event, ` uid=1000 gid=1000 command=echo file=/bin/echo arguments="/bin/echo an argument"`) {
		t.Errorf("an execution: %s", event)
	}

	// What they have is for reading.
	const fd = `bpfbroker -q object open execs/commands -- `
	if out := must(t, "alice", fd+`sh -c 'echo $LISTEN_FDS $LISTEN_FDNAMES; readlink /proc/self/fd/3'`); out != "1 execs/commands\nanon_inode:bpf-map\n" {
		t.Errorf("handed on: %s", out)
	}
	if flags := must(t, "alice", fd+`grep flags: /proc/self/fdinfo/3`); !strings.HasSuffix(strings.TrimSpace(flags), "0") {
		t.Errorf("it can be written to: %s", flags)
	}

	// Mounted, an unmodified program finds them.
	mounted := must(t, "alice", `unshare -Urm sh -c 'bpfbroker -q object mount execs tcp-connections /mnt && ls /mnt/execs /mnt/tcp-connections'`)
	if !strings.Contains(mounted, "commands\n") || !strings.Contains(mounted, "services\n") {
		t.Errorf("mounted: %s", mounted)
	}
}

// get makes an HTTP request in the machine, which has no program for that.
func get(t *testing.T, user, address, path string) string {
	t.Helper()
	host, port, _ := strings.Cut(address, ":")
	return must(t, user, fmt.Sprintf(`exec 3<>/dev/tcp/%s/%s && printf 'GET %s HTTP/1.0\r\n\r\n' >&3 && cat <&3`, host, port, strings.ReplaceAll(path, "%", "%%")))
}

// query asks Prometheus for the value of an expression, NaN if there is none.
func query(t *testing.T, expression string) (value float64, ok bool) {
	t.Helper()
	_, body, _ := strings.Cut(get(t, "bob", "127.0.0.1:9090", "/api/v1/query?query="+url.QueryEscape(expression)), "\r\n\r\n")
	var answer struct {
		Data struct{ Result []struct{ Value [2]any } }
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.Data.Result) != 1 {
		return 0, false
	}
	text, _ := answer.Data.Result[0].Value[1].(string)
	value, err := strconv.ParseFloat(text, 64)
	return value, err == nil
}

// alice's user service exports, and Prometheus, as Debian has it, scrapes it.
func TestExport(t *testing.T) {
	mayRead(t)
	debian, err := machines.Package(t.Context(), "prometheus")
	if err != nil {
		t.Fatal(err)
	}
	prometheus, err := os.ReadFile(filepath.Join(debian, "usr/bin/prometheus"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		must(t, "root", "rm -rf /usr/local/bin/prometheus /home/bob/prometheus* /home/alice/.config/bpfbroker")
	})
	if err := machine.WriteFile(t.Context(), "/usr/local/bin/prometheus", 0o755, prometheus); err != nil {
		t.Fatal(err)
	}

	session := login(t, "alice")
	systemctl := func(args ...string) string {
		t.Helper()
		out, err := session.Command(t.Context(), "systemctl", append([]string{"--user"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("systemctl --user %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	must(t, "alice", `mkdir -p ~/.config/bpfbroker
echo 'MAPS=execs/commands tcp-connections/services syscall-latency/syscalls' >~/.config/bpfbroker/export.conf`)
	systemctl("start", "bpfbroker-export.socket")
	_, body, _ := strings.Cut(get(t, "bob", "127.0.0.1:9436", "/metrics"), "\r\n\r\n")
	for _, m := range []string{`map="commands",object="execs"`, `map="services",object="tcp-connections"`, `map="syscalls",object="syscall-latency"`} {
		if !strings.Contains(body, "bpfbroker_export_up{"+m+"} 1\n") {
			t.Fatalf("%s is not there:\n%s\n%s", m, body, systemctl("status", "bpfbroker-export.service"))
		}
	}

	must(t, "bob", `cat >~/prometheus.yml <<'END'
global:
  scrape_interval: 1s
scrape_configs:
  - job_name: bpfbroker
    static_configs:
      - targets: ["127.0.0.1:9436"]
END`)
	start(t, "bob", "exec prometheus --config.file=$HOME/prometheus.yml --storage.tsdb.path=$HOME/prometheus --web.listen-address=127.0.0.1:9090 2>&1")
	eventually(t, "Prometheus listens", func() bool { return run(t, "bob", "bash -c ': 3<>/dev/tcp/127.0.0.1/9090'").code == 0 })
	is := func(expression string, want func(float64) bool) func() bool {
		return func() bool {
			value, ok := query(t, expression)
			return ok && want(value)
		}
	}
	exactly := func(n float64) func(float64) bool { return func(v float64) bool { return v == n } }
	eventually(t, "a scrape", is(`up{job="bpfbroker"}`, exactly(1)))

	// Figures that are known: executions, and the connections that the scrapes
	// themselves are.
	must(t, "bob", "cp /bin/true ~/scraped; for i in 1 2 3 4 5 6 7; do ~/scraped; done; rm ~/scraped")
	eventually(t, "bob's executions", is(`execs_commands_execs_total{uid="1001",command="scraped"}`, exactly(7)))
	const served = `tcp_connections_services_closed_total{role="TCP_SERVER",port="9436"}`
	eventually(t, "scrapes", is(served, func(v float64) bool { return v >= 3 }))
	eventually(t, "bytes", is(`tcp_connections_services_sent_bytes_total{role="TCP_SERVER",port="9436"} / `+served, func(v float64) bool { return v > 1000 }))
	eventually(t, "lifetimes", is(`histogram_quantile(0.5, tcp_connections_services_lifetime_seconds_bucket{role="TCP_SERVER",port="9436"})`,
		func(v float64) bool { return v > 0 && v < 10 }))
	must(t, "bob", "sleep 0.1") // there may have been none since
	eventually(t, "the latency of system calls", is(
		`syscall_latency_syscalls_duration_seconds_sum{syscall="clock_nanosleep"} / syscall_latency_syscalls_duration_seconds_count{syscall="clock_nanosleep"}`,
		func(v float64) bool { return v > 0 && v < time.Hour.Seconds() }))
	if metadata := get(t, "bob", "127.0.0.1:9090", "/api/v1/metadata?metric=syscall_latency_syscalls_duration_seconds"); !strings.Contains(metadata, `"type":"histogram"`) {
		t.Errorf("what Prometheus knows of it: %s", metadata)
	}

	// The right is gone: so are the figures, within a minute.
	must(t, "root", "rm /etc/polkit-1/rules.d/10-shipped.rules")
	for deadline := time.Now().Add(90 * time.Second); !is("sum(bpfbroker_export_up)", exactly(0))(); time.Sleep(time.Second) {
		if time.Now().After(deadline) {
			t.Fatalf("still exported:\n%s", brokerJournal(t))
		}
	}
	systemctl("stop", "bpfbroker-export.socket", "bpfbroker-export.service")
	refused(t, "bob", "bpfbroker export execs/commands", 77, "polkit")
}
