// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// ErrStopped means that the broker has ended what was to go on. It may have been
// stopped or be about to be replaced, or it has given up a caller that was too slow.
var ErrStopped = errors.New("the broker has stopped")

// Monitor calls tell for each event of the user's own grants from now on, or of
// all users' if all is set and polkit allows that, until the context ends or the
// broker does (ErrStopped). ready, if not nil, is called before the first one,
// when nothing is missed any more. It has a connection of its own. A caller that
// is slow to return gets an event "lost" in place of what it missed, and one that
// takes no event for ten seconds is given up.
func (c *Client) Monitor(ctx context.Context, all bool, ready func(), tell func(*Event)) error {
	in := struct {
		All bool `json:"all,omitempty"`
		interaction
	}{all, c.interaction()}
	_, err := c.stream(ctx, "Monitor", in, func(parameters json.RawMessage) error {
		var out struct {
			Event *Event `json:"event"`
		}
		if err := json.Unmarshal(parameters, &out); err != nil {
			return fmt.Errorf("%w: %w", errBadReply, err)
		}
		switch {
		case out.Event != nil:
			tell(out.Event)
		case ready != nil:
			ready()
		}
		return nil
	})
	if err == nil {
		err = ErrStopped
	}
	return err
}

// stream makes a call with many replies, on a connection of its own, and hands
// over the parameters of each but the last one, which it returns.
func (c *Client) stream(ctx context.Context, method string, in any, each func(json.RawMessage) error) (json.RawMessage, error) {
	parameters, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the request: %w", err)
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	// Also if it could not be sent, there may be an answer.
	writeErr := conn.WriteMessage(wire.Request{Method: brokerInterface + method, Parameters: parameters, More: true})
	for {
		data, files, err := conn.ReadMessage()
		switch {
		case ctx.Err() != nil:
			wire.CloseFiles(files)
			return nil, canceled(ctx)
		case err != nil && writeErr != nil:
			return nil, fmt.Errorf("no answer from the broker: %w", writeErr)
		case err != nil:
			return nil, fmt.Errorf("no answer from the broker: %w", err)
		case len(files) > 0:
			wire.CloseFiles(files)
			return nil, errBadReply
		}
		reply, err := wire.ParseReply(data)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%w: %w", errBadReply, err)
		case reply.Error != "":
			return nil, newError(reply)
		case !reply.Continues:
			return reply.Parameters, nil
		}
		if err := each(reply.Parameters); err != nil {
			return nil, err
		}
	}
}

// LearnGrant has the broker write down what a grant is used for, until it ends, and
// returns the smallest profile that gives that, as a file. ready, if not nil, is
// called when nothing is missed any more. It has a connection of its own, whose end
// is that of the learning. An *Error GuardUnavailable says that nothing can see it.
func (c *Client) LearnGrant(ctx context.Context, id string, ready func()) (string, error) {
	last, err := c.stream(ctx, "LearnGrant", grantParameters{id, c.interaction()}, func(json.RawMessage) error {
		if ready != nil {
			ready()
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	var out struct {
		Profile string `json:"profile"`
	}
	if err := json.Unmarshal(last, &out); err != nil || out.Profile == "" {
		return "", errBadReply
	}
	return out.Profile, nil
}
