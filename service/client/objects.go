// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bpfbroker/bpfbroker/service/client/typed"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// ListObjects returns the objects that are published, by name.
func (c *Client) ListObjects(ctx context.Context) ([]ObjectSummary, error) {
	var out struct {
		Objects []ObjectSummary `json:"objects"`
	}
	err := c.call(ctx, "ListObjects", struct{}{}, &out)
	return out.Objects, err
}

// DescribeObject returns one object: an *Error NoSuchObject or InvalidObject if
// there is none that can be read.
func (c *Client) DescribeObject(ctx context.Context, object string) (*Object, error) {
	in := struct {
		Object string `json:"object"`
	}{object}
	var out struct {
		Object *Object `json:"object"`
	}
	err := c.call(ctx, "DescribeObject", in, &out)
	if err == nil && out.Object == nil {
		err = errBadReply
	}
	return out.Object, err
}

// OpenMap opens a map of an object, which is loaded for it if it isn't yet, with
// an access that the object offers. polkit decides. It returns also, in phrases
// for people, what the access doesn't keep the caller from (as making a
// read-only map writable by pinning it). The caller closes the map.
//
// A map that is ReadOnly can't be mapped into memory: ring buffers are for
// Consume.
func (c *Client) OpenMap(ctx context.Context, object, name string, access Access) (*ebpf.Map, []string, error) {
	in := struct {
		Object string `json:"object"`
		Map    string `json:"map"`
		Access Access `json:"access"`
		interaction
	}{object, name, access, c.interaction()}
	var out struct {
		Map      *int     `json:"mapFileDescriptor"`
		Access   Access   `json:"access"`
		Warnings []string `json:"warnings"`
	}
	files, err := c.callForFiles(ctx, "OpenMap", in, &out)
	if err != nil {
		return nil, nil, err
	}
	if out.Map == nil || *out.Map != 0 || len(files) != 1 || out.Access != access {
		wire.CloseFiles(files)
		return nil, nil, errBadReply
	}
	m, err := take(files[0], ebpf.NewMapFromFD)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot use the map: %w", err)
	}
	return m, out.Warnings, nil
}

// OpenProgram opens a program of an object, which is loaded for it if it isn't
// yet. polkit decides. Who has a program can run it, and attach it where the
// kernel asks for no further right. The caller closes it.
func (c *Client) OpenProgram(ctx context.Context, object, name string) (*ebpf.Program, error) {
	in := struct {
		Object  string `json:"object"`
		Program string `json:"program"`
		interaction
	}{object, name, c.interaction()}
	var out struct {
		Program *int `json:"programFileDescriptor"`
	}
	files, err := c.callForFiles(ctx, "OpenProgram", in, &out)
	if err != nil {
		return nil, err
	}
	if out.Program == nil || *out.Program != 0 || len(files) != 1 {
		wire.CloseFiles(files)
		return nil, errBadReply
	}
	p, err := take(files[0], ebpf.NewProgramFromFD)
	if err != nil {
		return nil, fmt.Errorf("cannot use the program: %w", err)
	}
	return p, nil
}

// OpenLink describes one link of an object, and opens nothing: a link's descriptor
// would be good for ending it. An *Error NoSuchLink says that there is none.
func (c *Client) OpenLink(ctx context.Context, object, name string) (*ObjectLink, error) {
	in := struct {
		Object string `json:"object"`
		Link   string `json:"link"`
	}{object, name}
	var out struct {
		Link *ObjectLink `json:"link"`
	}
	err := c.call(ctx, "OpenLink", in, &out)
	if err == nil && out.Link == nil {
		err = errBadReply
	}
	return out.Link, err
}

// PacketSocket is an AF_XDP socket: it receives the packets that an object's XDP
// program redirects to it, and sends nothing. Using it needs no privilege. One
// goroutine may read while another one closes it.
type PacketSocket struct {
	// Interface is the name of the interface that it receives from.
	Interface string
	// Size is how many bytes have room for any packet.
	Size   int
	reader *kernel.PacketReader
}

// Read waits for a packet and copies it, from its Ethernet header on; what there is
// no room for is lost. The error is os.ErrClosed, os.ErrDeadlineExceeded, or the
// socket's.
func (s *PacketSocket) Read(packet []byte) (int, error) { return s.reader.Read(packet) }

// SetReadDeadline is the time after which Read fails; the zero time is never.
func (s *PacketSocket) SetReadDeadline(t time.Time) error { return s.reader.SetReadDeadline(t) }

// Close gives the queue up, and ends a Read that is under way.
func (s *PacketSocket) Close() error { return s.reader.Close() }

