// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// InterfaceWatcher tells when network interfaces come, go or change.
type InterfaceWatcher struct {
	socket   *os.File
	finished chan struct{}
}

// WatchInterfaces starts a watcher for the network namespace of the calling
// thread (rtnetlink(7)), which calls changed, one at a time, when anything has
// changed since the call before.
func WatchInterfaces(changed func()) (*InterfaceWatcher, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cannot make a netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("cannot listen for network interfaces: %w", err)
	}
	w := &InterfaceWatcher{os.NewFile(uintptr(fd), "netlink"), make(chan struct{})}
	go w.run(changed)
	return w, nil
}

func (w *InterfaceWatcher) run(changed func()) {
	defer close(w.finished)
	conn, err := w.socket.SyscallConn()
	if err != nil {
		return
	}
	buffer := make([]byte, 64<<10)
	for {
		// What the messages say isn't looked at, and those that were lost (ENOBUFS)
		// are as good as those that came. All that wait are one.
		got := false
		err := conn.Read(func(fd uintptr) bool {
			for {
				_, err := unix.Read(int(fd), buffer)
				if err == unix.EAGAIN {
					return got
				}
				got = got || err == nil || err == unix.ENOBUFS
				if err != nil && err != unix.ENOBUFS && err != unix.EINTR {
					return true
				}
			}
		})
		if err != nil || !got {
			return
		}
		changed()
	}
}

// Close ends the watch. changed isn't running any more when it returns.
func (w *InterfaceWatcher) Close() {
	_ = w.socket.Close()
	<-w.finished
}
