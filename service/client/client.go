// SPDX-License-Identifier: Apache-2.0

// Package client asks bpfbroker for rights to use eBPF.
//
// Most programs need nothing of it: "bpfbroker run" gives a token to a program
// that knows nothing of the broker, and a Command does the same from Go. A
// process that is already in a user namespace of its user's own, as in a
// rootless container, calls Token for itself.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// Socket is where the broker listens, unless WithSocket says otherwise.
const Socket = "/run/bpfbroker/org.bpfbroker.Broker"

const brokerInterface = "org.bpfbroker.Broker."

// replyLimits bound a reply: 2048 grants fit, and a packet socket with its memory.
// There is no limit on time, since somebody may be looking for a password; the
// caller's context is for that.
var replyLimits = wire.Limits{Bytes: 16 << 20, Files: 2}

// ErrUnreachable means that nobody listens on the broker's socket, or that the
// caller may not connect to it.
var ErrUnreachable = errors.New("cannot reach the broker")

// Client is a connection to the broker, made when first needed and made again
// after a failure. Its methods may be called from several goroutines, and then
// take turns. Ending a call's context closes the connection, and the broker
// gives the request up.
//
// The broker takes the process that made the connection for the one that asks:
// a Client does not outlive an exec, and is not for use after a change of
// credentials.
type Client struct {
	socket      string
	interactive bool

	turn chan struct{} // holds one element while a call is under way
	conn *wire.Conn    // guarded by turn; nil if there is none
}

// Option is a setting of a Client's.
type Option func(*Client)

// WithSocket has the client connect to another socket than Socket.
func WithSocket(path string) Option { return func(c *Client) { c.socket = path } }

// WithInteraction allows polkit to ask the user for a password. A request then
// takes as long as that does.
func WithInteraction() Option { return func(c *Client) { c.interactive = true } }

// New returns a client, which the caller closes.
func New(options ...Option) *Client {
	c := &Client{socket: Socket, turn: make(chan struct{}, 1)}
	for _, option := range options {
		option(c)
	}
	return c
}

// Close closes the connection, after the call that is under way. Grants stay.
func (c *Client) Close() error {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	return c.hangUp()
}

func (c *Client) hangUp() error {
	if c.conn == nil {
		return nil
	}
	conn := c.conn
	c.conn = nil
	return conn.Close()
}

// ListProfiles returns the profiles that there are, by name.
func (c *Client) ListProfiles(ctx context.Context) ([]ProfileSummary, error) {
	var out struct {
		Profiles []ProfileSummary `json:"profiles"`
	}
	err := c.call(ctx, "ListProfiles", struct{}{}, &out)
	return out.Profiles, err
}

// DescribeProfile returns one profile: an *Error NoSuchProfile or
// InvalidProfile if there is none that can be read.
func (c *Client) DescribeProfile(ctx context.Context, profile string) (*Profile, error) {
	var out struct {
		Profile *Profile `json:"profile"`
	}
	err := c.call(ctx, "DescribeProfile", profileParameter{profile}, &out)
	if err == nil && out.Profile == nil {
		err = errBadReply
	}
	return out.Profile, err
}

type profileParameter struct {
	Profile string `json:"profile"`
}

// AcquireToken asks for a profile for the calling process itself. The process
// has to be in a user namespace of its user's own with a mount namespace that
// belongs to it, as in a container: in the initial one there are no tokens, and
// the answer is an *Error NamespaceInitial. The grant ends with the process.
//
// The file is an O_PATH descriptor of a detached BPF file system. The caller
// closes it; Token makes the token at once.
func (c *Client) AcquireToken(ctx context.Context, profile string) (*Grant, *os.File, error) {
	var out struct {
		Grant *Grant `json:"grant"`
		Mount *int   `json:"mountFileDescriptor"`
	}
	files, err := c.callForFiles(ctx, "AcquireToken", profileParameter{profile}, &out)
	if err != nil {
		return nil, nil, err
	}
	if out.Grant == nil || out.Mount == nil || *out.Mount != 0 || len(files) != 1 {
		wire.CloseFiles(files)
		return nil, nil, errBadReply
	}
	return out.Grant, files[0], nil
}

