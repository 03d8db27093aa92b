// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// The tests here count the process's file descriptors, so they don't run in parallel.

func TestMain(m *testing.M) {
	r, w, _ := os.Pipe() // starts the runtime's poller, whose descriptors stay
	_, _ = r.Close(), w.Close()
	os.Exit(m.Run())
}

// keepFiles fails the test if it ends with other open files than it began with.
func keepFiles(t testing.TB) {
	before := openFiles(t)
	t.Cleanup(func() {
		if diff := cmp.Diff(before, openFiles(t)); diff != "" {
			t.Errorf("open files differ (-before +after):\n%s", diff)
		}
	})
}

func openFiles(t testing.TB) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil { // not the one that Glob read
			open = append(open, filepath.Base(link)+" "+target)
		}
	}
	return open
}

var testLimits = Limits{Bytes: 64 << 10, Files: 1}

// pair returns a Conn and the raw socket at its other end.
func pair(t testing.TB, limits Limits) (*Conn, *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		ends[i] = c.(*net.UnixConn)
	}
	c := NewConn(ends[0], limits)
	t.Cleanup(func() { _, _ = c.Close(), ends[1].Close() })
	return c, ends[1]
}

// send writes data in one sendmsg, with n file descriptors that are told apart by their names.
func send(t testing.TB, to *net.UnixConn, data string, names ...string) {
	t.Helper()
	var fds []int
	for _, name := range names {
		fd, err := unix.MemfdCreate(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	var control []byte
	if len(fds) > 0 {
		control = unix.UnixRights(fds...)
	}
	if n, _, err := to.WriteMsgUnix([]byte(data), control, nil); err != nil || n != len(data) {
		t.Fatalf("sent %d of %d bytes: %v", n, len(data), err)
	}
}

type received struct {
	Data  string
	Files []string
}

func nameOf(t testing.TB, f *os.File) string {
	t.Helper()
	target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(strings.TrimPrefix(target, "/memfd:"), " (deleted)")
}

func readAll(t testing.TB, c *Conn) (all []received, err error) {
	t.Helper()
	for {
		data, files, err := c.ReadMessage()
		if err != nil {
			return all, err
		}
		r := received{Data: string(data)}
		for _, f := range files {
			flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("received file is not close-on-exec: %v", err)
			}
			r.Files = append(r.Files, nameOf(t, f))
			_ = f.Close()
		}
		all = append(all, r)
	}
}

func TestReadMessage(t *testing.T) {
	type chunk struct {
		data  string
		files []string
	}
	long := strings.Repeat("x", testLimits.Bytes)
	tests := map[string]struct {
		limits Limits
		chunks []chunk
		want   []received
		err    error
	}{
		"nothing":                {err: io.EOF},
		"one":                    {chunks: []chunk{{data: "a\x00"}}, want: []received{{Data: "a"}}, err: io.EOF},
		"empty":                  {chunks: []chunk{{data: "\x00"}}, want: []received{{}}, err: io.EOF},
		"three at once":          {chunks: []chunk{{data: "a\x00b\x00c\x00"}}, want: []received{{Data: "a"}, {Data: "b"}, {Data: "c"}}, err: io.EOF},
		"in pieces":              {chunks: []chunk{{data: "a"}, {data: "b"}, {data: "\x00"}}, want: []received{{Data: "ab"}}, err: io.EOF},
		"half":                   {chunks: []chunk{{data: "a\x00b"}}, want: []received{{Data: "a"}}, err: io.ErrUnexpectedEOF},
		"longest":                {chunks: []chunk{{data: long}, {data: "\x00"}}, want: []received{{Data: long}}, err: io.EOF},
		"longest, with file":     {chunks: []chunk{{long, []string{"f"}}, {data: "\x00"}}, want: []received{{long, []string{"f"}}}, err: io.EOF},
		"too long":               {chunks: []chunk{{data: long + "y"}}, err: ErrMessageTooLarge},
		"too long, with file":    {chunks: []chunk{{long + "y\x00", []string{"f"}}}, err: ErrMessageTooLarge},
		"file":                   {chunks: []chunk{{"a\x00", []string{"f"}}}, want: []received{{"a", []string{"f"}}}, err: io.EOF},
		"file on half a message": {chunks: []chunk{{"a", []string{"f"}}}, err: io.ErrUnexpectedEOF},
		"file on the rest":       {chunks: []chunk{{data: "a"}, {"b\x00", []string{"f"}}}, want: []received{{"ab", []string{"f"}}}, err: io.EOF},
		// Several messages in one send: the files are the last one's.
		"file, pipelined": {chunks: []chunk{{"a\x00b\x00", []string{"f"}}}, want: []received{{Data: "a"}, {"b", []string{"f"}}}, err: io.EOF},
		// The bytes before a file's send are glued to it, those behind it are not.
		"file on the second": {chunks: []chunk{{data: "a\x00"}, {"b\x00", []string{"f"}}, {data: "c\x00"}},
			want: []received{{Data: "a"}, {"b", []string{"f"}}, {Data: "c"}}, err: io.EOF},
		"file on each": {chunks: []chunk{{"a\x00", []string{"f"}}, {"b\x00", []string{"g"}}, {"c\x00", []string{"h"}}},
			want: []received{{"a", []string{"f"}}, {"b", []string{"g"}}, {"c", []string{"h"}}}, err: io.EOF},
		"files across a border": {chunks: []chunk{{"a", []string{"f"}}, {"b\x00c", []string{"g"}}, {data: "\x00"}},
			want: []received{{"ab", []string{"f"}}, {"c", []string{"g"}}}, err: io.EOF},
		"two files":             {chunks: []chunk{{"a\x00", []string{"f", "g"}}}, err: ErrTooManyFiles},
		"two files, allowed":    {limits: Limits{Bytes: 9, Files: 2}, chunks: []chunk{{"a\x00", []string{"f", "g"}}}, want: []received{{"a", []string{"f", "g"}}}, err: io.EOF},
		"two files, in pieces":  {chunks: []chunk{{"a", []string{"f"}}, {"b", []string{"g"}}, {data: "\x00"}}, err: ErrTooManyFiles},
		"file behind good ones": {chunks: []chunk{{data: "a\x00"}, {"b\x00", []string{"f", "g"}}}, err: ErrTooManyFiles},
		"most files there are":  {chunks: []chunk{{"a\x00", make([]string, 253)}}, err: ErrTooManyFiles},
		"file, none allowed":    {limits: Limits{Bytes: 9}, chunks: []chunk{{"a\x00", []string{"f"}}}, err: ErrTooManyFiles},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			keepFiles(t)
			if test.limits == (Limits{}) {
				test.limits = testLimits
			}
			c, peer := pair(t, test.limits)
			for _, chunk := range test.chunks {
				send(t, peer, chunk.data, chunk.files...)
			}
			_ = peer.Close()
			got, err := readAll(t, c)
			if diff := cmp.Diff(test.want, got); diff != "" || !errors.Is(err, test.err) {
				t.Errorf("error %v, want %v; messages (-want +got):\n%s", err, test.err, diff)
			}
		})
	}
}

