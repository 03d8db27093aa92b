// SPDX-License-Identifier: Apache-2.0

// Package varlink answers Varlink calls on a Unix socket: connections, limits, errors and the org.varlink.service interface.
package varlink

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/limit"
	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

const (
	serviceInterface = "org.varlink.service"
	brokerInterface  = "org.bpfbroker.Broker"
)

// serviceDescription is the interface that the Varlink specification asks of every service.
const serviceDescription = `# What this service is, and which interfaces it has.
interface org.varlink.service

# Names the service and lists its interfaces.
method GetInfo() -> (
  # Who made it.
  vendor: string,
  # What it is called.
  product: string,
  # Which version runs.
  version: string,
  # Where to read about it.
  url: string,
  # All interfaces, sorted by name.
  interfaces: []string
)

# Returns the description of one interface.
method GetInterfaceDescription(
  # The interface's name.
  interface: string
) -> (
  # The interface in Varlink's definition language.
  description: string
)

# There is no such interface.
error InterfaceNotFound (interface: string)

# The interface has no such method.
error MethodNotFound (method: string)

# The interface has the method, but this service does not.
error MethodNotImplemented (method: string)

# A parameter is unknown, missing or has the wrong type or value.
error InvalidParameter (parameter: string)

# The caller may not do this.
error PermissionDenied ()

# The method gives several replies and wants to be called with more.
error ExpectedMore ()
`

// Error is an error reply: its full name and its parameters, which become a JSON object.
type Error struct {
	Name       string
	Parameters any
}

func (e *Error) Error() string { return fmt.Sprintf("%s %+v", e.Name, e.Parameters) }

// VarlinkError makes an error one that is sent under its own name.
func (e *Error) VarlinkError() (name string, parameters any) { return e.Name, e.Parameters }

// InvalidParameter says that a parameter, given by its name, is unknown, missing or has the wrong type or value.
func InvalidParameter(name string) *Error {
	return serviceError("InvalidParameter", "parameter", name)
}

func serviceError(name, key, value string) *Error {
	return &Error{Name: serviceInterface + "." + name, Parameters: map[string]string{key: value}}
}

// brokerError is what the broker's errors look like, see org.bpfbroker.Broker.
func brokerError(name, layer, reason, remedy string) *Error {
	return &Error{Name: brokerInterface + "." + name, Parameters: struct {
		Reason string `json:"reason"`
		Layer  string `json:"layer"`
		Remedy string `json:"remedy"`
	}{reason, layer, remedy}}
}

var (
	errInternal = brokerError("Internal", "request", "the service failed", "see \"journalctl -u bpfbroker.service\"")
	errInvalid  = brokerError("InvalidMessage", "request", "the message is not a Varlink call",
		"send one JSON object with exact field names, each once, ended by NUL")
	errNoSuchFile = brokerError("NoSuchFileDescriptor", "request", "no file descriptor with that index came with the message",
		"send the file descriptor with the message that names its index")
	errUnexpectedFile = brokerError("UnexpectedFileDescriptor", "request", "a file descriptor came with the message that no parameter names",
		"send only file descriptors that the method asks for")
	errConnections = brokerError("TooManyConnections", "limit", "too many connections at a time", "close connections and try again")
	errQuota       = brokerError("QuotaExceeded", "limit", "too many requests from this user", "wait and try again")
)

// Peer is who is at the other end of a connection.
type Peer interface {
	// Key is the user id that the limits per user are counted by.
	Key() uint32
	// Close is called when the connection has ended and none of its requests runs any more.
	Close()
}

// Method is one method of an interface.
type Method[P Peer] struct {
	// MaxFiles is how many file descriptors may come in with a call.
	MaxFiles int
	// Streams says that the method gives any number of replies by Call.Send, then one more by returning. It has to be called with "more", and its time
	// has no end but the peer's and the server's.
	Streams bool
	// Handle does the call. It must Decode the parameters and take every file descriptor before it acts. The context ends with the request's time,
	// when the peer hangs up (but not for a oneway call, where peers do so at once), and when the server doesn't wait for it any longer. The peer may
	// be used until Handle returns. An error that has VarlinkError in its chain is sent under that name, all others as
	// org.bpfbroker.Broker.Internal without their text. A nil reply has no parameters.
	Handle func(ctx context.Context, peer P, call *Call) (*Reply, error)
}

