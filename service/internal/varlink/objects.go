// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
)

// objectHandlers are those of published objects.
func objectHandlers(b *broker.Broker) map[string]handler {
	return map[string]handler{
		"ListObjects": func(_ context.Context, _ *peer.Peer, call *Call) (*Reply, error) {
			if err := call.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			objects := []objectSummary{}
			for _, o := range b.ListObjects() {
				objects = append(objects, summarizeObject(o))
			}
			return &Reply{Parameters: map[string]any{"objects": objects}}, nil
		},

		"DescribeObject": func(_ context.Context, _ *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Object string `json:"object"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			o, err := b.DescribeObject(in.Object)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"object": describeObject(o)}}, nil
		},

		"OpenMap": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Object      string         `json:"object"`
				Map         string         `json:"map"`
				Access      catalog.Access `json:"access"`
				Interactive bool           `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			file, warnings, err := b.OpenMap(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Object, in.Map, in.Access)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{
				Parameters: map[string]any{"mapFileDescriptor": 0, "access": in.Access, "warnings": list(warnings)},
				Files:      []*os.File{file},
			}, nil
		},

		"OpenSocket": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Object      string `json:"object"`
				Map         string `json:"map"`
				Queue       uint32 `json:"queue,omitempty"`
				Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			packets, device, err := b.OpenSocket(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Object, in.Map, in.Queue)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{
				Parameters: map[string]any{
					"socketFileDescriptor": 0, "memoryFileDescriptor": 1, "interface": device,
					"frames": kernel.PacketFrames, "frameSize": kernel.PacketFrameSize,
				},
				Files: []*os.File{packets.Socket, packets.Memory},
			}, nil
		},

		"OpenProgram": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Object      string `json:"object"`
				Program     string `json:"program"`
				Interactive bool   `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			file, err := b.OpenProgram(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Object, in.Program)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"programFileDescriptor": 0}, Files: []*os.File{file}}, nil
		},

		"MountObjects": func(ctx context.Context, p *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Objects     []string `json:"objects"`
				Process     *int     `json:"processFileDescriptor,omitempty"`
				Path        string   `json:"path"`
				Interactive bool     `json:"allowInteractiveAuthentication,omitempty"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			var process *kernel.Process
			if in.Process != nil {
				file, err := call.File(*in.Process)
				if err != nil {
					return nil, err
				}
				if process, err = kernel.NewProcess(file); err != nil {
					return nil, refusal(fmt.Errorf("cannot take the process: %w", err))
				}
				defer process.Close()
			}
			m, err := b.MountObjects(ctx, broker.Caller{Peer: p, Interactive: in.Interactive}, in.Objects, process, in.Path)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"pins": list(m.Pins), "warnings": list(m.Warnings)}, Undo: m.Undo}, nil
		},

		"OpenLink": func(_ context.Context, _ *peer.Peer, call *Call) (*Reply, error) {
			var in struct {
				Object string `json:"object"`
				Link   string `json:"link"`
			}
			if err := call.Decode(&in); err != nil {
				return nil, err
			}
			l, err := b.OpenLink(in.Object, in.Link)
			if err != nil {
				return nil, refusal(err)
			}
			return &Reply{Parameters: map[string]any{"link": objectLink(l)}}, nil
		},
	}
}

type objectSummary struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	State       string `json:"state"`
	Available   bool   `json:"available"`
	Reason      string `json:"reason,omitempty"`
	Remedy      string `json:"remedy,omitempty"`
}

func summarizeObject(o broker.Object) objectSummary {
	s := objectSummary{Name: o.Name, State: string(o.State), Available: o.Refusal == nil}
	if o.Object != nil {
		s.Description = o.Object.Description
	}
	if o.Refusal != nil {
		s.Reason, s.Remedy = o.Refusal.Reason, o.Refusal.Remedy
	}
	return s
}

type objectDescription struct {
	objectSummary
	Load     string          `json:"load"`
	Keep     string          `json:"keep"`
	Maps     []objectMap     `json:"maps"`
	Programs []objectProgram `json:"programs"`
	Links    []objectLink    `json:"links"`
	Files    []string        `json:"files"`
}

type objectMap struct {
	Name       string           `json:"name"`
	Type       string           `json:"type"`
	Access     []catalog.Access `json:"access"`
	KeySize    uint32           `json:"keySize"`
	ValueSize  uint32           `json:"valueSize"`
	MaxEntries uint32           `json:"maxEntries"`
	KeyType    string           `json:"keyType,omitempty"`
	ValueType  string           `json:"valueType,omitempty"`
	BTF        string           `json:"btf,omitempty"`
}

type objectProgram struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	AttachType string `json:"attachType,omitempty"`
}

type objectLink struct {
	Name     string `json:"name"`
	Program  string `json:"program"`
	Type     string `json:"type"`
	Target   string `json:"target"`
	Attached bool   `json:"attached"`
}

func describeObject(o broker.Object) objectDescription {
	d := objectDescription{
		objectSummary: summarizeObject(o),
		Load:          o.Object.LoadText(),
		Keep:          o.Object.KeepText(),
		Maps:          []objectMap{},
		Programs:      []objectProgram{},
		Links:         []objectLink{},
		Files:         list(o.Object.Files),
	}
	for _, m := range o.Maps {
		d.Maps = append(d.Maps, objectMap{m.Name, m.Type, m.Access, m.KeySize, m.ValueSize, m.MaxEntries,
			m.KeyType, m.ValueType, base64.StdEncoding.EncodeToString(m.BTF)})
	}
	for _, p := range o.Programs {
		d.Programs = append(d.Programs, objectProgram(p))
	}
	for _, l := range o.Links {
		d.Links = append(d.Links, objectLink(l))
	}
	return d
}
