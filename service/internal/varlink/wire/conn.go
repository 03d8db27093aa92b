// SPDX-License-Identifier: Apache-2.0

// Package wire carries Varlink messages and file descriptors over a Unix stream socket, and decodes them strictly. The server and the client
// share it.
package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
)

// ErrMessageTooLarge says that no NUL came within the limit. The connection can't be read any further.
var ErrMessageTooLarge = errors.New("message is too large")

// ErrTooManyFiles says that more file descriptors came with a message than the limit, or that the kernel could not install one. All of them are
// closed. The connection can't be read any further.
var ErrTooManyFiles = errors.New("too many file descriptors with one message")

const (
	// readSize bounds what one read takes, and so how many short messages wait in the buffer.
	readSize = 4096
	// scmPIDFD is SCM_PIDFD of linux/socket.h: a control message that carries an fd of its own.
	scmPIDFD = 4
)

// Limits bound what a Conn takes in, and for how long it waits.
type Limits struct {
	Bytes   int           // longest message, without its NUL
	Files   int           // most file descriptors with one message
	Arrival time.Duration // from a message's first bytes to its NUL; 0: forever
	Write   time.Duration // for writing one message; 0: forever
}

// Conn is one end of a Varlink connection. One goroutine may read while another one writes, and anyone may close.
type Conn struct {
	unix   *net.UnixConn
	limits Limits

	reading sync.Mutex // held while reading; guards what follows
	control []byte
	buffer  []byte // received and not handed out
	held    []heldFiles
}

// heldFiles came in with a chunk whose last byte is buffer[end].
type heldFiles struct {
	end   int
	files []*os.File
}

// NewConn takes over a connected socket.
func NewConn(unix *net.UnixConn, limits Limits) *Conn {
	// Exactly as long as needed: the kernel would fill the padding of an aligned buffer with further fds.
	return &Conn{unix: unix, limits: limits, control: make([]byte, syscall.CmsgLen(4*limits.Files))}
}

// Close closes the socket and the file descriptors that nobody took. A ReadMessage or WriteMessage that is under way fails.
func (c *Conn) Close() error {
	err := c.unix.Close()
	c.reading.Lock()
	defer c.reading.Unlock()
	c.closeHeld()
	return err
}

// SetDeadline is the time after which reading and writing fail with os.ErrDeadlineExceeded; the zero time is never. It is for a Conn whose Limits
// set no durations: those set deadlines too.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.unix.SetDeadline(t)
}

// ReadMessage waits for the next message and returns it without its NUL, with the file descriptors that came with it. Both belong to the caller;
// the file descriptors are close-on-exec.
//
// It fails with io.EOF between messages, io.ErrUnexpectedEOF within one, ErrMessageTooLarge, ErrTooManyFiles, os.ErrDeadlineExceeded, or the
// socket's error. After a failure everything that was received is closed and dropped, and the connection is good for nothing but writing.
func (c *Conn) ReadMessage() (data []byte, files []*os.File, err error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	defer func() {
		if err != nil {
			c.closeHeld()
		}
	}()
	for scanned, waiting := 0, false; ; {
		end := len(c.buffer)
		i := bytes.IndexByte(c.buffer[scanned:], 0)
		if i >= 0 {
			end = scanned + i
		}
		if c.filesUpTo(end) > c.limits.Files {
			return nil, nil, ErrTooManyFiles
		}
		if i >= 0 {
			if waiting {
				err = c.unix.SetReadDeadline(time.Time{})
			}
			if err != nil {
				return nil, nil, fmt.Errorf("cannot clear read deadline: %w", err)
			}
			data, files = c.take(end)
			return data, files, nil
		}
		if end > c.limits.Bytes {
			return nil, nil, ErrMessageTooLarge
		}
		if end > 0 && !waiting && c.limits.Arrival > 0 {
			if err := c.unix.SetReadDeadline(time.Now().Add(c.limits.Arrival)); err != nil {
				return nil, nil, fmt.Errorf("cannot set read deadline: %w", err)
			}
			waiting = true
		}
		scanned = end
		if err := c.receive(); err != nil {
			return nil, nil, err
		}
	}
}

