// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/bus/wire"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
)

// request is one method call, for the time that it is done.
type request struct {
	session *session
	message *wire.Message
	uid     uint32
	account uint32 // what the user's limits count by
	cancel  context.CancelFunc
	left    atomic.Bool // the sender has gone

	expected bool
	peer     *peer.Peer // nil until somebody asks who calls
	files    []*os.File // what is handed out
	undo     func()     // takes back what did not reach the caller, or nil
}

// close gives up what the request holds.
func (r *request) close() {
	r.cancel()
	if r.expected {
		r.session.forget(r)
	}
	if r.peer != nil {
		r.peer.Close()
	}
	for _, file := range r.files {
		_ = file.Close() // the receiver has it, or nobody
	}
}

// do finds the method and calls it.
func (r *request) do(ctx context.Context) ([]any, error) {
	m := r.message
	if m.TooLarge {
		return nil, errTooLarge
	}
	method, err := r.session.front.find(m.Path, m.Interface, m.Member)
	if err != nil {
		return nil, err
	}
	if m.Signature != method.in {
		return nil, failure("InvalidArgs", "cannot take arguments (%s) for %s: they are (%s)", m.Signature, m.Member, method.in)
	}
	return method.handle(ctx, r)
}

// answer sends the reply. It returns false when that can't reach the caller. One
// that leaves as soon as it has the answer has got it.
func (r *request) answer(values []any) bool {
	if r.message.Flags&dbus.FlagNoReplyExpected != 0 || r.left.Load() {
		return false
	}
	send := r.session.conn.Reply
	if r.undo != nil {
		send = r.session.conn.Deliver
	}
	if err := send(r.message, values...); err != nil {
		slog.Debug("cannot answer", "method", r.message.Member, "error", err) // anyone can make this happen
		r.session.refuse(r.message, errInternal)
		return false
	}
	return true
}

// decode reads the arguments.
func (r *request) decode(into ...any) error {
	if err := r.message.Decode(into...); err != nil {
		return failure("InvalidArgs", "%v", err)
	}
	return nil
}

// decodeOptions reads the arguments, of which the last are options. known has
// where to put the value of each.
func (r *request) decodeOptions(known map[string]any, into ...any) error {
	options := map[string]dbus.Variant{}
	if err := r.decode(append(into, &options)...); err != nil {
		return err
	}
	for key, value := range options {
		target, ok := known[key]
		if !ok {
			return failure("InvalidArgs", "unknown option %.64q", key)
		}
		if err := dbus.Store([]any{value.Value()}, target); err != nil {
			return failure("InvalidArgs", "option %q: %v", key, err)
		}
	}
	return nil
}

// caller finds out who calls. From then on the request ends when the caller
// leaves the bus.
func (r *request) caller() (broker.Caller, error) {
	if r.peer == nil {
		r.expected = true
		r.session.expect(r)
		var err error
		if r.peer, err = r.session.identify(r.message.Sender); err != nil {
			return broker.Caller{}, err
		}
	}
	return broker.Caller{
		Peer:        r.peer,
		Interactive: r.message.Flags&dbus.FlagAllowInteractiveAuthorization != 0,
		BusName:     r.message.Sender,
	}, nil
}

// identify asks the bus for the credentials of a connection. The caller closes
// the peer.
func (s *session) identify(name string) (*peer.Peer, error) {
	reply, file, err := s.conn.CallForFile("GetConnectionCredentials", name)
	if err != nil {
		// The bus knows every connection that is there.
		return nil, fmt.Errorf("cannot tell who calls: %w: %v", kernel.ErrProcessGone, err)
	}
	found := map[string]dbus.Variant{}
	// What can't be decoded is as good as not there.
	_ = reply.Decode(&found)
	uid, ok := found["UnixUserID"].Value().(uint32)
	pid, _ := found["ProcessID"].Value().(uint32)
	file = s.front.processFD(file, pid)
	if !ok || file == nil {
		if file != nil {
			_ = file.Close() // it is nothing but a pidfd
		}
		return nil, errNoPidFD
	}
	process, err := kernel.NewProcess(file)
	if err != nil {
		return nil, fmt.Errorf("cannot tell who calls: %w", err)
	}
	groups, _ := found["UnixGroupIDs"].Value().([]uint32)
	label, _ := found["LinuxSecurityLabel"].Value().([]byte)
	return peer.New(&kernel.Credentials{
		UID: s.front.userOf(name, uid),
		// The bus doesn't say which of the groups is the first.
		GID:     ^uint32(0),
		Groups:  groups,
		Label:   string(bytes.TrimRight(label, "\x00")),
		Process: process,
	}), nil
}

// handOut makes the answer of a new grant.
func (r *request) handOut(g grant.Grant, err error) ([]any, error) {
	if err != nil {
		return nil, err
	}
	r.undo = func() { r.session.front.Broker.Withdraw(g.ID) }
	return []any{grantPath(g)}, nil
}