// Token asks for a profile for the calling process as AcquireToken does, and
// makes a BPF token (Linux 6.9), which needs CAP_BPF in the process's user
// namespace. The caller closes the token.
func (c *Client) Token(ctx context.Context, profile string) (*Grant, *os.File, error) {
	grant, mount, err := c.AcquireToken(ctx, profile)
	if err != nil {
		return nil, nil, err
	}
	defer mount.Close()
	token, err := kernel.CreateToken(mount)
	if err != nil {
		return nil, nil, err
	}
	return grant, token, nil
}

// OpenProcess returns the pidfd of a process, which the caller closes. The error
// is os.ErrProcessDone if there is no such process.
func OpenProcess(pid int) (*os.File, error) {
	pidfd, err := kernel.OpenPidFD(pid)
	if errors.Is(err, kernel.ErrProcessGone) {
		return nil, os.ErrProcessDone
	}
	return pidfd, err
}

// MountToken asks for a profile for the process that pidfd names, and has the
// BPF file system mounted at path, an existing directory in the process's mount
// namespace. The process makes its tokens there. The pidfd stays the caller's;
// the grant ends with the process.
func (c *Client) MountToken(ctx context.Context, profile string, pidfd *os.File, path string) (*Grant, error) {
	return c.MountTokenBelow(ctx, profile, pidfd, "", path)
}

// MountTokenBelow is MountToken for a process whose root is about to change to
// the directory root, as that of a container before its start: path is below
// that.
func (c *Client) MountTokenBelow(ctx context.Context, profile string, pidfd *os.File, root, path string) (*Grant, error) {
	in := struct {
		Profile string `json:"profile"`
		Process int    `json:"processFileDescriptor"`
		Path    string `json:"path"`
		Root    string `json:"root,omitempty"`
		interaction
	}{profile, 0, path, root, c.interaction()}
	var out struct {
		Grant *Grant `json:"grant"`
	}
	err := c.call(ctx, "MountToken", in, &out, pidfd)
	if err == nil && out.Grant == nil {
		err = errBadReply
	}
	return out.Grant, err
}

// ListGrants returns the user's own grants, or those of all users if all is set
// and polkit allows that, the oldest first.
func (c *Client) ListGrants(ctx context.Context, all bool) ([]Grant, error) {
	in := struct {
		All bool `json:"all,omitempty"`
		interaction
	}{all, c.interaction()}
	var out struct {
		Grants []Grant `json:"grants"`
	}
	err := c.call(ctx, "ListGrants", in, &out)
	return out.Grants, err
}

// RenewGrant gives a grant the lease that its profile has now, from now, and
// returns it as it is then. polkit decides as for a new one. An *Error
// NoSuchGrant says that there is no such grant.
func (c *Client) RenewGrant(ctx context.Context, id string) (*Grant, error) {
	var out struct {
		Grant *Grant `json:"grant"`
	}
	err := c.call(ctx, "RenewGrant", grantParameters{id, c.interaction()}, &out)
	if err == nil && out.Grant == nil {
		err = errBadReply
	}
	return out.Grant, err
}