func TestReadMessageByteByByte(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, testLimits)
	go func() {
		for _, b := range []byte("abc\x00d\x00") {
			_, _ = peer.Write([]byte{b})
			time.Sleep(time.Millisecond)
		}
		_ = peer.Close()
	}()
	got, err := readAll(t, c)
	if diff := cmp.Diff([]received{{Data: "abc"}, {Data: "d"}}, got); diff != "" || err != io.EOF {
		t.Errorf("error %v; messages (-want +got):\n%s", err, diff)
	}
}

// Somebody may have set SO_PASSCRED, SO_PASSPIDFD or SO_PASSSEC on the listening socket.
func TestReadMessageOtherControl(t *testing.T) {
	for name, option := range map[string]int{"credentials": unix.SO_PASSCRED, "pidfd": unix.SO_PASSPIDFD, "label": unix.SO_PASSSEC} {
		for _, files := range []int{0, 1, 8} {
			t.Run(name+strconv.Itoa(files), func(t *testing.T) {
				keepFiles(t)
				c, peer := pair(t, Limits{Bytes: 9, Files: files})
				raw, err := c.unix.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, 1) })
				if err != nil {
					t.Fatal(err)
				}
				send(t, peer, "a\x00")
				_ = peer.Close()
				// Whether it was cut short depends on the room; that nothing is left open and no file appears does not.
				all, err := readAll(t, c)
				if err == io.EOF && cmp.Diff([]received{{Data: "a"}}, all) != "" || err != io.EOF && !errors.Is(err, ErrTooManyFiles) {
					t.Errorf("got %v, %v", all, err)
				}
			})
		}
	}
}

// A sender may set O_NONBLOCK at any time; the runtime must not poll its file all the same.
func TestReceivedFileIsNotPolled(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, testLimits)
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	if _, _, err := peer.WriteMsgUnix([]byte("a\x00"), unix.UnixRights(fds[0]), nil); err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Close(fds[0]), unix.Close(fds[1])
	_, files, err := c.ReadMessage()
	if err != nil {
		t.Fatal(err)
	}
	defer files[0].Close()
	if err := files[0].SetDeadline(time.Now()); !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("SetDeadline: %v, want %v", err, os.ErrNoDeadline)
	}
}

func TestReadMessageOutOfFiles(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, testLimits)
	send(t, peer, "a\x00", "f")
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	next, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(next)
	for _, more := range []uint64{0, 1} { // for nothing; for the received one, but not its duplicate
		if more > 0 {
			send(t, peer, "b\x00", "f")
		}
		low := unix.Rlimit{Cur: uint64(next) + more, Max: old.Max}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
			t.Fatal(err)
		}
		_, _, err = c.ReadMessage()
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
		if want := []error{ErrTooManyFiles, unix.EMFILE}[more]; !errors.Is(err, want) {
			t.Errorf("room for %d more files: got %v, want %v", more, err, want)
		}
	}
}

