// SPDX-License-Identifier: Apache-2.0

// Command demo shows bpfbroker's main job in a test machine: the commands that
// are typed, and what they answer. It fails if one ends otherwise than it
// should.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

const object = "/usr/local/lib/count.bpf.o"

var steps = []struct {
	says    string
	user    string
	command string
	status  int // that it should end with
}{
	{"Without bpfbroker, alice can load nothing.", "alice", "/usr/sbin/bpftool prog load " + object + " /sys/fs/bpf/count", 255},
	{"", "alice", "ebpf-example", 1},

	{"The administrator lets the group bpf use the profile \"network\", with an example from the documentation.", "root",
		"gpasswd --add alice bpf", 0},
	{"", "root", "cp /usr/share/doc/bpfbroker/polkit/20-network-without-guard.rules /etc/polkit-1/rules.d/", 0},

	{"Now alice can: with the distribution's own bpftool,", "alice", "bpfbroker profiles", 0},
	{"", "alice", "bpfbroker run -p network -- sh -c '/usr/sbin/bpftool prog load " + object + " /sys/fs/bpf/count && ls -l /sys/fs/bpf'", 0},
	{"and with a program built on cilium/ebpf. Neither knows of bpfbroker.", "alice", "bpfbroker run -p network -- ebpf-example", 0},

	{"The profile's rights and no more: it has no tracing programs,", "alice", "bpfbroker run -p network -- ebpf-example kprobe", 1},
	{"and the profile \"tracing\" wants an administrator.", "alice", "bpfbroker run -p tracing -- ebpf-example", 77},

	{"While a command runs, its grant can be seen and revoked.", "alice",
		"bpfbroker run -p network -- sleep 30 & until bpfbroker list --no-legend | grep -q network; do sleep 0.1; done; bpfbroker list; " +
			"bpfbroker revoke $(bpfbroker list --no-legend | cut -d' ' -f1); bpfbroker list; kill $!", 0},

	{"The journal has the record.", "root", "journalctl --quiet --no-pager --output=cat --unit=bpfbroker.service BPFBROKER_OWNER=1000", 0},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	fmt.Println("Booting a Debian with systemd, D-Bus and polkit …")
	m, err := machines.Boot(ctx, machines.Product(ctx, ""))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	for _, step := range steps {
		if step.says != "" {
			fmt.Printf("\n# %s\n", step.says)
		}
		prompt := "$"
		if step.user == "root" {
			prompt = "#"
		}
		fmt.Printf("%s%s %s\n", step.user, prompt, step.command)
		out, err := m.Command(ctx, step.user, "bash", "-c", step.command).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			fmt.Print("    ", line)
		}
		code := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		} else if err != nil {
			return err
		}
		if code != 0 {
			fmt.Printf("    (exit status %d)\n", code)
		}
		if code != step.status {
			return fmt.Errorf("%q should not have ended so", step.command)
		}
	}
	return nil
}