// OpenSocket makes a socket for the packets that an object redirects to it in a
// map, which is offered with the access Receive, from a queue of the interface
// that the object is attached to. The object is loaded for it if it isn't yet. polkit
// decides. An *Error QueueTaken says that somebody receives from that queue. The
// caller closes it.
func (c *Client) OpenSocket(ctx context.Context, object, name string, queue uint32) (*PacketSocket, error) {
	in := struct {
		Object string `json:"object"`
		Map    string `json:"map"`
		Queue  uint32 `json:"queue"`
		interaction
	}{object, name, queue, c.interaction()}
	var out struct {
		Socket    *int   `json:"socketFileDescriptor"`
		Memory    *int   `json:"memoryFileDescriptor"`
		Interface string `json:"interface"`
		Frames    int    `json:"frames"`
		FrameSize int    `json:"frameSize"`
	}
	files, err := c.callForFiles(ctx, "OpenSocket", in, &out)
	if err != nil {
		return nil, err
	}
	defer wire.CloseFiles(files) // the reader has its own
	if out.Socket == nil || *out.Socket != 0 || out.Memory == nil || *out.Memory != 1 || len(files) != 2 {
		return nil, errBadReply
	}
	reader, err := kernel.NewPacketReader(files[0], files[1], out.Frames, out.FrameSize)
	if err != nil {
		return nil, fmt.Errorf("cannot use the socket: %w", err)
	}
	return &PacketSocket{out.Interface, out.FrameSize, reader}, nil
}

// take hands a file's descriptor on: whoever makes something of it owns it then.
func take[T any](file *os.File, make func(fd int) (T, error)) (T, error) {
	defer file.Close()
	var none T
	fd, err := kernel.Dup(file)
	if err != nil {
		return none, err
	}
	return make(fd)
}

// MountObjects mounts what the objects publish at path, an existing directory in
// the mount namespace of the process that pidfd names, or of the calling one if
// it is nil: a BPF file system that can't be written to. An unmodified program
// opens maps there by their paths. polkit decides. The pidfd stays the caller's.
//
// It returns what is there, as OBJECT/MAP, and in phrases for people what the
// mount doesn't keep the process from.
func (c *Client) MountObjects(ctx context.Context, objects []string, pidfd *os.File, path string) (pins, warnings []string, err error) {
	in := struct {
		Objects []string `json:"objects"`
		Process *int     `json:"processFileDescriptor,omitempty"`
		Path    string   `json:"path"`
		interaction
	}{objects, nil, path, c.interaction()}
	var files []*os.File
	if pidfd != nil {
		in.Process, files = new(int), []*os.File{pidfd}
	}
	var out struct {
		Pins     []string `json:"pins"`
		Warnings []string `json:"warnings"`
	}
	err = c.call(ctx, "MountObjects", in, &out, files...)
	return out.Pins, out.Warnings, err
}

// Table is an opened map, and what is known of it.
type Table struct {
	*ebpf.Map
	// Key and Value are the types of its keys and values, or of a ring buffer's
	// records, of which nothing is said if their types aren't known. A ring
	// buffer's Key is nil.
	Key, Value *typed.Type
	// Warnings are what its user should know, in phrases for people.
	Warnings []string
}

// OpenTable opens a map of an object for reading: ReadOnly, or a ring buffer for
// Consume. The caller closes it.
func (c *Client) OpenTable(ctx context.Context, object, name string) (*Table, error) {
	o, err := c.DescribeObject(ctx, object)
	if err != nil {
		return nil, err
	}
	var description ObjectMap
	for _, m := range o.Maps {
		if m.Name == name {
			description = m
		}
	}
	access := ReadOnly
	if description.IsRing() {
		access = Consume
	}
	m, warnings, err := c.OpenMap(ctx, object, name, access)
	if err != nil {
		return nil, err
	}
	t := &Table{Map: m, Warnings: warnings}
	// The object may be another one by now: the map itself says what it is.
	keySize, valueSize := int(m.KeySize()), int(m.ValueSize())
	t.Value, err = typed.Parse(description.BTF, "value", valueSize)
	if err == nil && keySize > 0 {
		t.Key, err = typed.Parse(description.BTF, "key", keySize)
	}
	if err != nil {
		t.Warnings = append(t.Warnings, "the types of "+object+"/"+name+" are not known: "+err.Error())
		t.Key, t.Value = nil, typed.Raw(valueSize)
		if keySize > 0 {
			t.Key = typed.Raw(keySize)
		}
	}
	return t, nil
}

// PerCPU says whether the map has a value for each processor.
func (t *Table) PerCPU() bool { return typed.HasPerCPUValue(t.Type()) }

// IsRing says whether the map is a ring buffer.
func (m *ObjectMap) IsRing() bool { return m.Type == "ringbuf" }