func TestArrival(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, Limits{Bytes: 9, Files: 1, Arrival: 50 * time.Millisecond})
	time.AfterFunc(100*time.Millisecond, func() { send(t, peer, "a\x00") })
	if data, _, err := c.ReadMessage(); string(data) != "a" || err != nil { // before the first byte there is no hurry
		t.Fatalf("got %q, %v", data, err)
	}
	send(t, peer, "b")
	time.AfterFunc(10*time.Millisecond, func() { send(t, peer, "\x00") })
	if data, _, err := c.ReadMessage(); string(data) != "b" || err != nil {
		t.Fatalf("got %q, %v", data, err)
	}
	time.AfterFunc(100*time.Millisecond, func() { send(t, peer, "c", "f") })
	if _, _, err := c.ReadMessage(); !errors.Is(err, os.ErrDeadlineExceeded) { // after a message neither
		t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
	}
}

func TestCloseDropsHeldFiles(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, testLimits)
	send(t, peer, "a\x00b", "f")
	if data, files, err := c.ReadMessage(); string(data) != "a" || files != nil || err != nil {
		t.Fatalf("got %q, %v, %v", data, files, err)
	}
	done := make(chan error)
	go func() {
		_, _, err := c.ReadMessage()
		done <- err
	}()
	time.Sleep(10 * time.Millisecond)
	_ = c.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func TestWriteMessage(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, testLimits)
	other := NewConn(peer, Limits{Bytes: 4 << 20, Files: 2})
	sender, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	long := strings.Repeat("x", 3<<20) // more than a socket holds
	var writer sync.WaitGroup
	writer.Go(func() {
		for _, text := range []string{"short", long} {
			if err := c.WriteMessage(text, sender, sender); err != nil {
				t.Error(err)
			}
			if err := c.WriteMessage(text); err != nil {
				t.Error(err)
			}
		}
	})
	for i, text := range []string{"short", "short", long, long} {
		data, files, err := other.ReadMessage()
		if err != nil || string(data) != `"`+text+`"` || len(files) != 2-2*(i%2) {
			t.Errorf("message %d: %d bytes, %d files, %v", i, len(data), len(files), err)
		}
		CloseFiles(files)
	}
	writer.Wait()
	if _, err := sender.Stat(); err != nil {
		t.Errorf("WriteMessage closed the file: %v", err)
	}

	if err := c.WriteMessage(func() {}); err == nil {
		t.Error("wrote a function")
	}
	_ = sender.Close()
	if err := c.WriteMessage("x", sender); !errors.Is(err, unix.EBADF) {
		t.Errorf("closed file: got %v, want %v", err, unix.EBADF)
	}
}

func TestWriteMessageToNobody(t *testing.T) {
	keepFiles(t)
	c, peer := pair(t, Limits{Bytes: 9, Write: 50 * time.Millisecond})
	if err := c.WriteMessage(strings.Repeat("x", 3<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("peer doesn't read: got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	_ = peer.Close()
	if err := c.WriteMessage("x"); !errors.Is(err, unix.EPIPE) {
		t.Errorf("peer is gone: got %v, want %v", err, unix.EPIPE)
	}
}

// What two sends of any bytes, with and without a file, make of a Conn.
func FuzzReadMessage(f *testing.F) {
	f.Add([]byte("{\"method\":\"a.b.C\"}\x00"), []byte("\x00"), true)
	f.Add([]byte("a"), []byte("b\x00c\x00"), false)
	f.Add([]byte("\x00\x00\x00"), bytes.Repeat([]byte("x"), 100), true)
	f.Fuzz(func(t *testing.T, first, second []byte, file bool) {
		if len(first)+len(second) > 64<<10 || len(first) == 0 || len(second) == 0 {
			return // or it blocks, or sends no file
		}
		before := len(openFiles(t))
		c, peer := pair(t, Limits{Bytes: 64, Files: 1})
		send(t, peer, string(first))
		if file {
			send(t, peer, string(second), "f")
		} else {
			send(t, peer, string(second))
		}
		_ = peer.Close()
		got, err := readAll(t, c)
		var text strings.Builder
		files := 0
		for _, r := range got {
			text.WriteString(r.Data + "\x00")
			files += len(r.Files)
		}
		sent := string(first) + string(second)
		if !strings.HasPrefix(sent, text.String()) || err == io.EOF && (text.String() != sent || (files == 1) != file) {
			t.Errorf("sent %q, got %q, %v", sent, got, err)
		}
		_ = c.Close()
		if after := len(openFiles(t)); after != before {
			t.Errorf("%d files before, %d after", before, after)
		}
	})
}