// Call is one method call, for the time of Handle.
type Call struct {
	parameters json.RawMessage
	decoded    bool
	begun      bool       // it counts as one of the user's
	files      []*os.File // nil: taken
	send       func(wire.Reply) error
}

// Send sends one reply of several, see Method.Streams. It waits for the peer to take it, as long as Limits.Write says.
func (c *Call) Send(parameters any) error {
	data, err := encode(parameters)
	if err != nil {
		return err
	}
	return c.send(wire.Reply{Parameters: data, Continues: true})
}

// Decode reads the parameters into the struct that into points to, see wire.Decode. The error is for the peer.
func (c *Call) Decode(into any) error {
	c.decoded = true
	if err := wire.Decode(c.parameters, into); err != nil {
		var field *wire.FieldError
		if errors.As(err, &field) {
			return InvalidParameter(field.Field)
		}
		return errInvalid
	}
	return nil
}

// File hands over the file descriptor with that index, once. It is of any kind, and was open in the peer: reading its attributes, writing or even
// closing it can take as long as the peer wants. The error is for the peer.
func (c *Call) File(index int) (*os.File, error) {
	if index < 0 || index >= len(c.files) || c.files[index] == nil {
		return nil, errNoSuchFile
	}
	f := c.files[index]
	c.files[index] = nil
	return f, nil
}

// Reply is what a Handle answers.
type Reply struct {
	// Parameters becomes a JSON object; nil is an empty one.
	Parameters any
	// Files are sent along, and always closed.
	Files []*os.File
	// Undo is called when the answer could not be sent, or the call was oneway; it may be nil.
	Undo func()
}

// Limits of a Server. 0 stands for the default.
type Limits struct {
	MessageBytes       int           // longest message, without its NUL: 64 KiB
	Connections        int           // at a time, in all: 1024
	ConnectionsPerUser int           // at a time: 128
	RequestsPerUser    int           // at a time: 32
	Rate               int           // requests per user and second, one for each KiB begun: 500
	Burst              int           // requests per user that may come at once, likewise: 2000
	Arrival            time.Duration // from a message's first bytes to its end: 10 s
	Idle               time.Duration // of a connection without a whole request: 60 s
	Request            time.Duration // for doing a request: 5 min
	Write              time.Duration // for sending a reply: 10 s
	Linger             time.Duration // while stopping, of a connection without a whole request: 250 ms
	Drain              time.Duration // while stopping, for the requests under way: 5 s
}

func (l Limits) withDefaults() Limits {
	return Limits{
		MessageBytes:       cmp.Or(l.MessageBytes, 64<<10),
		Connections:        cmp.Or(l.Connections, 1024),
		ConnectionsPerUser: cmp.Or(l.ConnectionsPerUser, 128),
		Arrival:            cmp.Or(l.Arrival, 10*time.Second),
		Idle:               cmp.Or(l.Idle, 60*time.Second),
		Request:            cmp.Or(l.Request, 5*time.Minute),
		Write:              cmp.Or(l.Write, 10*time.Second),
		Linger:             cmp.Or(l.Linger, 250*time.Millisecond),
		Drain:              cmp.Or(l.Drain, 5*time.Second),
	}
}

// Config is what a Server serves.
type Config[P Peer] struct {
	// Vendor, Product, Version and URL are for org.varlink.service.GetInfo.
	Vendor, Product, Version, URL string
	// Interfaces holds the definitions by name, without org.varlink.service.
	Interfaces map[string]string
	// Methods holds the methods by full name.
	Methods map[string]Method[P]
	// Identify says who is at the other end. It must not block: nobody else connects meanwhile. It leaves the connection alone.
	Identify func(*net.UnixConn) (P, error)
	// Users counts the requests of each user, on all fronts.
	Users  *limit.Users
	Limits Limits
}

// Server answers calls.
type Server[P Peer] struct {
	config      Config[P]
	connLimits  wire.Limits
	connections connections
}

