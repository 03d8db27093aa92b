// SPDX-License-Identifier: Apache-2.0

// Command bench measures, in a test machine, what bpfbroker costs beside what it
// stands on and beside what people use without it. It prints medians and their
// ratios, keeps the samples in build/bench/samples.json, and fails if a ratio is
// over its bound; and in machines on other kernels, in instructions rather than
// in time, what the guard costs. Run it at the top of the source tree.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

const (
	socket  = "/run/bpfbroker/org.bpfbroker.Broker"
	profile = "network"
	uid     = "1000" // alice's
	// commandUnit is that of machines.Machine.Command.
	commandUnit = "machine-command.service"
)

var errOver = errors.New("a figure is over its bound")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	if err := build(ctx); err != nil {
		return err
	}
	fmt.Println("Booting kernels that can have the guard …")
	figures, err := guard(ctx)
	if err != nil {
		return err
	}
	for _, f := range figures {
		fmt.Print(f)
	}
	fmt.Println("Booting a Debian with systemd, D-Bus and polkit …")
	machine, err := machines.Boot(ctx, options(ctx))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, machine.Close()) }()

	b := &bench{Machine: machine}
	for _, measure := range []func(context.Context) ([]figure, error){
		b.token, b.unit, b.command, b.activation, b.container, b.crowd, b.bus, b.many, b.list,
		b.openMap, b.readMap, b.boot,
	} {
		measured, err := measure(ctx)
		if err != nil {
			return err
		}
		for _, f := range measured {
			fmt.Print(f)
		}
		figures = append(figures, measured...)
	}
	data, err := json.MarshalIndent(figures, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(buildDir, "samples.json"), data, 0o644); err != nil {
		return err
	}
	fmt.Println()
	for _, f := range figures {
		fmt.Println(f.line())
		if !f.OK {
			err = errOver
		}
	}
	return err
}

// bench takes the figures.
type bench struct{ *machines.Machine }

// token measures a token, from the client's first byte until the client has it,
// beside what the kernel and polkit need for it.
func (b *bench) token(ctx context.Context) (_ []figure, err error) {
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	token := programs.start(b.tokenClient(ctx))
	info := programs.start(b.Command(ctx, "alice", programDir+"/client", "call", socket))
	raw := programs.start(b.Command(ctx, "root", programDir+"/raw", uid))
	args, err := b.polkitArgs(ctx)
	if err != nil {
		return nil, err
	}
	polkit := programs.start(b.Command(ctx, "root", programDir+"/polkit", args...))

	sides, err := interleave(10, 300,
		side{"token", token},
		side{"raw kernel flow", raw},
		side{"polkit check", polkit},
		side{"new connection, GetInfo", info},
	)
	if err != nil {
		return nil, err
	}
	f := compare("a token / (raw kernel flow + polkit check)", sides, sides[0].median(), sides[1].median()+sides[2].median())
	return []figure{f.atMost(2.5)}, nil
}

func (b *bench) tokenClient(ctx context.Context) command {
	return b.Command(ctx, "alice", "unshare", "-Urm", programDir+"/client", "token", socket, profile)
}

// polkitArgs is what the broker asks polkit for such a token.
func (b *bench) polkitArgs(ctx context.Context) ([]string, error) {
	cmd := b.Command(ctx, "alice", "varlinkctl", "call", "--json=short", socket, "org.bpfbroker.Broker.DescribeProfile", fmt.Sprintf(`{"profile":%q}`, profile))
	cmd.Stderr = os.Stderr
	data, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("cannot describe the profile: %w", err)
	}
	var reply struct {
		Profile struct {
			Tier     string
			Programs []string
		}
	}
	if err := json.Unmarshal(data, &reply); err != nil {
		return nil, fmt.Errorf("cannot read the profile's description: %w", err)
	}
	p := reply.Profile
	return []string{
		"unix-process", uid, "org.bpfbroker.token-" + p.Tier,
		"profile=" + profile, "tier=" + p.Tier, "guard=absent", "programs=" + strings.Join(p.Programs, " "),
		"target.uid=" + uid, "target.unit=" + commandUnit, "target.user-unit=", "peer.unit=" + commandUnit, "peer.user-unit=",
	}, nil
}

// unit measures a token beside a transient unit of systemd's with one.
func (b *bench) unit(ctx context.Context) (_ []figure, err error) {
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	token := programs.start(b.tokenClient(ctx))
	run := programs.start(b.Command(ctx, "alice", programDir+"/spawn", "bpfbroker", "run", "-p", profile, "--", "true"))
	unit := programs.start(b.Command(ctx, "root", programDir+"/spawn", "systemd-run", "--quiet", "--wait",
		"-p", "PrivateBPF=yes", "-p", "PrivateUsers=self",
		"-p", "BPFDelegateCommands=BPFMapCreate,BPFProgLoad,BPFBtfLoad", "-p", "BPFDelegateMaps=any",
		"-p", "BPFDelegatePrograms=any", "-p", "BPFDelegateAttachments=any", "true"))

	sides, err := interleave(2, 30,
		side{"token", token},
		side{"systemd-run --wait -p PrivateBPF=yes -p PrivateUsers=self … true", unit},
		side{"bpfbroker run -- true", run},
	)
	if err != nil {
		return nil, err
	}
	f := compare("systemd-run -p PrivateBPF=yes / a token", sides, sides[1].median(), sides[0].median())
	return []figure{f.atLeast(10)}, nil
}

// command measures a command with a token beside one in the same namespaces.
func (b *bench) command(ctx context.Context) (_ []figure, err error) {
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	run := programs.start(b.Command(ctx, "alice", programDir+"/spawn", "bpfbroker", "run", "-p", profile, "--", "true"))
	unshare := programs.start(b.Command(ctx, "alice", programDir+"/spawn", "unshare", "-Urm", "true"))

	sides, err := interleave(5, 200, side{"bpfbroker run -- true", run}, side{"unshare -Urm true", unshare})
	if err != nil {
		return nil, err
	}
	f := compare("bpfbroker run / unshare", sides, sides[0].median(), sides[1].median())
	return []figure{f.atMost(4)}, nil
}

// activation measures the first answer of a service that systemd has to start
// for it, beside that of one that can do nothing else.
func (b *bench) activation(ctx context.Context) (_ []figure, err error) {
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	if err := b.do(ctx, "systemctl", "start", "getinfo.socket"); err != nil {
		return nil, err
	}
	first := func(unit, socket string) sampler {
		client := programs.start(b.Command(ctx, "alice", programDir+"/client", "call", socket))
		return func() (int64, error) {
			// systemd would take so many starts for a failure, and so many a second
			// for a loop (TriggerLimitBurst= in systemd.socket(5)).
			time.Sleep(100 * time.Millisecond)
			if err := b.do(ctx, "systemctl", "stop", unit); err != nil {
				return 0, err
			}
			if err := b.do(ctx, "systemctl", "reset-failed", unit); err != nil {
				return 0, err
			}
			return client()
		}
	}
	sides, err := interleave(2, 40,
		side{"bpfbroker.service", first("bpfbroker.service", socket)},
		side{"GetInfo alone", first("getinfo.service", "/run/getinfo")},
	)
	if err != nil {
		return nil, err
	}
	f := compare("first answer after activation / that of GetInfo alone", sides, sides[0].median(), sides[1].median())
	return []figure{f.below(4)}, nil
}
