// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

type mockSubject struct {
	Kind    string
	Details map[string]dbus.Variant
}

type mockResult struct {
	Authorized, Challenge bool
	Details               map[string]string
}

// A mockCheck is one CheckAuthorization as a mock saw it.
type mockCheck struct {
	Kind      string
	PID       int // that the pidfd is of
	UID       int32
	Keys      int // of the subject
	Action    string
	Details   map[string]string
	Flags     uint32
	ID        string
	cancelled <-chan struct{}
}

// A mock is a polkit whose answers a test makes.
type mock struct {
	t      testing.TB
	conn   *dbus.Conn
	answer func(mockCheck) (mockResult, *dbus.Error)

	mu       sync.Mutex
	checks   map[string]chan struct{} // under way, by cancellation id
	seen     []mockCheck
	notFound int // cancellations of no check
}

func newMock(t testing.TB, bus testBus, answer func(mockCheck) (mockResult, *dbus.Error)) *mock {
	t.Helper()
	m := &mock{t: t, conn: bus.connect(), answer: answer, checks: make(map[string]chan struct{})}
	if err := m.conn.Export(m, polkitPath, polkitInterface); err != nil {
		t.Fatal(err)
	}
	if reply, err := m.conn.RequestName(polkitName, dbus.NameFlagDoNotQueue); err != nil || reply != dbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("cannot be polkit: %v, %v", reply, err)
	}
	return m
}

func (m *mock) CheckAuthorization(subject mockSubject, action string, details map[string]string, flags uint32, id string) (mockResult, *dbus.Error) {
	check := mockCheck{Kind: subject.Kind, Keys: len(subject.Details), Action: action, Details: details, Flags: flags, ID: id}
	if fd, ok := subject.Details["pidfd"].Value().(dbus.UnixFD); ok {
		check.PID = pidOf(m.t, int(fd))
		if err := syscall.Close(int(fd)); err != nil {
			m.t.Error(err)
		}
	}
	check.UID, _ = subject.Details["uid"].Value().(int32)
	cancelled := make(chan struct{})
	check.cancelled = cancelled

	m.mu.Lock()
	if _, used := m.checks[id]; used {
		m.mu.Unlock()
		return mockResult{}, dbus.NewError("org.freedesktop.PolicyKit1.Error.CancellationIdNotUnique", nil)
	}
	m.checks[id] = cancelled
	m.seen = append(m.seen, check)
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.checks, id)
		m.mu.Unlock()
	}()
	return m.answer(check)
}

func (m *mock) CancelCheckAuthorization(id string) *dbus.Error {
	m.mu.Lock()
	defer m.mu.Unlock()
	cancelled, ok := m.checks[id]
	if !ok {
		m.notFound++
		return dbus.NewError("org.freedesktop.PolicyKit1.Error.Failed", nil)
	}
	close(cancelled)
	return nil
}

func (m *mock) underWay() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.checks)
}

// pidOf reads the pid that a pidfd is of, 0 if it is none.
func pidOf(t testing.TB, fd int) int {
	file, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		t.Error(err)
		return 0
	}
	defer file.Close()
	pid := 0
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "Pid:"); ok {
			if _, err := fmt.Sscan(value, &pid); err != nil {
				t.Error(err)
			}
		}
	}
	return pid
}

// says answers every check alike.
func says(authorized, challenge bool, details map[string]string) func(mockCheck) (mockResult, *dbus.Error) {
	return func(mockCheck) (mockResult, *dbus.Error) {
		return mockResult{authorized, challenge, details}, nil
	}
}

// prompts answers a check without interaction with a challenge, and one with
// interaction only when it is cancelled.
func prompts(check mockCheck) (mockResult, *dbus.Error) {
	if check.Flags&allowUserInteraction == 0 {
		return mockResult{false, true, map[string]string{"polkit.result": "auth_admin"}}, nil
	}
	<-check.cancelled
	return mockResult{false, false, map[string]string{"polkit.dismissed": "true"}}, nil
}

var selfPidFD = sync.OnceValues(func() (int, error) { return unix.PidfdOpen(os.Getpid(), 0) })