// New checks that every method belongs to an interface.
func New[P Peer](config Config[P]) (*Server[P], error) {
	s := &Server[P]{config: config}
	s.config.Limits = config.Limits.withDefaults()
	s.config.Interfaces = maps.Clone(config.Interfaces)
	s.config.Methods = maps.Clone(config.Methods)
	s.addService()
	files := 1
	for name, method := range s.config.Methods {
		if _, ok := s.config.Interfaces[interfaceOf(name)]; !ok {
			return nil, fmt.Errorf("cannot serve method %q: it has no interface", name)
		}
		files = max(files, method.MaxFiles)
	}
	l := s.config.Limits
	s.connLimits = wire.Limits{Bytes: l.MessageBytes, Files: files, Arrival: l.Arrival, Write: l.Write}
	s.connections = connections{limits: l, byKey: make(map[uint32]int), idleSince: time.Now()}
	return s, nil
}

// IdleSince says whether there is no connection, and since when.
func (s *Server[P]) IdleSince() (since time.Time, idle bool) {
	s.connections.mu.Lock()
	defer s.connections.mu.Unlock()
	return s.connections.idleSince, s.connections.all == 0
}

// Serve accepts and serves connections until ctx is done. Then it takes no further ones: they stay in the kernel's backlog for whoever has the
// listening socket next. Those it has it serves on, until they have no request for Limits.Linger. After Limits.Drain it ends the contexts of the
// requests that are still under way, and after Limits.Write more it gives up on them, which is an error. It doesn't close l,
// but leaves it with a deadline in the past.
func (s *Server[P]) Serve(ctx context.Context, l *net.UnixListener) error {
	stopping, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })() // wakes Accept
	requests, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()

	var conversations sync.WaitGroup
	err := s.accept(ctx, l, func(c *wire.Conn, peer P) {
		conversations.Go(func() { s.converse(stopping, requests, c, peer) })
	})
	stop()
	drained := make(chan struct{})
	go func() {
		conversations.Wait()
		close(drained)
	}()
	select {
	case <-drained:
		return err
	case <-time.After(s.config.Limits.Drain):
	}
	cut()
	select {
	case <-drained:
		return err
	case <-time.After(s.config.Limits.Write):
		return errors.Join(err, errors.New("cannot end all requests in time"))
	}
}

// accept starts every connection that may be.
func (s *Server[P]) accept(ctx context.Context, l *net.UnixListener, start func(*wire.Conn, P)) error {
	for {
		unix, err := l.AcceptUnix()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.ENOBUFS):
			slog.WarnContext(ctx, "cannot accept connection", "error", err)
			time.Sleep(100 * time.Millisecond) // others give back what is missing
			continue
		default:
			return fmt.Errorf("cannot accept connection: %w", err)
		}
		c := wire.NewConn(unix, s.connLimits)
		peer, err := s.config.Identify(unix)
		if err != nil {
			slog.DebugContext(ctx, "cannot identify peer", "error", err) // anyone can make this happen
			refuse(c, err)
			continue
		}
		if !s.connections.connect(peer.Key()) {
			peer.Close()
			refuse(c, errConnections)
			continue
		}
		start(c, peer)
	}
}

// refuse sends an error and closes the connection. It doesn't wait on a new one, whose buffer is empty.
func refuse(c *wire.Conn, err error) {
	reply, _ := errorReply(err)
	_ = c.WriteMessage(reply) // the peer may be gone
	_ = c.Close()
}

// incoming is a message as it came from wire.Conn.ReadMessage.
type incoming struct {
	data  []byte
	files []*os.File
	err   error
}

// converse serves one connection. stopping ends when the server wants to stop, requests when it won't wait any longer.
func (s *Server[P]) converse(stopping, requests context.Context, c *wire.Conn, peer P) {
	defer s.connections.disconnect(peer.Key()) // last: closing a peer's file descriptors can take long, and counts
	defer peer.Close()
	present, hangUp := context.WithCancel(requests)
	messages := make(chan incoming)
	var reader sync.WaitGroup
	reader.Go(func() { read(present, hangUp, c, messages) })
	defer reader.Wait()
	defer c.Close()
	defer hangUp()

	for {
		m, ok := s.next(stopping, messages)
		if !ok || !s.serve(stopping, present, requests, c, peer, m) {
			return
		}
	}
}

// read reads one message ahead, so that it sees the peer hang up while a request is done. It delivers errors that have an answer.
func read(present context.Context, hangUp func(), c *wire.Conn, messages chan<- incoming) {
	defer close(messages)
	for {
		data, files, err := c.ReadMessage()
		switch {
		case err == nil, errors.Is(err, wire.ErrMessageTooLarge), errors.Is(err, wire.ErrTooManyFiles):
		case errors.Is(err, os.ErrDeadlineExceeded):
			return // still there, and waiting for the answers to whole messages
		default:
			hangUp()
			return
		}
		select {
		case messages <- incoming{data, files, err}:
		case <-present.Done():
			wire.CloseFiles(files)
			return
		}
		if err != nil {
			return
		}
	}
}

