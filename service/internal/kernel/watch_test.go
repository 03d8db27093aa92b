// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// watcher starts a watcher that says what it hears of.
func watcher(t *testing.T) (*Watcher, <-chan uint64, <-chan BootTime) {
	t.Helper()
	exited, alarms := make(chan uint64, 100), make(chan BootTime, 100)
	w, err := NewWatcher(func(key uint64) { exited <- key }, func() { alarms <- Now() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w, exited, alarms
}

// hears wants the watcher to say that a process has exited, once.
func hears(t *testing.T, exited <-chan uint64, want uint64) {
	t.Helper()
	select {
	case got := <-exited:
		if got != want {
			t.Errorf("heard that %#x exited, not %#x", got, want)
		}
	case <-time.After(5 * time.Second):
		t.Errorf("did not hear that %#x exited", want)
	}
	quiet(t, exited)
}

func quiet[T any](t *testing.T, c <-chan T) {
	t.Helper()
	select {
	case got := <-c:
		t.Errorf("heard of %v", got)
	case <-time.After(30 * time.Millisecond):
	}
}

func TestWatchExit(t *testing.T) {
	testtarget.NoLeaks(t)
	w, exited, _ := watcher(t)
	// Keys use all their bits.
	for _, key := range []uint64{1, 0xffffffff, 0xfedcba9876543210, 1 << 63, timerKey - 1} {
		p := testtarget.Start(t, testtarget.Attr{})
		if err := w.Watch(key, processOf(t, p)); err != nil {
			t.Fatal(err)
		}
		quiet(t, exited)
		p.Kill()
		hears(t, exited, key)
	}
}

func TestWatchExited(t *testing.T) {
	testtarget.NoLeaks(t)
	w, exited, _ := watcher(t)
	p := testtarget.Start(t, testtarget.Attr{})
	process := processOf(t, p)
	p.Kill()
	if err := w.Watch(7, process); err != nil {
		t.Fatal(err)
	}
	hears(t, exited, 7)
}

func TestWatchTwice(t *testing.T) {
	testtarget.NoLeaks(t)
	w, exited, _ := watcher(t)
	// Two grants of one process have a descriptor each.
	p := testtarget.Start(t, testtarget.Attr{})
	for key := range uint64(2) {
		if err := w.Watch(key+1, processOf(t, p)); err != nil {
			t.Fatal(err)
		}
	}
	p.Kill()
	if a, b := <-exited, <-exited; a+b != 3 {
		t.Errorf("heard of %d and %d", a, b)
	}
	quiet(t, exited)
}

func TestForget(t *testing.T) {
	testtarget.NoLeaks(t)
	w, exited, _ := watcher(t)
	p := testtarget.Start(t, testtarget.Attr{})
	process, err := NewProcess(p.Dup())
	if err != nil {
		t.Fatal(err)
	}
	copied, err := process.Clone() // which keeps the open file description
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	if err := w.Watch(1, process); err != nil {
		t.Fatal(err)
	}
	w.Forget(process)
	process.Close()
	p.Kill()
	quiet(t, exited)
}

// onTime wants the next alarm at a time, and not before.
func onTime(t *testing.T, alarms <-chan BootTime, at BootTime) {
	t.Helper()
	select {
	case got := <-alarms:
		if late := time.Duration(got - at); late < 0 {
			t.Errorf("the alarm came %v early", -late)
		} else if late > time.Second {
			t.Errorf("the alarm came %v late", late)
		}
	case <-time.After(5 * time.Second):
		t.Error("no alarm")
	}
}

func in(d time.Duration) BootTime { return Now() + BootTime(d) }

func setAlarm(t *testing.T, w *Watcher, at BootTime) {
	t.Helper()
	if err := w.SetAlarm(at); err != nil {
		t.Fatal(err)
	}
}

func TestAlarm(t *testing.T) {
	testtarget.NoLeaks(t)
	w, _, alarms := watcher(t)
	for _, d := range []time.Duration{0, time.Nanosecond, time.Millisecond, 3 * time.Millisecond, 50 * time.Millisecond} {
		at := in(d)
		setAlarm(t, w, at)
		onTime(t, alarms, at)
		quiet(t, alarms)
	}
	// The past is now.
	setAlarm(t, w, 1)
	onTime(t, alarms, Now()-BootTime(time.Millisecond))

	setAlarm(t, w, in(time.Hour))
	earlier := in(20 * time.Millisecond)
	setAlarm(t, w, earlier)
	onTime(t, alarms, earlier)

	setAlarm(t, w, in(20*time.Millisecond))
	later := in(100 * time.Millisecond)
	setAlarm(t, w, later)
	onTime(t, alarms, later)

	setAlarm(t, w, in(10*time.Millisecond))
	setAlarm(t, w, 0)
	quiet(t, alarms)
}

func TestCloseWatcher(t *testing.T) {
	testtarget.NoLeaks(t)
	// Close waits for what is running.
	running, ended := make(chan struct{}), false
	w, err := NewWatcher(func(uint64) {}, func() {
		close(running)
		time.Sleep(50 * time.Millisecond)
		ended = true
	})
	if err != nil {
		t.Fatal(err)
	}
	setAlarm(t, w, Now())
	<-running
	w.Close()
	if !ended {
		t.Error("the alarm still runs")
	}
}