// self gives this process as an ordinary user's.
func self(t testing.TB) Subject {
	t.Helper()
	fd, err := selfPidFD()
	if err != nil {
		t.Fatal(err)
	}
	return Subject{PidFD: fd, UID: 1000}
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func mustPass(t *testing.T, p *Polkit) {
	t.Helper()
	if err := p.Check(testContext(t), self(t), TokenBasic, nil, false); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition that another goroutine makes true.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for range 1000 {
		if condition() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not within 10 s: %s", what)
}

func TestCheckAnswers(t *testing.T) {
	tests := []struct {
		name        string
		answer      func(mockCheck) (mockResult, *dbus.Error)
		interactive bool
		want        error
		flags       []uint32
	}{
		{"yes", says(true, false, nil), false, nil, []uint32{0}},
		{"yes needs no interaction", says(true, false, nil), true, nil, []uint32{0}},
		{"no", says(false, false, nil), false, ErrDenied, []uint32{0}},
		{"no needs no interaction", says(false, false, nil), true, ErrDenied, []uint32{0}},
		{"challenge", says(false, true, map[string]string{"polkit.result": "auth_admin"}), false, ErrChallenge, []uint32{0}},
		{"no agent", says(false, true, map[string]string{"polkit.result": "auth_admin"}), true, ErrChallenge, []uint32{0, 1}},
		{"authenticated", func(c mockCheck) (mockResult, *dbus.Error) {
			return mockResult{c.Flags == 1, c.Flags == 0, nil}, nil
		}, true, nil, []uint32{0, 1}},
		{"dismissed", func(c mockCheck) (mockResult, *dbus.Error) {
			return mockResult{false, c.Flags == 0, map[string]string{"polkit.dismissed": "true"}}, nil
		}, true, ErrDismissed, []uint32{0, 1}},
		{"wrong password", func(c mockCheck) (mockResult, *dbus.Error) {
			return mockResult{false, c.Flags == 0, nil}, nil
		}, true, ErrDenied, []uint32{0, 1}},
		{"error", func(mockCheck) (mockResult, *dbus.Error) {
			return mockResult{}, dbus.NewError("org.freedesktop.PolicyKit1.Error.Failed", []any{"Action is not registered"})
		}, true, ErrUnavailable, []uint32{0}},
		{"error without a text", func(mockCheck) (mockResult, *dbus.Error) {
			return mockResult{true, false, nil}, dbus.NewError("x.Y", []any{uint32(1)})
		}, true, ErrUnavailable, []uint32{0}},
		{"too long an answer", says(true, false, map[string]string{"x": strings.Repeat("x", 1<<20)}), false, ErrUnavailable, []uint32{0}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			bus := newBus(t)
			m := newMock(t, bus, test.answer)
			err := bus.polkit().Check(testContext(t), self(t), TokenNetwork, map[string]string{DetailProfile: "network"}, test.interactive)
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			var flags []uint32
			for _, check := range m.seen {
				flags = append(flags, check.Flags)
			}
			if diff := cmp.Diff(test.flags, flags); diff != "" {
				t.Errorf("the flags of the checks: %s", diff)
			}
		})
	}
}

// An answer of another type must not be taken for a yes.
func TestCheckWrongType(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	c := bus.connect()
	if err := c.ExportMethodTable(map[string]any{
		"CheckAuthorization": func(subject mockSubject, _ string, _ map[string]string, _ uint32, _ string) (bool, *dbus.Error) {
			if fd, ok := subject.Details["pidfd"].Value().(dbus.UnixFD); ok {
				_ = syscall.Close(int(fd))
			}
			return true, nil
		},
	}, polkitPath, polkitInterface); err != nil {
		t.Fatal(err)
	}
	if _, err := c.RequestName(polkitName, 0); err != nil {
		t.Fatal(err)
	}
	err := bus.polkit().Check(testContext(t), self(t), TokenBasic, nil, false)
	if !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want %v", err, ErrUnavailable)
	}
}

// polkit gets what it needs, and nothing that it would take otherwise.
func TestCheckArguments(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	m := newMock(t, bus, says(true, false, nil))
	p := bus.polkit()
	details := map[string]string{DetailProfile: "network", DetailTier: "unlimited", DetailGuard: "absent",
		DetailPrograms: "sched_cls xdp", DetailTargetUID: "1000", DetailPeerUnit: "a.service", DetailTargetUnit: "é.scope"}
	subject := self(t)
	for _, uid := range []uint32{1000, 1<<32 - 2} {
		subject.UID = uid
		if err := p.Check(testContext(t), subject, TokenUnlimitedOthers, maps.Clone(details), false); err != nil {
			t.Fatal(err)
		}
	}
	want := mockCheck{Kind: "unix-process", PID: os.Getpid(), UID: 1000, Keys: 2,
		Action: "org.bpfbroker.token-unlimited-others", Details: details, ID: "1"}
	second := want
	second.UID, second.ID = -2, "2"
	ignore := cmp.FilterPath(func(path cmp.Path) bool { return path.Last().String() == ".cancelled" }, cmp.Ignore())
	if diff := cmp.Diff([]mockCheck{want, second}, m.seen, ignore); diff != "" {
		t.Error(diff)
	}
}