// next waits for the next message, as long as the connection may be idle.
func (s *Server[P]) next(stopping context.Context, messages <-chan incoming) (incoming, bool) {
	idle := time.NewTimer(s.config.Limits.Idle)
	defer idle.Stop()
	stop := stopping.Done()
	for {
		select {
		case m, ok := <-messages:
			return m, ok
		case <-idle.C:
			return incoming{}, false
		case <-stop:
			stop = nil
			idle.Reset(s.config.Limits.Linger)
		}
	}
}

// serve answers one message and says whether the connection goes on.
func (s *Server[P]) serve(stopping, present, requests context.Context, c *wire.Conn, peer P, m incoming) (open bool) {
	request, refusal := s.admit(peer.Key(), m)
	if refusal != nil {
		refuse(c, refusal)
		wire.CloseFiles(m.files)
		return false
	}
	ctx := present
	if request.Oneway {
		ctx = requests
	}
	call := &Call{parameters: request.Parameters, files: m.files, send: func(r wire.Reply) error { return c.WriteMessage(r) }}
	answer := new(Reply)
	defer func() {
		if v := recover(); v != nil {
			slog.ErrorContext(ctx, "panic in method", "method", request.Method, "panic", v, "stack", string(debug.Stack()))
			if !request.Oneway {
				refuse(c, errInternal)
			}
			open = false
		}
		wire.CloseFiles(answer.Files)
		wire.CloseFiles(call.files)
		if call.begun { // an answer that waits to be taken needs memory
			s.config.Users.End(peer.Key())
		}
	}()

	reply, err := s.call(stopping, ctx, peer, request, call)
	if reply != nil {
		answer = reply
	}
	var message wire.Reply
	if err == nil {
		message.Parameters, err = encode(answer.Parameters)
	}
	if err != nil {
		var named bool
		if message, named = errorReply(err); !named && ctx.Err() == nil { // anyone can hang up
			slog.ErrorContext(ctx, "request failed", "method", request.Method, "error", err)
		}
	}
	sent := false
	open = true
	if !request.Oneway {
		files := answer.Files
		if err != nil {
			files = nil
		}
		open = c.WriteMessage(message, files...) == nil
		sent = open && err == nil
	}
	if !sent && answer.Undo != nil {
		answer.Undo()
	}
	return open
}

// admit turns away messages that can't be answered as a call; nothing is known of them, so the connection can't go on.
func (s *Server[P]) admit(key uint32, m incoming) (*wire.Request, error) {
	switch {
	case errors.Is(m.err, wire.ErrMessageTooLarge):
		return nil, brokerError("MessageTooLarge", "request", fmt.Sprintf("the message is longer than %d bytes", s.connLimits.Bytes),
			"send shorter messages, each ended by NUL")
	case m.err != nil:
		return nil, s.tooManyFiles(s.connLimits.Files)
	case !s.config.Users.Spend(key, 1+len(m.data)>>10): // before parsing, which takes up to 0.2 ms a KiB
		return nil, errQuota
	}
	request, err := wire.ParseRequest(m.data)
	if err != nil {
		return nil, errInvalid
	}
	return request, nil
}

func (s *Server[P]) tooManyFiles(limit int) error {
	return brokerError("TooManyFileDescriptors", "request", fmt.Sprintf("more than %d file descriptors came with the message", limit),
		"send only file descriptors that the method asks for")
}

