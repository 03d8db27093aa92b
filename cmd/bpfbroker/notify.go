// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

// handOverTime is what a service manager has to take a message in.
const handOverTime = 30 * time.Second

// underManager says whether bpfbroker is the main process of a service whose
// manager takes notifications from it. Of a process that a service's main one
// has started, SYSTEMD_EXEC_PID is another's (systemd 248); of one of ExecStop=
// and its like, MAINPID is set.
func underManager() bool {
	return os.Getenv("NOTIFY_SOCKET") != "" && os.Getenv("MAINPID") == "" &&
		os.Getenv("SYSTEMD_EXEC_PID") == strconv.Itoa(os.Getpid())
}

// handOver tells the service manager that pid is the service's main process from
// now on, and returns when it knows: the notifications of any other process may
// count for nothing. systemd 246 has the barrier, see sd_notify_barrier(3).
func handOver(ctx context.Context, pid int) error {
	err := notifyMainPID(ctx, pid)
	if err != nil {
		return fmt.Errorf("cannot hand over to the service manager: %w", err)
	}
	return nil
}

func notifyMainPID(ctx context.Context, pid int) error {
	manager := &net.UnixAddr{Name: os.Getenv("NOTIFY_SOCKET"), Net: "unixgram"}
	// Without an address of its own: package net sends no descriptors on a
	// datagram socket that is connected.
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return err
	}
	defer conn.Close()
	done, barrier, err := os.Pipe()
	if err != nil {
		return err
	}
	defer done.Close()
	defer context.AfterFunc(ctx, func() { _, _ = conn.Close(), done.Close() })()
	deadline := time.Now().Add(handOverTime)
	_, _ = conn.SetDeadline(deadline), done.SetReadDeadline(deadline) // both can
	if _, err = conn.WriteToUnix(fmt.Appendf(nil, "MAINPID=%d", pid), manager); err == nil {
		_, _, err = conn.WriteMsgUnix([]byte("BARRIER=1"), syscall.UnixRights(int(barrier.Fd())), manager)
	}
	_ = barrier.Close()
	if err != nil {
		return err
	}
	// Nobody writes to it; it ends when the manager closes the other end.
	if _, err := done.Read(make([]byte, 1)); os.IsTimeout(err) {
		return err
	}
	return ctx.Err()
}