func TestCheckDetails(t *testing.T) {
	t.Parallel()
	p := New() // nothing is to reach the bus
	p.address = "unix:path=/nonexistent"
	for key, value := range map[string]string{
		"polkit.message": "Say yes",
		"unknown":        "x",
		DetailProfile:    "a\x00b",
		DetailTier:       "a\nb",
		DetailGuard:      "\xff",
		DetailPeerUnit:   "\x1b[2J",
		DetailTargetUnit: "a\u202eb",
		DetailPrograms:   strings.Repeat("x", maxDetail+1),
	} {
		err := p.Check(testContext(t), Subject{PidFD: -1, UID: 1000}, TokenBasic, map[string]string{key: value}, false)
		if err == nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("%q=%.20q: got %v", key, value, err)
		}
	}
}

func TestCheckRootAndAbsence(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	absent := New()
	absent.address = "unix:path=/nonexistent"
	for name, p := range map[string]*Polkit{"no bus": absent, "no polkit": bus.polkit()} {
		root := Subject{PidFD: -1, UID: 0}
		if err := p.Check(testContext(t), root, TokenUnlimited, nil, false); err != nil {
			t.Errorf("%s: root got %v", name, err)
		}
		if err := p.Check(testContext(t), self(t), TokenBasic, nil, true); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: a user got %v", name, err)
		}
		p.Close()
		if err := p.Check(testContext(t), self(t), TokenBasic, nil, true); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: after Close a user got %v", name, err)
		}
	}
}

// A bad fd is the trouble of its check only.
func TestCheckBadFD(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	newMock(t, bus, says(true, false, nil))
	p := bus.polkit()
	mustPass(t, p)
	c := p.conn
	err := p.Check(testContext(t), Subject{PidFD: -1, UID: 1000}, TokenBasic, nil, false)
	if !errors.Is(err, syscall.EBADF) {
		t.Errorf("got %v, want %v", err, syscall.EBADF)
	}
	mustPass(t, p)
	if p.conn != c {
		t.Error("the connection didn't survive")
	}
}

// A bus that takes the connection and says nothing costs the caller's time only.
func TestCheckSilentBus(t *testing.T) {
	t.Parallel()
	socket := t.TempDir() + "/bus"
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 5); err != nil {
		t.Fatal(err)
	}
	p := New()
	p.address = "unix:path=" + socket
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := p.Check(ctx, self(t), TokenBasic, nil, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// When the caller leaves, the dialog does so too, and Check doesn't wait for it.
func TestCheckCancelled(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]error{"leaves": context.Canceled, "deadline": context.DeadlineExceeded} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bus := newBus(t)
			m := newMock(t, bus, prompts)
			p := bus.polkit()
			var ctx context.Context
			var cancel context.CancelFunc
			if want == context.Canceled {
				ctx, cancel = context.WithCancel(testContext(t))
				go func() {
					for m.underWay() == 0 || len(p.prompts) == 0 {
						time.Sleep(time.Millisecond)
					}
					cancel()
				}()
			} else {
				ctx, cancel = context.WithTimeout(testContext(t), 200*time.Millisecond)
			}
			defer cancel()
			if err := p.Check(ctx, self(t), TokenTracing, nil, true); !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
			eventually(t, "the dialog is gone", func() bool { return m.underWay() == 0 })
			eventually(t, "its slot is free", func() bool { return len(p.prompts) == 0 })
			if m.notFound != 0 {
				t.Error("a check was cancelled under a wrong id")
			}
		})
	}
}