// receive appends one chunk to the buffer.
//
// File descriptors belong to the message that holds the last byte of the chunk they came with. A sender attaches them to the first bytes of one
// sendmsg. The kernel (unix_stream_read_generic in net/unix/af_unix.c) may put bytes of earlier sends in front of those, but ends
// the chunk with the socket buffer that carried file descriptors: nothing of a later send is ever behind them.
func (c *Conn) receive() error {
	had := len(c.buffer)
	c.buffer = slices.Grow(c.buffer, readSize)
	room := min(readSize, c.limits.Bytes+1-had) // the limit and a NUL
	n, controlled, flags, _, err := c.unix.ReadMsgUnix(c.buffer[had:had+room], c.control)
	files, filesErr := receivedFiles(c.control[:controlled])
	if n > 0 {
		c.buffer = c.buffer[:had+n]
	}
	if len(files) > 0 {
		c.held = append(c.held, heldFiles{end: len(c.buffer) - 1, files: files})
	}
	switch {
	case filesErr != nil:
		return filesErr
	case flags&syscall.MSG_CTRUNC != 0:
		return ErrTooManyFiles
	case errors.Is(err, io.EOF) && had > 0:
		return io.ErrUnexpectedEOF
	case errors.Is(err, io.EOF):
		return io.EOF
	case err != nil:
		return fmt.Errorf("cannot receive: %w", err)
	}
	return nil
}

// receivedFiles takes every file descriptor out of control messages. Those that nobody asked for (SCM_PIDFD) it closes.
func receivedFiles(control []byte) (files []*os.File, err error) {
	// The kernel wrote them: they parse, also when they are truncated.
	messages, _ := syscall.ParseSocketControlMessage(control)
	for _, m := range messages {
		wanted := m.Header.Type == syscall.SCM_RIGHTS
		if m.Header.Level != syscall.SOL_SOCKET || !wanted && m.Header.Type != scmPIDFD {
			continue
		}
		m.Header.Type = syscall.SCM_RIGHTS // an SCM_PIDFD has the same form
		fds, _ := syscall.ParseUnixRights(&m)
		for _, fd := range fds {
			if fd < 0 { // the kernel says so when it has no pidfd
				continue
			}
			if wanted && err == nil {
				var f *os.File
				if f, err = newFile(fd); err == nil {
					files = append(files, f)
				}
			}
			_ = syscall.Close(fd)
		}
	}
	return files, err
}

// newFile duplicates fd into a file that the runtime's poller never sees. os.NewFile alone would add one with O_NONBLOCK, which its sender can set
// at any time, to the runtime's epoll; for a file on a FUSE file system that waits for the sender's own server, with the whole poller locked.
func newFile(fd int) (*os.File, error) {
	blocking, err := syscall.Open("/", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot reserve file descriptor: %w", err)
	}
	f := os.NewFile(uintptr(blocking), "received")
	if err := syscall.Dup3(fd, blocking, syscall.O_CLOEXEC); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot take file descriptor: %w", err)
	}
	return f, nil
}

// filesUpTo counts the files of the message that ends, so far, at buffer[end].
func (c *Conn) filesUpTo(end int) int {
	n := 0
	for _, h := range c.held {
		if h.end <= end {
			n += len(h.files)
		}
	}
	return n
}

// take removes the message whose NUL is buffer[end], and its files.
func (c *Conn) take(end int) ([]byte, []*os.File) {
	var files []*os.File
	var later []heldFiles
	for _, h := range c.held {
		if h.end <= end {
			files = append(files, h.files...)
		} else {
			later = append(later, heldFiles{end: h.end - end - 1, files: h.files})
		}
	}
	data := c.buffer[:end:end]
	c.buffer, c.held = bytes.Clone(c.buffer[end+1:]), later
	return data, files
}

func (c *Conn) closeHeld() {
	for _, h := range c.held {
		CloseFiles(h.files)
	}
	c.buffer, c.held = nil, nil
}

// CloseFiles closes files; nil ones are left out.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close() // nothing was written to it
		}
	}
}

// WriteMessage sends v as JSON, with file descriptors on its first bytes. It closes no file: they are the caller's, before and after. After a
// failure part of the message may have been sent: the connection is good for nothing but reading.
func (c *Conn) WriteMessage(v any, files ...*os.File) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot encode message: %w", err)
	}
	data = append(data, 0)
	if c.limits.Write > 0 {
		if err := c.unix.SetWriteDeadline(time.Now().Add(c.limits.Write)); err != nil {
			return fmt.Errorf("cannot set write deadline: %w", err)
		}
	}
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		n, _, err := c.unix.WriteMsgUnix(data, syscall.UnixRights(fds...), nil)
		runtime.KeepAlive(files)
		if err != nil {
			return fmt.Errorf("cannot send: %w", err)
		}
		data = data[n:]
	}
	if len(data) > 0 {
		if _, err := c.unix.Write(data); err != nil {
			return fmt.Errorf("cannot send: %w", err)
		}
	}
	return nil
}
