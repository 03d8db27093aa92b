// SPDX-License-Identifier: Apache-2.0

package client

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/varlink/wire"
)

// answer handles one request; files are closed after it. A nil reply hangs up.
type answer func(r *wire.Request, files []*os.File) (reply any, send []*os.File)

// stream is a reply of several.
type stream []wire.Reply

// fake is a broker that gives the same answer to everything.
type fake struct {
	socket string

	mu          sync.Mutex
	answer      answer
	requests    []*wire.Request
	connections []*wire.Conn
	serving     sync.WaitGroup
}

func newFake(t *testing.T, a answer) *fake {
	t.Helper()
	f := &fake{socket: filepath.Join(t.TempDir(), "s"), answer: a}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: f.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			c := wire.NewConn(conn, wire.Limits{Bytes: 1 << 20, Files: 4})
			f.mu.Lock()
			f.connections = append(f.connections, c)
			f.serving.Go(func() { f.serve(c) })
			f.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-accepting
		f.hangUp()
	})
	return f
}

func (f *fake) serve(c *wire.Conn) {
	defer c.Close()
	for {
		data, files, err := c.ReadMessage()
		if err != nil {
			return
		}
		r, err := wire.ParseRequest(data)
		if err != nil {
			panic(err)
		}
		f.mu.Lock()
		f.requests = append(f.requests, r)
		a := f.answer
		f.mu.Unlock()
		reply, send := a(r, files)
		wire.CloseFiles(files)
		if reply == nil {
			return
		}
		if replies, ok := reply.(stream); ok {
			for _, r := range replies {
				_ = c.WriteMessage(r)
			}
			continue
		}
		_ = c.WriteMessage(reply, send...)
	}
}

// setAnswer changes what it answers.
func (f *fake) setAnswer(a answer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = a
}

// seen returns the requests so far.
func (f *fake) seen() []*wire.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.requests)
}

// hangUp ends all connections, and waits for what they held to be closed.
func (f *fake) hangUp() {
	f.mu.Lock()
	for _, c := range f.connections {
		_ = c.Close()
	}
	f.connections = nil
	f.mu.Unlock()
	f.serving.Wait()
}

func (f *fake) client(t *testing.T, options ...Option) *Client {
	t.Helper()
	c := New(append(options, WithSocket(f.socket))...)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// parameters is an answer with these parameters.
func parameters(text string) answer {
	return func(*wire.Request, []*os.File) (any, []*os.File) {
		return wire.Reply{Parameters: json.RawMessage(text)}, nil
	}
}

// refusal is an answer with that error.
func refusal(name, text string) answer {
	return func(*wire.Request, []*os.File) (any, []*os.File) {
		return wire.Reply{Error: name, Parameters: json.RawMessage(text)}, nil
	}
}

// openFiles counts the process's file descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// children are the pids of the process's children.
func children(t *testing.T) []string {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, path := range tasks {
		data, _ := os.ReadFile(path) // the thread may be gone
		all = append(all, strings.Fields(string(data))...)
	}
	return all
}

// eventually waits until something is true: the kernel package reaps what it
// killed in the background.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
