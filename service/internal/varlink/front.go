// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/limit"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

//go:embed org.bpfbroker.Broker.varlink
var brokerDescription string

// NewFront returns the server of org.bpfbroker.Broker. Each method has its row
// in the broker's access table; one without, or a row without a method, is an
// error.
func NewFront(b *broker.Broker, users *limit.Users, version string) (*Server[*peer.Peer], error) {
	methods := map[string]Method[*peer.Peer]{}
	served := handlers(b)
	maps.Copy(served, objectHandlers(b))
	for name, handle := range served {
		access, ok := broker.Methods[name]
		if !ok {
			return nil, fmt.Errorf("cannot serve %s: it is not in the access table", name)
		}
		methods[brokerInterface+"."+name] = Method[*peer.Peer]{MaxFiles: access.Files, Streams: access.Streams, Handle: handle}
	}
	if len(methods) != len(broker.Methods) {
		return nil, errors.New("cannot serve the access table: not every method of it is there")
	}
	return New(Config[*peer.Peer]{
		Vendor:     "bpfbroker",
		Product:    "bpfbroker",
		Version:    version,
		URL:        "https://github.com/bpfbroker/bpfbroker",
		Interfaces: map[string]string{brokerInterface: brokerDescription},
		Methods:    methods,
		Users:      users,
		Identify: func(conn *net.UnixConn) (*peer.Peer, error) {
			p, err := peer.FromConn(conn)
			return p, refusal(err)
		},
	})
}

type handler = func(context.Context, *peer.Peer, *Call) (*Reply, error)

