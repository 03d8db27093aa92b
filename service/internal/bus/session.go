// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/bus/wire"
)

// session is a connection to the bus and all that depends on it. Unique names
// are never used again on a bus, but another bus begins anew.
type session struct {
	front *Front
	conn  *wire.Conn

	ctx      context.Context // of requests
	cut      context.CancelFunc
	requests sync.WaitGroup
	released chan struct{} // closed when the name has been given up

	// The reader's own.
	senders map[string]*sender
	waiting int // bytes
	closed  bool

	mu          sync.Mutex
	present     map[string]map[*request]struct{} // requests by their sender's name
	subscribers map[string]subscriber            // by name
}

// subscriber is who gets signals, and what its user's limits count by.
type subscriber struct{ uid, account uint32 }

// sender is a connection on the bus that has called.
type sender struct {
	uid     uint32
	account uint32
	known   bool
	waiting []*wire.Message // until the uid is known
	bytes   int
}

func newSession(ctx context.Context, f *Front, conn *wire.Conn) *session {
	s := &session{
		front:       f,
		conn:        conn,
		released:    make(chan struct{}),
		senders:     map[string]*sender{},
		present:     map[string]map[*request]struct{}{},
		subscribers: map[string]subscriber{},
	}
	s.ctx, s.cut = context.WithCancel(context.WithoutCancel(ctx))
	return s
}

func (s *session) takeName() error {
	if _, err := s.conn.Call("AddMatch", goneRule(busName)); err != nil {
		return err
	}
	reply, err := s.conn.Call("RequestName", busName, uint32(doNotQueue))
	if err != nil {
		return err
	}
	var answer uint32
	if err := reply.Decode(&answer); err != nil {
		return err
	}
	if answer != primaryOwner {
		return fmt.Errorf("cannot have the name %s: somebody else has it", busName)
	}
	return nil
}

// giveName gives the name up. The bus sends nothing for it after it has said so
// to everybody, us included.
func (s *session) giveName() {
	s.conn.Tell("ReleaseName", busName)
	select {
	case <-s.released:
	case <-time.After(drainTime):
	}
}

// drain waits for the requests under way. Without a bus nobody waits for them.
func (s *session) drain(wanted bool) error {
	defer s.cut()
	done := make(chan struct{})
	go func() {
		s.requests.Wait()
		close(done)
	}()
	if wanted {
		select {
		case <-done:
			return nil
		case <-time.After(drainTime):
		}
	}
	s.cut()
	select {
	case <-done:
		return nil
	case <-time.After(giveUpTime):
		return errors.New("cannot end all requests in time")
	}
}

// Call takes a method call. It runs in the reader, so nothing here waits.
func (s *session) Call(m *wire.Message) {
	if s.closed {
		return
	}
	from := s.senders[m.Sender]
	if from == nil {
		if from = s.newSender(m.Sender); from == nil {
			s.refuse(m, errBusy)
			return
		}
	}
	size := 512 + min(m.Size, wire.MaxBody)
	switch {
	case from.known:
		s.admit(from, m)
	case from.bytes+size > maxWaitingPerSender, s.waiting+size > maxWaiting:
		s.refuse(m, errQuota)
	default:
		from.waiting = append(from.waiting, m)
		from.bytes += size
		s.waiting += size
	}
}

// newSender asks the bus for the uid of a connection.
func (s *session) newSender(name string) *sender {
	if len(s.senders) >= maxSenders {
		maps.DeleteFunc(s.senders, func(_ string, from *sender) bool { return from.known })
		if len(s.senders) >= maxSenders {
			return nil
		}
	}
	from := &sender{}
	if err := s.conn.Start("GetConnectionUnixUser", func(reply *wire.Message) { s.identified(name, from, reply) }, name); err != nil {
		return nil
	}
	s.senders[name] = from
	return from
}

func (s *session) identified(name string, from *sender, reply *wire.Message) {
	waiting := from.waiting
	s.waiting -= from.bytes
	from.waiting, from.bytes = nil, 0
	if reply == nil || reply.Decode(&from.uid) != nil {
		delete(s.senders, name) // it has gone
		return
	}
	from.uid = s.front.userOf(name, from.uid)
	from.account = s.front.accountOf(from.uid)
	from.known = true
	for _, m := range waiting {
		s.admit(from, m)
	}
}

