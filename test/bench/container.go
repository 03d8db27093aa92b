// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// container measures a grant to a container that runs beside one to a command
// of its user's, both as people get them.
func (b *bench) container(ctx context.Context) (_ []figure, err error) {
	// It sleeps as long as its input is open.
	const root = "/home/alice/bench"
	if err := b.do(ctx, "install", "-D", "--owner=alice", "-t", root, programDir+"/spawn"); err != nil {
		return nil, err
	}
	if err := b.do(ctx, "chown", "alice:", root); err != nil {
		return nil, err
	}
	cmd := b.Command(ctx, "alice", "podman", "--log-level=error", "run", "--rm", "--interactive", "--name=bench",
		"--network=none", "--cgroups=disabled", "--pids-limit=-1", "--rootfs", root, "/spawn", "nothing")
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, in.Close(), cmd.Wait()) }()
	pid, err := b.containerPID(ctx)
	if err != nil {
		return nil, err
	}

	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	mount := programs.start(b.Command(ctx, "alice", programDir+"/spawn", "bpfbroker", "mount", "-p", profile, "--pid", pid))
	run := programs.start(b.Command(ctx, "alice", programDir+"/spawn", "bpfbroker", "run", "-p", profile, "--", "true"))
	sides, err := interleave(2, 60, side{"bpfbroker mount --pid CONTAINER", mount}, side{"bpfbroker run -- true", run})
	if err != nil {
		return nil, err
	}
	f := compare("a grant to a container / a plain one", sides, sides[0].median(), sides[1].median())
	return []figure{f.atMost(3)}, nil
}

// containerPID waits for the container.
func (b *bench) containerPID(ctx context.Context) (string, error) {
	for range 100 {
		out, err := b.Command(ctx, "alice", "podman", "--log-level=error", "inspect", "--format", "{{.State.Status}} {{.State.Pid}}", "bench").Output()
		if pid, running := strings.CutPrefix(string(out), "running "); err == nil && running {
			return strings.TrimSpace(pid), nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return "", fmt.Errorf("cannot start a container: %w", context.DeadlineExceeded)
}
