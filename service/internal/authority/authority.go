// SPDX-License-Identifier: Apache-2.0

// Package authority asks polkit whether a peer may have what it wants.
package authority

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/bus/wire"
)

// What Check returns, wrapped, when the answer isn't yes.
var (
	// ErrDenied is a no that no authentication would change.
	ErrDenied = errors.New("polkit denies it")
	// ErrChallenge says that somebody could authenticate for it, but that
	// interaction wasn't allowed or no authentication agent is there.
	ErrChallenge = errors.New("polkit wants authentication")
	// ErrDismissed says that the dialog was closed without authentication.
	ErrDismissed = errors.New("authentication was dismissed")
	// ErrUnavailable says that polkit, or the bus to it, isn't there or refuses to
	// decide. polkit before 124 does that, as it knows no pidfds.
	ErrUnavailable = errors.New("polkit is not available")
	// ErrTooManyPrompts says that the user has left too many dialogs unanswered.
	ErrTooManyPrompts = errors.New("too many password prompts of this user wait for an answer")
)

// dbus-daemon lets a connection wait for 128 replies, queues 64 fds for polkit,
// and refuses further calls (max_replies_per_connection, max_outgoing_unix_fds).
// So the checks under way are bounded, in two lots: no number of dialogs that
// nobody answers holds up a check that needs none. And a user who answers none
// can't have all of them.
const (
	maxAnswers       = 32
	maxPrompts       = 64
	maxPromptsOfUser = 8
)

const (
	polkitName      = "org.freedesktop.PolicyKit1"
	polkitPath      = "/org/freedesktop/PolicyKit1/Authority"
	polkitInterface = "org.freedesktop.PolicyKit1.Authority"

	// allowUserInteraction is CheckAuthorization's flag.
	allowUserInteraction = 1
)

// A Subject is the peer that polkit decides about.
type Subject struct {
	// PidFD is a pidfd of the peer. It stays the caller's.
	PidFD int
	// UID is the peer's uid.
	UID uint32
	// Account is what the limits of the peer's user count by.
	Account uint32
	// BusName is the unique name of a peer that came by the bus, "" for others.
	// polkit then asks the bus for the process, and PidFD isn't used.
	BusName string
}

// A Polkit asks polkit over the system bus. It connects when first needed and
// again after the bus went away. Its methods may be called concurrently.
type Polkit struct {
	address string // of the bus

	answers, prompts chan struct{} // one element for each check under way
	checks           atomic.Uint64 // source of cancellation ids

	mu     sync.Mutex
	byUser map[uint32]int // prompts, by account

	lock   chan struct{} // of what follows; a channel, to wait with a context
	conn   *wire.Conn
	ended  chan struct{} // closed when conn has ended
	closed bool
}

// New returns a Polkit for the system bus: the one that
// DBUS_SYSTEM_BUS_ADDRESS names, or the one at its usual place. The caller
// closes it.
func New() *Polkit {
	return &Polkit{
		address: wire.SystemBus(),
		answers: make(chan struct{}, maxAnswers),
		prompts: make(chan struct{}, maxPrompts),
		byUser:  map[uint32]int{},
		lock:    make(chan struct{}, 1),
	}
}

// Close ends the connection. Checks under way, and later ones, fail with
// ErrUnavailable.
func (p *Polkit) Close() {
	p.lock <- struct{}{}
	defer func() { <-p.lock }()
	p.closed = true
	if p.conn != nil {
		p.conn.Close()
	}
}

// Check returns nil when polkit lets subject do action. Otherwise it returns
// ErrDenied, ErrChallenge, ErrDismissed, ErrUnavailable, ErrTooManyPrompts or
// ctx's error, each wrapped, or another error when details aren't fit to be passed. With
// interactive, somebody may be asked for a password, so that the answer can take
// minutes; the dialog goes away when ctx ends. Root is authorized unasked, and
// so is the only one that passes where polkit is absent.
func (p *Polkit) Check(ctx context.Context, subject Subject, action Action, details map[string]string, interactive bool) error {
	if subject.UID == 0 {
		return nil
	}
	if err := checkDetails(details); err != nil {
		return err
	}
	err := p.ask(ctx, p.answers, subject, action, details, 0)
	if !interactive || !errors.Is(err, ErrChallenge) {
		return err
	}
	if !p.beginPrompt(subject.Account) {
		return ErrTooManyPrompts
	}
	defer p.endPrompt(subject.Account)
	return p.ask(ctx, p.prompts, subject, action, details, allowUserInteraction)
}

