// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// listenForAll listens on a socket that everybody can reach.
func listenForAll(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "bpfbroker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for path, mode := range map[string]os.FileMode{dir: 0o755, l.Addr().String(): 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// connect has a process connect and returns both ends.
func connect(t *testing.T, l *net.UnixListener, p *testtarget.Process) (theirs *os.File, ours *net.UnixConn) {
	t.Helper()
	_, files, err := p.Do("connect", []string{l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { files[0].Close() })
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return files[0], conn
}

func TestPeerCredentials(t *testing.T) {
	testtarget.NoLeaks(t)
	l := listenForAll(t)
	many := make([]uint32, 1000)
	for i := range many {
		many[i] = uint32(20000 + i)
	}
	for name, test := range map[string]struct {
		process     *testtarget.Process
		uid, gid    uint32
		wantsGroups []uint32
	}{
		"no groups":        {testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice}), testtarget.Alice, testtarget.Alice, []uint32{}},
		"a group":          {testtarget.Start(t, testtarget.Attr{UID: testtarget.Bob, Groups: []uint32{7}}), testtarget.Bob, testtarget.Bob, []uint32{7}},
		"64 groups":        {testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice, Groups: many[:64]}), testtarget.Alice, testtarget.Alice, many[:64]},
		"65 groups":        {testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice, Groups: many[:65]}), testtarget.Alice, testtarget.Alice, many[:65]},
		"1000 groups":      {testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice, Groups: many}), testtarget.Alice, testtarget.Alice, many},
		"a user namespace": {testtarget.New(t, testtarget.Alice), testtarget.Alice, testtarget.Alice, []uint32{}},
		"no ids in its namespace": {testtarget.NewWith(t, testtarget.Bob, unix.CLONE_NEWUSER|unix.CLONE_NEWNS, testtarget.None),
			testtarget.Bob, testtarget.Bob, []uint32{}},
		"a pid namespace": {testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWPID, testtarget.Root),
			testtarget.Alice, testtarget.Alice, []uint32{}},
	} {
		t.Run(name, func(t *testing.T) {
			_, conn := connect(t, l, test.process)
			c, err := PeerCredentials(conn)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Process.Close()
			if c.UID != test.uid || c.GID != test.gid || c.Process.PID != processOf(t, test.process).PID {
				t.Errorf("got %+v, process %d", c, c.Process.PID)
			}
			if diff := cmp.Diff(test.wantsGroups, c.Groups); diff != "" {
				t.Errorf("groups (-want +got):\n%s", diff)
			}
			if held := processOf(t, test.process); held.Inode != c.Process.Inode {
				t.Errorf("inode %d, not %d", c.Process.Inode, held.Inode)
			}
		})
	}
}

func TestPeerCredentialsOfExited(t *testing.T) {
	testtarget.NoLeaks(t)
	l := listenForAll(t)
	parent := testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})
	peer := parent.Start(testtarget.Attr{})
	// The connection is passed on and outlives its maker.
	_, conn := connect(t, l, peer)
	peer.Kill()
	testtarget.Eventually(t, "the process is reaped", func() bool { return unix.Kill(peer.PID, 0) == unix.ESRCH })
	if c, err := PeerCredentials(conn); !errors.Is(err, ErrProcessGone) {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestPeerCredentialsOfOtherSockets(t *testing.T) {
	testtarget.NoLeaks(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(pair[1])
	file := os.NewFile(uintptr(pair[0]), "socket")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	c, err := PeerCredentials(conn.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	if c.Process.PID != os.Getpid() {
		t.Errorf("got process %d", c.Process.PID)
	}
	c.Process.Close()
	conn.Close()
	if _, err := PeerCredentials(conn.(*net.UnixConn)); err == nil {
		t.Error("a closed connection has a peer")
	}
}