// call finds the method and does it.
func (s *Server[P]) call(stopping, ctx context.Context, peer P, request *wire.Request, call *Call) (*Reply, error) {
	method, ok := s.config.Methods[request.Method]
	if !ok {
		name := interfaceOf(request.Method)
		if _, ok := s.config.Interfaces[name]; !ok {
			return nil, serviceError("InterfaceNotFound", "interface", name)
		}
		return nil, serviceError("MethodNotFound", "method", request.Method)
	}
	switch {
	case request.Upgrade:
		return nil, InvalidParameter("upgrade")
	case method.Streams && (!request.More || request.Oneway):
		return nil, &Error{Name: serviceInterface + ".ExpectedMore"}
	case method.MaxFiles == 0 && len(call.files) > 0:
		return nil, errUnexpectedFile
	case len(call.files) > method.MaxFiles:
		return nil, s.tooManyFiles(method.MaxFiles)
	case !s.config.Users.Begin(peer.Key()):
		return nil, errQuota
	}
	call.begun = true
	ctx, cancel := s.bound(stopping, ctx, method)
	defer cancel()
	reply, err := method.Handle(ctx, peer, call)
	switch {
	case err != nil:
		return reply, err
	case !call.decoded:
		return reply, errors.New("method does not decode its parameters")
	case slices.ContainsFunc(call.files, func(f *os.File) bool { return f != nil }):
		return reply, errUnexpectedFile
	}
	return reply, nil
}

// bound gives a call its end in time.
func (s *Server[P]) bound(stopping, ctx context.Context, method Method[P]) (context.Context, context.CancelFunc) {
	if !method.Streams {
		return context.WithTimeout(ctx, s.config.Limits.Request)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(stopping, cancel)
	return ctx, func() { stop(); cancel() }
}

// interfaceOf is a method's name up to its last dot.
func interfaceOf(method string) string {
	return method[:max(0, strings.LastIndexByte(method, '.'))]
}

func encode(parameters any) (json.RawMessage, error) {
	if parameters == nil {
		return json.RawMessage("{}"), nil
	}
	data, err := json.Marshal(parameters)
	if err != nil {
		return nil, fmt.Errorf("cannot encode reply: %w", err)
	}
	return data, nil
}

// errorReply tells the peer only of errors that are meant for it; named says whether this one is.
func errorReply(err error) (reply wire.Reply, named bool) {
	var e interface{ VarlinkError() (string, any) }
	if errors.As(err, &e) {
		name, parameters := e.VarlinkError()
		if data, err := encode(parameters); err == nil {
			return wire.Reply{Error: name, Parameters: data}, true
		}
	}
	reply, _ = errorReply(errInternal)
	return reply, false
}

// addService adds org.varlink.service.
func (s *Server[P]) addService() {
	if s.config.Interfaces == nil {
		s.config.Interfaces = make(map[string]string)
	}
	if s.config.Methods == nil {
		s.config.Methods = make(map[string]Method[P])
	}
	s.config.Interfaces[serviceInterface] = serviceDescription
	s.config.Methods[serviceInterface+".GetInfo"] = Method[P]{Handle: s.getInfo}
	s.config.Methods[serviceInterface+".GetInterfaceDescription"] = Method[P]{Handle: s.getInterfaceDescription}
}

func (s *Server[P]) getInfo(_ context.Context, _ P, call *Call) (*Reply, error) {
	if err := call.Decode(&struct{}{}); err != nil {
		return nil, err
	}
	return &Reply{Parameters: struct {
		Vendor     string   `json:"vendor"`
		Product    string   `json:"product"`
		Version    string   `json:"version"`
		URL        string   `json:"url"`
		Interfaces []string `json:"interfaces"`
	}{s.config.Vendor, s.config.Product, s.config.Version, s.config.URL, slices.Sorted(maps.Keys(s.config.Interfaces))}}, nil
}

func (s *Server[P]) getInterfaceDescription(_ context.Context, _ P, call *Call) (*Reply, error) {
	var in struct {
		Interface string `json:"interface"`
	}
	if err := call.Decode(&in); err != nil {
		return nil, err
	}
	description, ok := s.config.Interfaces[in.Interface]
	if !ok {
		return nil, serviceError("InterfaceNotFound", "interface", in.Interface)
	}
	return &Reply{Parameters: map[string]string{"description": description}}, nil
}

// connections counts what each user has.
type connections struct {
	limits Limits

	mu        sync.Mutex
	byKey     map[uint32]int
	all       int
	idleSince time.Time // when the last one ended
}

// connect counts a connection; false means that there are too many.
func (t *connections) connect(key uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all >= t.limits.Connections || t.byKey[key] >= t.limits.ConnectionsPerUser {
		return false
	}
	t.byKey[key]++
	t.all++
	return true
}

func (t *connections) disconnect(key uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byKey[key]--; t.byKey[key] == 0 {
		delete(t.byKey, key)
	}
	if t.all--; t.all == 0 {
		t.idleSince = time.Now()
	}
}