func (p *Polkit) beginPrompt(account uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byUser[account] >= maxPromptsOfUser {
		return false
	}
	p.byUser[account]++
	return true
}

func (p *Polkit) endPrompt(account uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byUser[account]--; p.byUser[account] == 0 {
		delete(p.byUser, account)
	}
}

func (p *Polkit) ask(ctx context.Context, slots chan struct{}, subject Subject, action Action, details map[string]string, flags uint32) error {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return waitError(ctx)
	}
	free := func() { <-slots }

	id := strconv.FormatUint(p.checks.Add(1), 10)
	// A connection may turn out to be dead only when it is used, and asking twice
	// does no harm.
	for again := true; ; again = false {
		c, err := p.connect(ctx)
		if err != nil {
			free()
			return err
		}
		replies := make(chan *wire.Message, 1)
		err = c.Ask(polkitMethod("CheckAuthorization"), func(reply *wire.Message) { replies <- reply }, checkArgs(subject, action, details, flags, id)...)
		if errors.Is(err, wire.ErrDisconnected) {
			replies <- nil
		} else if err != nil {
			free()
			return fmt.Errorf("cannot send the peer's pidfd to polkit: %w", err)
		}
		select {
		case reply := <-replies:
			if reply == nil && again {
				continue
			}
			free()
			if reply == nil {
				return fmt.Errorf("%w: %v", ErrUnavailable, wire.ErrDisconnected)
			}
			return verdict(reply)
		case <-ctx.Done():
			// The bus goes on counting the call until its reply, so the slot isn't
			// free before.
			go func() {
				defer free()
				// Of a connection that has ended the reply is there.
				_ = c.Ask(polkitMethod("CancelCheckAuthorization"), func(*wire.Message) {}, id)
				<-replies
			}()
			return waitError(ctx)
		}
	}
}

func waitError(ctx context.Context) error {
	return fmt.Errorf("cannot wait for polkit: %w", ctx.Err())
}

// connect returns the connection, made anew if there is none that lives.
func (p *Polkit) connect(ctx context.Context) (*wire.Conn, error) {
	select {
	case p.lock <- struct{}{}:
		defer func() { <-p.lock }()
	case <-ctx.Done():
		return nil, waitError(ctx)
	}
	if p.closed {
		return nil, fmt.Errorf("%w: closed", ErrUnavailable)
	}
	if p.conn != nil {
		select {
		case <-p.ended:
		default:
			return p.conn, nil
		}
	}
	c, err := wire.Dial(ctx, p.address)
	if err != nil {
		if ctx.Err() != nil {
			return nil, waitError(ctx)
		}
		// Not wrapped: a timeout of ours isn't the caller's.
		return nil, fmt.Errorf("%w: %v", ErrUnavailable, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = c.Serve(nil) // why it ended shows nobody anything
	}()
	p.conn, p.ended = c, ended
	return c, nil
}

func polkitMethod(member string) wire.Method {
	return wire.Method{Destination: polkitName, Path: polkitPath, Interface: polkitInterface, Member: member}
}

// checkArgs makes the arguments of CheckAuthorization. The keys of a unix-process
// subject are those of polkit_subject_new_for_gvariant_invocation: with pidfd and
// uid it looks at no other.
func checkArgs(subject Subject, action Action, details map[string]string, flags uint32, cancellationID string) []any {
	type polkitSubject struct {
		Kind    string
		Details map[string]dbus.Variant
	}
	who := polkitSubject{"unix-process", map[string]dbus.Variant{
		"pidfd": dbus.MakeVariant(dbus.UnixFD(subject.PidFD)),
		"uid":   dbus.MakeVariant(int32(subject.UID)),
	}}
	if subject.BusName != "" {
		who = polkitSubject{"system-bus-name", map[string]dbus.Variant{"name": dbus.MakeVariant(subject.BusName)}}
	}
	return []any{who, string(action), details, flags, cancellationID}
}

// verdict turns polkit's reply into what Check returns.
func verdict(reply *wire.Message) error {
	if err := reply.Err(); err != nil {
		return fmt.Errorf("%w: %v", ErrUnavailable, err)
	}
	var result struct {
		Authorized, Challenge bool
		Details               map[string]string
	}
	if err := reply.Decode(&result); err != nil {
		return fmt.Errorf("%w: cannot read its answer: %v", ErrUnavailable, err)
	}
	switch {
	case result.Authorized:
		return nil
	case result.Challenge:
		return fmt.Errorf("%w (%.64q)", ErrChallenge, result.Details["polkit.result"])
	case result.Details["polkit.dismissed"] != "":
		return ErrDismissed
	default:
		return ErrDenied
	}
}