// ExplainGrant says what was refused to a grant of the user's own, or another's if
// polkit allows that, and what it hasn't got. The grant may have ended. If id is ""
// it is about everything that was refused to the user. The broker remembers the
// last denials, while it runs. See ExplainLocal for what the system refuses.
func (c *Client) ExplainGrant(ctx context.Context, id string) (*Explanation, error) {
	in := struct {
		Grant string `json:"grant,omitempty"`
		interaction
	}{id, c.interaction()}
	var out Explanation
	if err := c.call(ctx, "ExplainGrant", in, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// RevokeGrant ends a grant of the user's own, or another's if polkit allows
// that, and returns, in phrases for people, what that did not reach. If kill is
// set, all processes in the grant's user namespace and in those below it are
// killed; this one, too, if it is there. An *Error NoSuchGrant says that there
// is no such grant.
func (c *Client) RevokeGrant(ctx context.Context, id string, kill bool) (notReached []string, err error) {
	in := struct {
		grantParameters
		Kill bool `json:"kill,omitempty"`
	}{grantParameters{id, c.interaction()}, kill}
	var out struct {
		NotReached []string `json:"notReached"`
	}
	err = c.call(ctx, "RevokeGrant", in, &out)
	return out.NotReached, err
}

type grantParameters struct {
	Grant string `json:"grant"`
	interaction
}

// interaction is the parameter of requests that polkit decides.
type interaction struct {
	Allow bool `json:"allowInteractiveAuthentication,omitempty"`
}

func (c *Client) interaction() interaction { return interaction{c.interactive} }

// Check returns what the broker finds that the user can and cannot have. See
// CheckLocal for what is needed on this side.
func (c *Client) Check(ctx context.Context) ([]Finding, error) {
	var out struct {
		Findings []Finding `json:"findings"`
	}
	err := c.call(ctx, "Check", struct{}{}, &out)
	return out.Findings, err
}

// call makes one call, whose reply comes without files.
func (c *Client) call(ctx context.Context, method string, in, out any, files ...*os.File) error {
	received, err := c.callForFiles(ctx, method, in, out, files...)
	if len(received) > 0 {
		wire.CloseFiles(received)
		return errBadReply
	}
	return err
}

// callForFiles makes one call. The files that come with the reply are the
// caller's to close.
func (c *Client) callForFiles(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	parameters, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the request: %w", err)
	}
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, canceled(ctx)
	}
	defer func() { <-c.turn }()

	request := wire.Request{Method: brokerInterface + method, Parameters: parameters}
	reused := c.conn != nil
	data, received, err := c.exchange(ctx, request, files)
	// The broker hangs up on idle connections. These errors say that it had not
	// read the request, so it may be made again.
	if reused && ctx.Err() == nil && (errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)) {
		data, received, err = c.exchange(ctx, request, files)
	}
	if err != nil {
		return nil, err
	}
	if err := decode(data, out); err != nil {
		wire.CloseFiles(received)
		return nil, err
	}
	return received, nil
}

// exchange sends one message and waits for the next, and hangs up if either
// fails or the context ends.
func (c *Client) exchange(ctx context.Context, request wire.Request, files []*os.File) (data []byte, received []*os.File, err error) {
	if c.conn == nil {
		if c.conn, err = c.dial(ctx); err != nil {
			return nil, nil, err
		}
	}
	conn := c.conn
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	writeErr := conn.WriteMessage(request, files...)
	// Also if it could not be sent: a broker that turns a connection away says
	// why before it closes it.
	data, received, err = conn.ReadMessage()
	if ended := !stop(); ended || err != nil {
		_ = c.hangUp()
		if ended && err != nil {
			return nil, nil, canceled(ctx)
		}
	}
	if err != nil && writeErr != nil {
		err = writeErr
	}
	if err != nil {
		err = fmt.Errorf("no answer from the broker: %w", err)
	}
	return data, received, err
}

func (c *Client) dial(ctx context.Context) (*wire.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", c.socket)
	if ctx.Err() != nil {
		if err == nil {
			_ = conn.Close()
		}
		return nil, canceled(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return wire.NewConn(conn.(*net.UnixConn), replyLimits), nil
}

func canceled(ctx context.Context) error {
	return fmt.Errorf("cannot wait for the broker: %w", context.Cause(ctx))
}

var errBadReply = errors.New("cannot understand the broker's reply")

// decode reads a reply. Unlike the broker, which knows all requests there are,
// it leaves out fields that a newer broker may have.
func decode(data []byte, out any) error {
	reply, err := wire.ParseReply(data)
	if err != nil {
		return fmt.Errorf("%w: %w", errBadReply, err)
	}
	if reply.Error != "" {
		return newError(reply)
	}
	if err := json.Unmarshal(reply.Parameters, out); err != nil {
		return fmt.Errorf("%w: %w", errBadReply, err)
	}
	return nil
}
