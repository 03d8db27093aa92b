// SPDX-License-Identifier: Apache-2.0

// Package bus is the way in over D-Bus: org.bpfbroker.Broker1 on the system bus.
// It finds out who calls, and decides nothing.
package bus

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/bus/wire"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/limit"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
)

const (
	busName = "org.bpfbroker.Broker1"

	// doNotQueue is RequestName's flag, primaryOwner its answer.
	doNotQueue   = 4
	primaryOwner = 1
)

const (
	// maxRequests is how many requests of all users are done at a time. Each has
	// a match rule, as has each subscriber, and the bus lets a connection have
	// 512 (max_match_rules_per_connection).
	maxRequests = 256
	// maxSubscribers and maxSubscribersPerUser are how many connections get
	// signals.
	maxSubscribers        = 128
	maxSubscribersPerUser = 8
	// maxSenders is how many connections' uids are remembered.
	maxSenders = 4096
	// maxWaiting and maxWaitingPerSender are how many bytes of messages wait for
	// their sender's uid.
	maxWaiting          = 16 << 20
	maxWaitingPerSender = 32 << 10

	// requestTime is for doing a request, passwords included.
	requestTime = 5 * time.Minute
	// drainTime is how long requests under way may take when the daemon stops.
	drainTime = 5 * time.Second
	// giveUpTime is how much longer they may take when nobody waits for them.
	giveUpTime = 10 * time.Second
	// retryTime is the time from the loss of the bus to the next try.
	retryTime = time.Second
)

// Broker is what the front calls.
type Broker interface {
	ListProfiles() []broker.Offer
	DescribeProfile(name string) (broker.Offer, error)
	Check(ctx context.Context, c broker.Caller) []broker.Finding
	AcquireToken(ctx context.Context, c broker.Caller, profileName string) (grant.Grant, *os.File, error)
	MountToken(ctx context.Context, c broker.Caller, profileName string, process *kernel.Process, root, path string) (grant.Grant, error)
	Withdraw(id grant.ID)
	ListObjects() []broker.Object
	FindObject(name string) (broker.Object, error)
	DescribeObject(name string) (broker.Object, error)
	OpenLink(objectName, link string) (catalog.LinkInfo, error)
	OpenMap(ctx context.Context, c broker.Caller, objectName, mapName string, access catalog.Access) (file *os.File, warnings []string, err error)
	MountObjects(ctx context.Context, c broker.Caller, names []string, process *kernel.Process, path string) (broker.Mounted, error)
	OpenSocket(ctx context.Context, c broker.Caller, objectName, mapName string, queue uint32) (packets *kernel.PacketSocket, device string, err error)
	OpenProgram(ctx context.Context, c broker.Caller, objectName, program string) (*os.File, error)
	// ListGrants returns the caller's grants, or those of all users.
	ListGrants(ctx context.Context, c broker.Caller, all bool) ([]*grant.Grant, error)
	GetGrant(ctx context.Context, c broker.Caller, id string) (grant.Grant, error)
	ExplainGrant(ctx context.Context, c broker.Caller, id string) (broker.Explanation, error)
	RenewGrant(ctx context.Context, c broker.Caller, id string) (grant.Grant, error)
	RevokeGrant(ctx context.Context, c broker.Caller, id string, kill bool) (notReached []string, err error)
	// Watch lets the front hear of each grant and object. That may take seconds, when the bus
	// is slow.
	Watch(broker.Watcher)
}

// Config is what a Front needs.
type Config struct {
	Broker Broker
	// Users counts the requests of each user on all fronts.
	Users *limit.Users
	// OpenProcess opens a process by its id. The receiver closes it.
	OpenProcess func(pid int) (*kernel.Process, error)
	// LogLevel is that of the default logger.
	LogLevel *slog.LevelVar
}

// Front serves org.bpfbroker.Broker1.
type Front struct {
	Config
	address string
	methods map[string]map[string]method // by interface and member
	xml     map[string]string            // of each interface, what is in it
	session atomic.Pointer[session]

	mu        sync.Mutex
	requests  int
	idleSince time.Time

	// Tests put something else in place of what the bus and the system said.
	processFD func(file *os.File, pid uint32) *os.File
	userOf    func(name string, uid uint32) uint32
	accountOf func(uid uint32) uint32
}

// New returns a front for the system bus: the one that DBUS_SYSTEM_BUS_ADDRESS
// names, or the one at its usual place. Each of the broker's methods has its row
// in the access table; one without, or a row without a method, is an error.
func New(config Config) (*Front, error) {
	f := &Front{
		Config:    config,
		address:   wire.SystemBus(),
		idleSince: time.Now(),
		processFD: func(file *os.File, _ uint32) *os.File { return file },
		userOf:    func(_ string, uid uint32) uint32 { return uid },
		accountOf: peer.Account,
	}
	if err := f.describe(broker.Methods); err != nil {
		return nil, err
	}
	f.Broker.Watch(broker.Watcher{
		Made:   func(g grant.Grant) { f.tellOwner(g, added(grantOf(g))) },
		Leased: func(g grant.Grant) { f.tellOwner(g, changed(grantOf(g), "Expires")) },
		Ended: func(g grant.Grant, reason grant.Reason) {
			ended := grantOf(g)
			ended.properties["State"] = dbus.MakeVariant(string(reason))
			f.tellOwner(g, changed(ended, "State"))
			f.tellOwner(g, removed(ended))
		},
		Object: func(o broker.Object, news catalog.News) { f.tellAll(objectSignal(o, news)) },
	})
	return f, nil
}

// IdleSince says whether no request is being done, and since when. Who waits for
// signals doesn't count: when the daemon exits there are no grants, and the bus
// says that it has gone.
func (f *Front) IdleSince() (since time.Time, idle bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.idleSince, f.requests == 0
}

func (f *Front) begin() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.requests >= maxRequests {
		return false
	}
	f.requests++
	return true
}

func (f *Front) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests--
	f.idleSince = time.Now()
}

// Serve serves until ctx is done. When the bus isn't there, or goes away, it
// tries again, so that nothing else depends on the bus. At the end it gives the
// name up, does what was asked until then, waits a while for requests under way
// and then ends their contexts; that they don't end is an error.
func (f *Front) Serve(ctx context.Context) error {
	var last string
	for {
		lost, stuck := f.serveOnce(ctx)
		if ctx.Err() != nil {
			return stuck
		}
		if err := errors.Join(lost, stuck); err.Error() != last {
			last = err.Error()
			slog.WarnContext(ctx, "cannot serve on the bus, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryTime):
		}
	}
}

// serveOnce serves as long as the bus is there, or until ctx is done. lost is what
// happened to the bus, and stuck that requests didn't end.
func (f *Front) serveOnce(ctx context.Context) (lost, stuck error) {
	conn, err := wire.Dial(ctx, f.address)
	if err != nil {
		return err, nil
	}
	s := newSession(ctx, f, conn)
	ended := make(chan struct{})
	var end error
	go func() {
		defer close(ended)
		end = conn.Serve(s)
	}()
	defer func() {
		conn.Close()
		<-ended
	}()
	if err := s.takeName(); err != nil {
		return err, s.drain(false)
	}
	f.session.Store(s)
	defer f.session.Store(nil)
	slog.InfoContext(ctx, "serving on the bus", "name", busName)
	select {
	case <-ended:
		return end, s.drain(false)
	case <-ctx.Done():
		s.giveName()
		return nil, s.drain(true)
	}
}
