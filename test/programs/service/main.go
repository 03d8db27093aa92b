// SPDX-License-Identifier: Apache-2.0

// Command service is a service as systemd would have it: it takes its sockets,
// says when it is ready, and keeps its watchdog quiet. It tells of itself in its
// status and ends on SIGTERM, with the status 3.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
)

func main() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP)
	_, direct := os.LookupEnv("SYSTEMD_EXEC_PID")
	direct = direct && os.Getenv("SYSTEMD_EXEC_PID") == fmt.Sprint(os.Getpid())
	sockets := len(activation.Files(true))
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		fmt.Fprintln(os.Stderr, "service:", err)
		os.Exit(1)
	}
	_, err = daemon.SdNotify(false, fmt.Sprintf("READY=1\nSTATUS=pid %d, %d sockets, watchdog %v, direct %v", os.Getpid(), sockets, watchdog, direct))
	if err != nil {
		fmt.Fprintln(os.Stderr, "service:", err)
		os.Exit(1)
	}
	var tick <-chan time.Time
	if watchdog > 0 {
		tick = time.Tick(watchdog / 4)
	}
	for {
		select {
		case <-tick:
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		case s := <-signals:
			fmt.Println("got", s)
			if s == syscall.SIGTERM {
				time.Sleep(200 * time.Millisecond) // does it come again?
				fmt.Println("further signals:", len(signals))
				os.Exit(3)
			}
		}
	}
}