// admit starts a request, if the user may have one more.
func (s *session) admit(from *sender, m *wire.Message) {
	f, uid, account := s.front, from.uid, from.account
	if !f.Users.Spend(account, 1+m.Size>>10) || !f.Users.Begin(account) {
		s.refuse(m, errQuota)
		return
	}
	if !f.begin() {
		f.Users.End(account)
		s.refuse(m, errBusy)
		return
	}
	s.requests.Go(func() {
		defer f.end()
		defer f.Users.End(account)
		s.serve(uid, account, m)
	})
}

func (s *session) refuse(m *wire.Message, err error) {
	if m.Flags&dbus.FlagNoReplyExpected == 0 {
		s.conn.ReplyError(m, errorName(err), errorText(err))
	}
}

// serve does one request and answers it.
func (s *session) serve(uid, account uint32, m *wire.Message) {
	r := &request{session: s, message: m, uid: uid, account: account}
	var ctx context.Context
	ctx, r.cancel = context.WithTimeout(s.ctx, requestTime)
	defer r.close()
	defer func() {
		if v := recover(); v != nil {
			slog.ErrorContext(ctx, "panic in method", "method", m.Member, "panic", v, "stack", string(debug.Stack()))
			s.refuse(m, errInternal)
		}
	}()
	values, err := r.do(ctx)
	if err != nil {
		s.refuse(m, err)
		return
	}
	if !r.answer(values) && r.undo != nil {
		r.undo()
	}
}

// Signal takes a signal of the bus's. It runs in the reader.
func (s *session) Signal(m *wire.Message) {
	if m.Member != "NameOwnerChanged" || m.Signature != "sss" {
		return
	}
	var name, before, now string
	if err := m.Decode(&name, &before, &now); err != nil || now != "" {
		return
	}
	if name == busName {
		if before == s.conn.Name() && !s.closed {
			s.closed = true
			close(s.released)
		}
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.present[name] {
		r.left.Store(true)
		r.cancel()
	}
	if _, ok := s.subscribers[name]; ok {
		delete(s.subscribers, name)
		s.conn.Tell("RemoveMatch", goneRule(name))
	}
}

// goneRule matches the end of a name on the bus.
func goneRule(name string) string {
	return strings.Join([]string{
		"type='signal'", "sender='org.freedesktop.DBus'", "path='/org/freedesktop/DBus'",
		"interface='org.freedesktop.DBus'", "member='NameOwnerChanged'", "arg0='" + name + "'", "arg2=''",
	}, ",")
}

// expect cancels a request when its sender leaves. What the bus answers after
// this call is the answer of one that is still there.
func (s *session) expect(r *request) {
	name := r.message.Sender
	s.mu.Lock()
	if s.present[name] == nil {
		s.present[name] = map[*request]struct{}{}
	}
	s.present[name][r] = struct{}{}
	s.mu.Unlock()
	s.conn.Tell("AddMatch", goneRule(name))
}

func (s *session) forget(r *request) {
	name := r.message.Sender
	s.conn.Tell("RemoveMatch", goneRule(name))
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.present[name], r)
	if len(s.present[name]) == 0 {
		delete(s.present, name)
	}
}

// subscribe lets a request's sender have signals, until it leaves.
func (s *session) subscribe(r *request) error {
	name := r.message.Sender
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.subscribers[name]; ok || r.left.Load() {
		return nil
	}
	own := 0
	for _, other := range s.subscribers {
		if other.account == r.account {
			own++
		}
	}
	if own >= maxSubscribersPerUser || len(s.subscribers) >= maxSubscribers {
		return errSubscribers
	}
	s.subscribers[name] = subscriber{r.uid, r.account}
	s.conn.Tell("AddMatch", goneRule(name))
	return nil
}

// subscribersThat returns the names of the subscribers whose uids are wanted.
func (s *session) subscribersThat(wanted func(uid uint32) bool) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name, subscriber := range s.subscribers {
		if wanted(subscriber.uid) {
			names = append(names, name)
		}
	}
	return names
}
