// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// streaming is an answer of several replies, the last of which has no more behind
// it unless it is left open.
func streaming(texts ...string) answer {
	var s stream
	for i, text := range texts {
		s = append(s, wire.Reply{Parameters: json.RawMessage(text), Continues: i < len(texts)-1})
	}
	return func(*wire.Request, []*os.File) (any, []*os.File) { return s, nil }
}

func TestMonitor(t *testing.T) {
	t.Parallel()
	f := newFake(t, streaming(`{}`, `{"event":{"time":5,"kind":"lost","owner":7,"lost":3,"future":1}}`, `{"event":{"time":6,"kind":"made","owner":7,"grant":"x"}}`, `{}`))
	ready := 0
	var got []Event
	err := f.client(t, WithInteraction()).Monitor(t.Context(), true, func() { ready++ }, func(e *Event) { got = append(got, *e) })
	if !errors.Is(err, ErrStopped) || ready != 1 {
		t.Errorf("got %v, ready %d times", err, ready)
	}
	if diff := cmp.Diff([]Event{{Time: 5, Kind: "lost", Owner: 7, Lost: 3}, {Time: 6, Kind: "made", Owner: 7, Grant: "x"}}, got); diff != "" {
		t.Error(diff)
	}
	want := []*wire.Request{{Method: "org.bpfbroker.Broker.Monitor", More: true, Parameters: json.RawMessage(`{"all":true,"allowInteractiveAuthentication":true}`)}}
	if diff := cmp.Diff(want, f.seen()); diff != "" {
		t.Error(diff)
	}
}

func TestMonitorEnds(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(*wire.Request, []*os.File) (any, []*os.File) {
		return stream{{Parameters: json.RawMessage(`{}`), Continues: true}}, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	if err := f.client(t).Monitor(ctx, false, cancel, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	for _, test := range []struct {
		name   string
		answer answer
		is     func(error) bool
	}{
		{"hung up", func(*wire.Request, []*os.File) (any, []*os.File) { return nil, nil }, func(err error) bool { return err != nil }},
		{"refused", refusal("org.bpfbroker.Broker.QuotaExceeded", `{"reason":"r","layer":"limit","remedy":""}`), func(err error) bool {
			var e *Error
			return errors.As(err, &e) && e.Name == "QuotaExceeded"
		}},
		{"nonsense", streaming(`{"event":[]}`, `{}`), func(err error) bool { return errors.Is(err, errBadReply) }},
		{"a file", func(*wire.Request, []*os.File) (any, []*os.File) {
			return wire.Reply{Parameters: json.RawMessage(`{}`), Continues: true}, []*os.File{os.Stderr}
		}, func(err error) bool { return errors.Is(err, errBadReply) }},
	} {
		f.setAnswer(test.answer)
		if err := f.client(t).Monitor(t.Context(), false, nil, func(*Event) {}); !test.is(err) {
			t.Errorf("%s: got %v", test.name, err)
		}
	}
	if err := New(WithSocket("/nonexistent/s")).Monitor(t.Context(), false, nil, nil); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v", err)
	}
}

func TestLearnGrant(t *testing.T) {
	t.Parallel()
	f := newFake(t, streaming(`{}`, `{"profile":"[Delegate]\n"}`))
	ready := 0
	text, err := f.client(t).LearnGrant(t.Context(), "x", func() { ready++ })
	if err != nil || text != "[Delegate]\n" || ready != 1 {
		t.Errorf("got %q, %v, ready %d times", text, err, ready)
	}
	f.setAnswer(streaming(`{}`, `{}`))
	if _, err := f.client(t).LearnGrant(t.Context(), "x", nil); !errors.Is(err, errBadReply) {
		t.Errorf("got %v", err)
	}
}

func TestExplainGrant(t *testing.T) {
	t.Parallel()
	f := newFake(t, parameters(`{"profile":"p","ended":true,"denials":[{"event":{"time":1,"kind":"denied","owner":2,"reason":"r"},"allow":"a","count":3}],"withheld":[{"layer":"l","setting":"s","names":["n"]}]}`))
	got, err := f.client(t).ExplainGrant(t.Context(), "x")
	want := &Explanation{
		Profile: "p", Ended: true,
		Denials:  []Denial{{Event: Event{Time: 1, Kind: "denied", Owner: 2, Reason: "r"}, Allow: "a", Count: 3}},
		Withheld: []Withheld{{Layer: "l", Setting: "s", Names: []string{"n"}}},
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}
