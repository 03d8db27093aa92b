// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const (
	crowd = 1000
	// endTime is how long the broker may take to see a crowd's end.
	endTime = 30 * time.Second
)

// crowd measures what the daemon holds while there are many grants, and whether
// it gives all of it back.
func (b *bench) crowd(ctx context.Context) (_ []figure, err error) {
	// A grant before, for what is made when it is first needed.
	var programs group
	_, err = interleave(0, 1, side{"token", programs.start(b.tokenClient(ctx))})
	if err := errors.Join(err, programs.close()); err != nil {
		return nil, err
	}
	pid, err := b.mainPID(ctx)
	if err != nil {
		return nil, err
	}
	time.Sleep(time.Second) // until nothing is left of it
	before, err := b.awaitFiles(ctx, pid, func(int) bool { return true })
	if err != nil {
		return nil, err
	}

	cmd := b.Command(ctx, "alice", programDir+"/client", "crowd", socket, profile, strconv.Itoa(crowd))
	in, out, err := pipes(cmd)
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	_, err = readNumber(bufio.NewReader(out))
	var status []byte
	if err == nil {
		status, err = b.ReadFile(ctx, "/proc/"+pid+"/status")
	}
	if err == nil {
		err = b.checkGrants(ctx)
	}
	if err := errors.Join(err, in.Close(), cmd.Wait()); err != nil {
		return nil, fmt.Errorf("cannot make %d grants: %w", crowd, err)
	}
	after, err := b.awaitFiles(ctx, pid, func(files int) bool { return files <= before })
	if err != nil {
		return nil, err
	}

	var figures []figure
	for _, field := range []string{"VmRSS", "VmHWM"} {
		size, err := statusField(status, field)
		if err != nil {
			return nil, err
		}
		f := figure{Name: fmt.Sprintf("%s of the daemon with %d grants", field, crowd), Value: float64(size) / 1024, Unit: "MiB"}
		figures = append(figures, f.atMost(32))
	}
	f := figure{Name: fmt.Sprintf("file descriptors after their end (before: %d)", before), Value: float64(after)}
	return append(figures, f.atMost(float64(before))), nil
}

// checkGrants returns an error unless the whole crowd's grants are live.
func (b *bench) checkGrants(ctx context.Context) error {
	out, err := b.Command(ctx, "alice", "bpfbroker", "list", "--no-legend").Output()
	if err != nil {
		return fmt.Errorf("cannot list the grants: %w", err)
	}
	if n := bytes.Count(out, []byte("\n")); n != crowd {
		return fmt.Errorf("there are %d", n)
	}
	return nil
}

func (b *bench) mainPID(ctx context.Context) (string, error) {
	out, err := b.Command(ctx, "root", "systemctl", "show", "--property=MainPID", "--value", "bpfbroker.service").Output()
	if err != nil {
		return "", fmt.Errorf("cannot find the daemon: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// awaitFiles waits, though not for good, until the daemon has a number of open
// files that is enough, and returns how many it has.
func (b *bench) awaitFiles(ctx context.Context, pid string, enough func(int) bool) (int, error) {
	deadline := time.Now().Add(endTime)
	for {
		out, err := b.Command(ctx, "root", "ls", "/proc/"+pid+"/fd").Output()
		if err != nil {
			return 0, fmt.Errorf("cannot count the daemon's files: %w", err)
		}
		files := bytes.Count(out, []byte("\n"))
		if enough(files) || time.Now().After(deadline) {
			return files, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// statusField returns a field of a /proc/PID/status, in KiB.
func statusField(status []byte, name string) (int, error) {
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		}
	}
	return 0, fmt.Errorf("cannot find %s in a process's status", name)
}