// polkit answers after the caller has gone, and doesn't know the cancellation.
func TestCheckLateAnswer(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	release := make(chan struct{})
	var first atomic.Bool
	newMock(t, bus, func(mockCheck) (mockResult, *dbus.Error) {
		if first.CompareAndSwap(false, true) {
			<-release
		}
		return mockResult{true, false, nil}, nil
	})
	p := bus.polkit()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := p.Check(ctx, self(t), TokenBasic, nil, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
	if len(p.answers) != 1 {
		t.Error("the slot is free before the bus forgot the call")
	}
	mustPass(t, p)
	close(release)
	eventually(t, "the slot is free", func() bool { return len(p.answers) == 0 })
	mustPass(t, p)
}

// More dialogs than there are slots for hold up no check that needs none.
func TestCheckManyPrompts(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	m := newMock(t, bus, func(check mockCheck) (mockResult, *dbus.Error) {
		if check.Action == string(TokenBasic) {
			return mockResult{true, false, nil}, nil
		}
		return prompts(check)
	})
	p := bus.polkit()
	subject := self(t)
	ctx, cancel := context.WithCancel(testContext(t))
	var wait sync.WaitGroup
	for i := range 2 * maxPrompts {
		subject := subject
		subject.Account = uint32(i / maxPromptsOfUser)
		wait.Go(func() {
			if err := p.Check(ctx, subject, TokenTracing, nil, true); !errors.Is(err, context.Canceled) {
				t.Errorf("a prompt got %v", err)
			}
		})
	}
	eventually(t, "all slots are taken", func() bool { return len(p.prompts) == maxPrompts && m.underWay() == maxPrompts })
	for range 100 {
		mustPass(t, p)
	}
	cancel()
	wait.Wait()
	eventually(t, "the dialogs are gone", func() bool { return m.underWay() == 0 && len(p.prompts) == 0 })
}

// Who answers no dialogs leaves room for those of the others.
func TestPromptsOfAUser(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	m := newMock(t, bus, prompts)
	p := bus.polkit()
	subject := self(t)
	ctx, cancel := context.WithCancel(testContext(t))
	var wait sync.WaitGroup
	for range maxPromptsOfUser {
		wait.Go(func() {
			if err := p.Check(ctx, subject, TokenTracing, nil, true); !errors.Is(err, context.Canceled) {
				t.Errorf("a prompt got %v", err)
			}
		})
	}
	eventually(t, "all dialogs are there", func() bool { return m.underWay() == maxPromptsOfUser })
	if err := p.Check(ctx, subject, TokenTracing, nil, true); !errors.Is(err, ErrTooManyPrompts) {
		t.Errorf("one more: got %v", err)
	}
	if err := p.Check(ctx, subject, TokenTracing, nil, false); !errors.Is(err, ErrChallenge) {
		t.Errorf("without a dialog: got %v", err)
	}
	other := subject
	other.Account++
	wait.Go(func() {
		if err := p.Check(ctx, other, TokenTracing, nil, true); !errors.Is(err, context.Canceled) {
			t.Errorf("another user's prompt got %v", err)
		}
	})
	eventually(t, "another user has a dialog", func() bool { return m.underWay() == maxPromptsOfUser+1 })
	cancel()
	wait.Wait()
	if len(p.byUser) != 0 {
		t.Errorf("still counted: %v", p.byUser)
	}
}

func TestCheckConcurrently(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	newMock(t, bus, func(check mockCheck) (mockResult, *dbus.Error) {
		return mockResult{check.Details[DetailProfile] == "yes", false, nil}, nil
	})
	p := bus.polkit()
	subject := self(t)
	ctx := testContext(t)
	var wait sync.WaitGroup
	for i := range 1000 {
		wait.Go(func() {
			profile, want := "yes", error(nil)
			if i%2 == 1 {
				profile, want = "no", ErrDenied
			}
			if err := p.Check(ctx, subject, TokenBasic, map[string]string{DetailProfile: profile}, i%3 == 0); !errors.Is(err, want) {
				t.Errorf("check %d got %v, want %v", i, err, want)
			}
		})
	}
	wait.Wait()
	if len(p.answers) != 0 {
		t.Errorf("%d slots are left", len(p.answers))
	}
}

func TestBusRestarted(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	newMock(t, bus, says(true, false, nil))
	p := bus.polkit()
	mustPass(t, p)
	bus.Stop()
	if err := p.Check(testContext(t), self(t), TokenBasic, nil, false); !errors.Is(err, ErrUnavailable) {
		t.Errorf("without a bus: got %v, want %v", err, ErrUnavailable)
	}
	bus.Start()
	newMock(t, bus, says(true, false, nil))
	mustPass(t, p)
}

// A check under way when the bus is killed fails, or is asked anew, but doesn't hang.
func TestBusKilledDuringCheck(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	m := newMock(t, bus, prompts)
	p := bus.polkit()
	done := make(chan error)
	go func() { done <- p.Check(testContext(t), self(t), TokenTracing, nil, true) }()
	eventually(t, "the dialog is there", func() bool { return len(p.prompts) == 1 && m.underWay() == 1 })
	bus.Stop()
	if err := <-done; !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want %v", err, ErrUnavailable)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, cancelled := range m.checks { // nobody else ends it
		close(cancelled)
	}
}

// polkit's crash ends its checks, not the connection.
func TestPolkitRestarted(t *testing.T) {
	t.Parallel()
	bus := newBus(t)
	release := make(chan struct{})
	m := newMock(t, bus, func(mockCheck) (mockResult, *dbus.Error) {
		<-release
		return mockResult{}, nil
	})
	p := bus.polkit()
	done := make(chan error)
	go func() { done <- p.Check(testContext(t), self(t), TokenBasic, nil, false) }()
	eventually(t, "the check is there", func() bool { return m.underWay() == 1 })
	if err := m.conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want %v", err, ErrUnavailable)
	}
	close(release)
	newMock(t, bus, says(true, false, nil))
	mustPass(t, p)
}
