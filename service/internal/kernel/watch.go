// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Watcher tells when processes exit and when a time has come. One thread waits
// for all of it.
type Watcher struct {
	epoll, stop, timer int
	finished           chan struct{}
}

// The keys of what isn't a process: grants are never numbered so.
const (
	stopKey  = 0
	timerKey = ^uint64(0)
)

// NewWatcher starts a watcher, which calls exited, once and one at a time, with
// the key of each process that has exited, and alarm when the time that
// SetAlarm said has come.
func NewWatcher(exited func(key uint64), alarm func()) (_ *Watcher, err error) {
	w := &Watcher{epoll: -1, stop: -1, timer: -1, finished: make(chan struct{})}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("cannot make an epoll instance: %w", err)
	}
	if w.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("cannot make an eventfd: %w", err)
	}
	// Leases go on while the machine sleeps.
	if w.timer, err = unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("cannot make a timer: %w", err)
	}
	if err := w.add(w.stop, unix.EPOLLIN, stopKey); err != nil {
		return nil, err
	}
	if err := w.add(w.timer, unix.EPOLLIN|unix.EPOLLET, timerKey); err != nil {
		return nil, err
	}
	go w.run(exited, alarm)
	return w, nil
}

func (w *Watcher) run(exited func(uint64), alarm func()) {
	defer close(w.finished)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(w.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			panic(fmt.Sprintf("cannot wait for processes: %v", err))
		}
		for _, event := range events[:max(n, 0)] {
			switch key := uint64(uint32(event.Fd)) | uint64(uint32(event.Pad))<<32; key {
			case stopKey:
				return
			case timerKey:
				alarm()
			default:
				exited(key)
			}
		}
	}
}

// SetAlarm sets the time of the next alarm, and forgets the one before. 0 is
// none.
func (w *Watcher) SetAlarm(at BootTime) error {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(at))}
	if err := unix.TimerfdSettime(w.timer, unix.TFD_TIMER_ABSTIME, &spec, nil); err != nil {
		return fmt.Errorf("cannot set a timer: %w", err)
	}
	return nil
}

// BootTime is a time in nanoseconds since the machine's start, the time that
// it slept included (CLOCK_BOOTTIME, clock_gettime(2)).
type BootTime int64

// Now returns the time.
func Now() BootTime {
	var now unix.Timespec
	// It can't fail for a clock that the kernel has.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return BootTime(now.Nano())
}

// Watch begins to watch a process. key isn't 0 nor the highest number, and
// never used twice: unlike an fd's number it can't come to mean another process.
func (w *Watcher) Watch(key uint64, p *Process) error {
	return w.add(p.FD(), unix.EPOLLIN|unix.EPOLLONESHOT, key)
}

func (w *Watcher) add(fd int, events uint32, key uint64) error {
	event := unix.EpollEvent{Events: events, Fd: int32(uint32(key)), Pad: int32(uint32(key >> 32))}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return fmt.Errorf("cannot watch a process: %w", err)
	}
	return nil
}

// Forget ends the watch over a process. It must come before the process is
// closed: whoever else has a copy of the pidfd would keep it in the set.
func (w *Watcher) Forget(p *Process) {
	_ = unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, p.FD(), nil)
}

// Close ends all watches. The functions that NewWatcher was given aren't running
// any more when it returns, so they must not call it.
func (w *Watcher) Close() {
	_, _ = unix.Write(w.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	<-w.finished
	w.close()
}

func (w *Watcher) close() {
	for _, fd := range []int{w.stop, w.timer, w.epoll} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