func handlers(b *broker.Broker) map[string]handler {
	return map[string]handler{
		"ListProfiles": func(_ context.Context, _ *peer.Peer, call *Call) (*Reply, error) {
			if err := call.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			profiles := []profileSummary{}
			for _, o := range b.ListProfiles() {
				profiles = append(profiles, summarize(o))
			}
			return &Reply{Parameters: map[string]any{"profiles": profiles}}, nil
		},

		"DescribeProfile": func(_ context.Context, _ *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Profile string `json:"profile"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			o, err := b.DescribeProfile(in.Profile)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"profile": describe(o)}}, nil
		},

		"AcquireToken": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Profile     string `json:"profile"`
				Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			g, mount, err := b.AcquireToken(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Profile)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{
				Parameters: map[string]any{"grant": liveGrant(g), "mountFileDescriptor": 0},
				Files:      []*os.File{mount},
				Undo:       func() { b.Withdraw(g.ID) },
			}, nil
		},

		"MountToken": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Profile     string `json:"profile"`
				Process     int    `json:"processFileDescriptor"`
				Path        string `json:"path"`
				Root        string `json:"root,omitempty"`
				Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			file, err := call.File(in.Process)
			if err != nil {
				return nil, err
			}
			process, err := kernel.NewProcess(file)
			if err != nil {
				return nil, refusal(fmt.Errorf("cannot take the process: %w", err))
			}
			defer process.Close()
			g, err := b.MountToken(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Profile, process, cmp.Or(in.Root, "/"), in.Path)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{
				Parameters: map[string]any{"grant": liveGrant(g)},
				Undo:       func() { b.Withdraw(g.ID) },
			}, nil
		},

		"ListGrants": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				All         bool `json:"all,omitempty"`
				Interactive bool `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			list, err := b.ListGrants(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.All)
			if err != nil {
				return nil, refusal(err)
			}
			grants := []liveGrant{}
			for _, g := range list {
				grants = append(grants, liveGrant(*g))
			}
			return &Reply{Parameters: map[string]any{"grants": grants}}, nil
		},

		"GetGrant":   oneGrant(b.GetGrant),
		"RenewGrant": oneGrant(b.RenewGrant),

		"RevokeGrant": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Grant       string `json:"grant"`
				Kill        bool   `json:"kill,omitempty"`
				Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			notReached, err := b.RevokeGrant(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Grant, in.Kill)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"notReached": list(notReached)}}, nil
		},

		"ExplainGrant": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Grant       string `json:"grant,omitempty"`
				Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			e, err := b.ExplainGrant(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Grant)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: explain(e)}, nil
		},

		"LearnGrant": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in grantParameters
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			text, err := b.LearnGrant(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Grant, func() error { return call.Send(nil) })
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"profile": text}}, nil
		},

		"Monitor": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				All         bool `json:"all,omitempty"`
				Interactive bool `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			err := b.Monitor(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.All,
				func() error { return call.Send(nil) },
				func(e broker.Event) error { return call.Send(map[string]any{"event": event(e)}) })
			return nil, refusal(err)
		},

		"Check": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			if err := call.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			findings := []finding{}
			for _, f := range b.Check(ctx, broker.Caller{Peer: p}) {
				findings = append(findings, finding(f))
			}
			return &Reply{Parameters: map[string]any{"findings": findings}}, nil
		},
	}
}

// grantParameters are those of the methods for one grant.
type grantParameters struct {
	Grant       string `json:"grant"`
	Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
}

// oneGrant makes the handler of a method that takes a grant's id and answers the
// grant.
func oneGrant(do func(context.Context, broker.Caller, string) (grant.Grant, error)) handler {
	return func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
		var in grantParameters
		if err := call.Decode(&in); err != nil {
			return nil, err
		}
		g, err := do(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Grant)
		if err != nil {
			return nil, refusal(err)
		}
		return &Reply{Parameters: map[string]any{"grant": liveGrant(g)}}, nil
	}
}

// refusal gives an error of the broker's its name on the wire.
func refusal(err error) error {
	if err == nil {
		return nil
	}
	e := broker.Refuse(err)
	return brokerError(e.Name, e.Layer, e.Reason, e.Remedy)
}

type profileSummary struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	Tier        string `json:"tier"`
	Available   bool   `json:"available"`
	Reason      string `json:"reason,omitempty"`
	Remedy      string `json:"remedy,omitempty"`
}

func summarize(o broker.Offer) profileSummary {
	s := profileSummary{Name: o.Name, Description: o.Description, Tier: o.Tier.String(), Available: o.Refusal == nil}
	if o.Refusal != nil {
		s.Reason, s.Remedy = o.Refusal.Reason, o.Refusal.Remedy
	}
	return s
}

type profileDescription struct {
	profileSummary
	Guard        string   `json:"guard"`
	LeaseSeconds int64    `json:"leaseSeconds,omitempty"`
	Commands     []string `json:"commands"`
	Maps         []string `json:"maps"`
	Programs     []string `json:"programs"`
	Attachments  []string `json:"attachments"`
	Capabilities []string `json:"capabilities"`
	Limits       []string `json:"limits"`
	NotEnforced  []string `json:"notEnforced"`
	Files        []string `json:"files"`
}

func describe(o broker.Offer) profileDescription {
	return profileDescription{
		profileSummary: summarize(o),
		Guard:          o.Guard.String(),
		LeaseSeconds:   int64(o.Lease.Seconds()),
		Commands:       list(profile.CommandNames(o.Commands)),
		Maps:           list(profile.MapNames(o.Maps)),
		Programs:       list(profile.ProgramNames(o.Programs)),
		Attachments:    list(profile.AttachmentNames(o.Attachments)),
		Capabilities:   list(o.AmbientCapabilities()),
		Limits:         list(o.Profile.NotEnforced()),
		NotEnforced:    list(o.NotEnforced),
		Files:          list(o.Files),
	}
}

// liveGrant is a grant as peers see it.
type liveGrant grant.Grant

// MarshalJSON leaves out what is the ledger's own.
func (g liveGrant) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		ID           grant.ID `json:"id"`
		Profile      string   `json:"profile"`
		Tier         string   `json:"tier"`
		Owner        uint32   `json:"owner"`
		Unit         string   `json:"unit,omitempty"`
		Process      int      `json:"process"`
		Path         string   `json:"path,omitempty"`
		Created      int64    `json:"created"`
		Expires      int64    `json:"expires,omitempty"`
		Capabilities []string `json:"capabilities"`
		NotEnforced  []string `json:"notEnforced"`
	}{g.ID, g.Profile, g.Tier, g.Owner, g.Unit, g.PID, g.Path, g.Created, g.Expires, list(g.Capabilities), list(g.NotEnforced)})
}

// event is an event as peers see it.
type event broker.Event

// MarshalJSON leaves out what doesn't belong to the kind.
func (e event) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Time    int64       `json:"time"`
		Kind    broker.Kind `json:"kind"`
		Owner   uint32      `json:"owner"`
		Grant   *grant.ID   `json:"grant,omitempty"`
		Profile string      `json:"profile,omitempty"`
		Expires int64       `json:"expires,omitempty"`
		Process int         `json:"process,omitempty"`
		UID     *uint32     `json:"uid,omitempty"`
		Command string      `json:"command,omitempty"`
		Program string      `json:"program,omitempty"`
		Tag     string      `json:"tag,omitempty"`
		Reason  string      `json:"reason,omitempty"`
		Layer   string      `json:"layer,omitempty"`
		Setting string      `json:"setting,omitempty"`
		Lost    int         `json:"lost,omitempty"`
	}{
		e.Time.UnixMicro(), e.Kind, e.Owner, given(e.Grant, e.Grant != 0), e.Profile, e.Expires, e.PID,
		given(e.UID, e.Kind == broker.KindLoaded || e.Kind == broker.KindDenied), e.Command, e.Program, e.Tag, e.Reason, e.Layer, e.Setting, e.Lost,
	})
}

type explanation struct {
	Profile  string     `json:"profile,omitempty"`
	Ended    bool       `json:"ended,omitempty"`
	Denials  []denial   `json:"denials"`
	Withheld []withheld `json:"withheld"`
}

type denial struct {
	Event event  `json:"event"`
	Allow string `json:"allow,omitempty"`
	Count int    `json:"count"`
}

type withheld struct {
	Layer   string   `json:"layer"`
	Setting string   `json:"setting"`
	Names   []string `json:"names"`
}

func explain(e broker.Explanation) explanation {
	x := explanation{Profile: e.Profile, Ended: e.Ended, Denials: []denial{}, Withheld: []withheld{}}
	for _, d := range e.Denials {
		x.Denials = append(x.Denials, denial{event(d.Event), d.Allow, d.Count})
	}
	for _, w := range e.Withheld {
		x.Withheld = append(x.Withheld, withheld(w))
	}
	return x
}

// given returns a pointer for what may be missing.
func given[T any](value T, is bool) *T {
	if !is {
		return nil
	}
	return &value
}

type finding struct {
	Subject string `json:"subject"`
	State   string `json:"state"`
	Reason  string `json:"reason"`
	Remedy  string `json:"remedy,omitempty"`
}

// list keeps an empty list from becoming null.
func list(items []string) []string {
	if items == nil {
		return []string{}
	}
	return items
}
