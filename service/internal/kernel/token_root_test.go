// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// someRights are two commands, a map type, a program type and no attach type.
var someRights = Delegation{
	Commands:    1<<commandMapCreate | 1<<commandProgLoad,
	Maps:        1 << mapLRUHash,
	Programs:    1 << programSocketFilter,
	Attachments: 1,
}

// namespacesOf takes hold of the namespaces of a test's process.
func namespacesOf(t testing.TB, p *testtarget.Process) *Namespaces {
	t.Helper()
	n, err := processOf(t, p).Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

func TestNamespaces(t *testing.T) {
	testtarget.NoLeaks(t)
	const both = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	initial := testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})
	target := testtarget.New(t, testtarget.Alice)
	nested := target.Start(testtarget.Attr{Namespaces: both})
	others := testtarget.NewContainer(t, testtarget.Alice).Start(testtarget.Attr{UID: 1}).Start(testtarget.Attr{Namespaces: both})
	for name, test := range map[string]struct {
		process *testtarget.Process
		want    Relation
	}{
		"initial":                 {initial, Relation{Initial: true}},
		"initial, own mounts":     {testtarget.Start(t, testtarget.Attr{Namespaces: unix.CLONE_NEWNS}), Relation{Initial: true}},
		"alice's":                 {target, Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
		"alice's, uid kept":       {testtarget.NewWith(t, testtarget.Alice, both, testtarget.Same), Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
		"alice's, no ids":         {testtarget.NewWith(t, testtarget.Alice, both, testtarget.None), Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
		"alice's, host's mounts":  {testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER, testtarget.Root), Relation{Owner: testtarget.Alice, Unmixed: true}},
		"bob's":                   {testtarget.New(t, testtarget.Bob), Relation{Owner: testtarget.Bob, Unmixed: true, OwnsMount: true}},
		"root's":                  {testtarget.New(t, 0), Relation{Owner: 0, Unmixed: true, OwnsMount: true}},
		"root's for alice":        {testtarget.Start(t, testtarget.Attr{Namespaces: both, Mapping: testtarget.None}), Relation{Unmixed: true, OwnsMount: true}},
		"nested":                  {nested, Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
		"nested, parent's mounts": {target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER}), Relation{Owner: testtarget.Alice, Unmixed: true}},
		"nested in nested":        {nested.Start(testtarget.Attr{Namespaces: both}), Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
		"another's in alice's":    {others, Relation{Owner: testtarget.Subordinate, OwnsMount: true}},
		"nested in another's":     {others.Start(testtarget.Attr{Namespaces: both}), Relation{Owner: testtarget.Subordinate, OwnsMount: true}},
		"beside in a namespace":   {target.Start(testtarget.Attr{}), Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
		"own mounts in alice's":   {target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWNS}), Relation{Owner: testtarget.Alice, Unmixed: true, OwnsMount: true}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := namespacesOf(t, test.process).Relation()
			if err != nil {
				t.Fatal(err)
			}
			link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", test.process.PID))
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("user:[%d]", got.Inode); link != want {
				t.Errorf("got inode %d, the namespace is %s", got.Inode, link)
			}
			got.Inode = 0
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestSame(t *testing.T) {
	testtarget.NoLeaks(t)
	target := testtarget.New(t, testtarget.Alice)
	n := namespacesOf(t, target)
	for name, test := range map[string]struct {
		other *testtarget.Process
		want  bool
	}{
		"itself":         {target, true},
		"beside":         {target.Start(testtarget.Attr{}), true},
		"other mounts":   {target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWNS}), false},
		"nested":         {target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER}), false},
		"another":        {testtarget.New(t, testtarget.Alice), false},
		"the initial":    {testtarget.Start(t, testtarget.Attr{}), false},
		"network, alone": {target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWNET}), true},
	} {
		got, err := n.Same(namespacesOf(t, test.other))
		if err != nil || got != test.want {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
	target.Must("unshare", strconv.Itoa(unix.CLONE_NEWNS))
	if same, err := n.Same(namespacesOf(t, target)); err != nil || same {
		t.Errorf("after unshare(2): got %v, %v", same, err)
	}
}

func TestDelegateMasks(t *testing.T) {
	testtarget.NoLeaks(t)
	n := namespacesOf(t, testtarget.New(t, testtarget.Alice))
	all := ^uint64(0)
	for name, d := range map[string]Delegation{
		"some":           someRights,
		"commands alone": {Commands: 1},
		"one bit each":   {1 << 5, 1 << 9, 1 << 1, 1 << 7},
		"other bits":     {1 << 18, 1 << 31, 1 << 26, 1 << 40},
		"all bits":       {all, all, all, all},
		// Types that this kernel doesn't know do no harm: it says of any of
		// them that it doesn't.
		"newer types":      {1 | 1<<62, 1 | 1<<62, 1 | 1<<62, 1 | 1<<62},
		"the highest bits": {all << 63, all << 63, all << 63, all << 63},
	} {
		t.Run(name, func(t *testing.T) { mustDelegate(t, n, d) })
	}
	// A kernel that knows as many types as are asked for, or fewer, can't say
	// that these aren't all 64.
	for bits := 33; bits < 64; bits++ {
		m := uint64(1)<<bits - 1
		mustDelegate(t, n, Delegation{m, m, m, m})
	}
}

// mustDelegate makes a file system and gives it up. That the masks come back
// is tested by Delegate itself.
func mustDelegate(t *testing.T, n *Namespaces, d Delegation) {
	t.Helper()
	f, err := Delegate(n, d, testtarget.Alice)
	if err != nil {
		t.Errorf("cannot delegate %#x: %v", d, err)
		return
	}
	f.Close()
}

func TestAgrees(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		got, asked uint64
		want       bool
	}{
		{0, 0, true},
		{5, 5, true},
		{5, 4, false},
		{4, 5, false},
		{allTypes, allTypes, true},
		{allTypes, 1<<33 - 1, true},
		{allTypes, 1<<39 - 1 | 1<<63, true},
		{allTypes, 1, false},
		{allTypes, 1<<32 - 1, false},
		{allTypes, allTypes - 1, false},
		{allTypes, allTypes - 1<<20, false},
		{1<<33 - 1, allTypes, false},
	} {
		if got := agrees(test.got, test.asked); got != test.want {
			t.Errorf("%#x for %#x: got %v", test.got, test.asked, got)
		}
	}
}

// delegated makes a file system with someRights, and closes it with the test.
func delegated(t testing.TB, n *Namespaces, owner uint32) *Filesystem {
	t.Helper()
	f, err := Delegate(n, someRights, owner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

func take(t testing.TB, f *Filesystem) *os.File {
	t.Helper()
	mount, err := f.Take()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mount.Close() })
	return mount
}

// use has a process try the file system.
func use(t *testing.T, p *testtarget.Process, mount *os.File) bpfResults {
	t.Helper()
	out, _, err := p.Do("bpf", nil, mount)
	if err != nil {
		t.Fatal(err)
	}
	var results bpfResults
	if err := json.Unmarshal([]byte(out), &results); err != nil {
		t.Fatal(err)
	}
	return results
}

func TestToken(t *testing.T) {
	testtarget.NoLeaks(t)
	for name, user := range map[string]int{"alice": testtarget.Alice, "root": 0} {
		t.Run(name, func(t *testing.T) {
			p := testtarget.New(t, user)
			before := p.Mounts()
			f := delegated(t, namespacesOf(t, p), uint32(user))
			mount := take(t, f)

			var stat unix.Stat_t
			if err := unix.Fstat(int(mount.Fd()), &stat); err != nil {
				t.Fatal(err)
			}
			if int(stat.Uid) != user || stat.Mode != unix.S_IFDIR|0o1700 {
				t.Errorf("the root directory is of uid %d, mode %#o", stat.Uid, stat.Mode)
			}
			want := bpfResults{
				"open": 0, "token": 0,
				"map": 0, "pin": 0, "unpin": 0, "pin elsewhere": unix.EPERM,
				"program":                        0,
				"map of another type":            unix.EPERM,
				"program of another type":        unix.EPERM,
				"program of another attach type": unix.EPERM,
				"map without token":              unix.EPERM,
				"program without token":          unix.EPERM,
			}
			if diff := cmp.Diff(want, use(t, p, mount)); diff != "" {
				t.Errorf("in the target (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(before, p.Mounts()); diff != "" {
				t.Errorf("mounts (-before +after):\n%s", diff)
			}

			// Whoever gets hold of the mount elsewhere has nothing of it.
			for name, other := range map[string]struct {
				process *testtarget.Process
				user    int
			}{
				"bob":                       {testtarget.Start(t, testtarget.Attr{UID: testtarget.Bob}), testtarget.Bob},
				"bob's namespace":           {testtarget.New(t, testtarget.Bob), testtarget.Bob},
				"alice":                     {testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice}), testtarget.Alice},
				"alice's other namespace":   {testtarget.New(t, testtarget.Alice), testtarget.Alice},
				"root's other namespace":    {testtarget.New(t, 0), 0},
				"nested in its namespace":   {p.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER}), user},
				"nested, with mounts of it": {p.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER | unix.CLONE_NEWNS}), user},
			} {
				want := bpfResults{"open": unix.EACCES, "map without token": unix.EPERM, "program without token": unix.EPERM}
				if other.user == user {
					want["open"], want["token"] = 0, unix.EPERM
				}
				if diff := cmp.Diff(want, use(t, other.process, mount)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", name, diff)
				}
			}
		})
	}
}

func TestDelegateRefused(t *testing.T) {
	testtarget.NoLeaks(t)
	alice := namespacesOf(t, testtarget.New(t, testtarget.Alice))
	const both = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	for name, test := range map[string]struct {
		namespaces *Namespaces
		owner      uint32
		rights     Delegation
		want       error
	}{
		"another owner":          {alice, testtarget.Bob, someRights, unix.EPERM},
		"an owner not mapped":    {namespacesOf(t, testtarget.NewWith(t, testtarget.Alice, both, testtarget.None)), testtarget.Alice, someRights, ErrOwnerNotMapped},
		"the host's mounts":      {namespacesOf(t, testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER, testtarget.Root)), testtarget.Alice, someRights, unix.EPERM},
		"the initial namespaces": {namespacesOf(t, testtarget.Start(t, testtarget.Attr{})), 0, someRights, unix.EINVAL},
		"nothing to delegate":    {alice, testtarget.Alice, Delegation{}, unix.ENOENT},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := Delegate(test.namespaces, test.rights, test.owner)
			if err == nil {
				f.Close()
			}
			if !errors.Is(err, test.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAttach(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	n := namespacesOf(t, p)
	f := delegated(t, n, testtarget.Alice)
	// Only root, and only root's group, can go through these directories.
	private := t.TempDir()
	for dir, mode := range map[string]os.FileMode{"root": 0o700, "group": 0o750, "open": 0o755} {
		if err := os.MkdirAll(filepath.Join(private, dir, "in"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(private, dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	for dir := private; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.Must("mkdir", "/mnt/dir")
	p.Must("mkdir", "/mnt/dir/sub")
	p.Must("mkdir", "/mnt/closed", "0")
	p.Must("write", "/mnt/file")
	p.Must("symlink", "dir", "/mnt/link")
	p.Must("symlink", "/mnt/nothing", "/mnt/dangling")
	p.Must("symlink", "/mnt/loop", "/mnt/loop")
	p.Must("bind", "/mnt/file", "/mnt/file")
	before := p.Mounts()

	for path, want := range map[string]error{
		"/mnt/missing":                     ErrPathNotFound,
		"/mnt/missing/sub":                 ErrPathNotFound,
		"/mnt/dir/missing":                 ErrPathNotFound,
		"/mnt/file":                        ErrPathNotDirectory,
		"/mnt/file/sub":                    ErrPathNotDirectory,
		"/dev/null":                        ErrPathNotDirectory,
		"/mnt/link":                        ErrPathIsLink,
		"/mnt/link/sub":                    ErrPathIsLink,
		"/mnt/dangling":                    ErrPathIsLink,
		"/mnt/loop":                        ErrPathIsLink,
		"/proc/self/root/mnt/dir":          ErrPathIsLink,
		"/proc/self/cwd":                   ErrPathIsLink,
		"/proc/self/fd/0":                  ErrPathIsLink,
		"/proc/1/root":                     ErrPathIsLink,
		filepath.Join(private, "root/in"):  ErrPathDenied,
		filepath.Join(private, "group/in"): ErrPathDenied,
		"/" + strings.Repeat("a", 300):     ErrPathInvalid,
	} {
		if err := f.Attach("/", path); !errors.Is(err, want) {
			t.Errorf("%.80s: got %v, want %v", path, err, want)
		}
	}
	for _, path := range invalidPaths {
		if err := f.Attach("/", path); !errors.Is(err, ErrPathInvalid) {
			t.Errorf("%.80q: got %v", path, err)
		}
	}
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Fatalf("mounts (-before +after):\n%s", diff)
	}

	host := len(ownMounts(t))
	for _, path := range []string{"/mnt/dir/sub", "/mnt/closed", "/mnt", "/", filepath.Join(private, "open/in"), "/sys"} {
		f := delegated(t, n, testtarget.Alice)
		if err := f.Attach("/", path); err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if diff := cmp.Diff([]string{path}, p.Mounted("bpf")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
		if err := Detach(n, testtarget.Alice, f.ID, path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if diff := cmp.Diff(before, p.Mounts()); diff != "" {
			t.Errorf("%s: mounts (-before +after):\n%s", path, diff)
		}
	}
	if got := len(ownMounts(t)); got != host {
		t.Errorf("%d mounts on the host, before %d", got, host)
	}
}

func ownMounts(t *testing.T) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(data), "\n")
}

func TestDetach(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	n := namespacesOf(t, p)
	attach := func(dir string) uint64 {
		p.Must("mkdir", dir)
		f, err := Delegate(n, someRights, testtarget.Alice)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Attach("/", dir); err != nil {
			t.Fatal(err)
		}
		return f.ID
	}
	first, second := attach("/mnt/first"), attach("/mnt/second")
	if first == second {
		t.Error("two mounts with one number")
	}
	p.Must("mkdir", "/mnt/over")
	p.Must("bind", "/mnt", "/mnt/over")
	p.Must("tmpfs", "/mnt/second")
	before := p.Mounts()
	for name, test := range map[string]struct {
		id   uint64
		path string
		want error
	}{
		"another's number":  {second, "/mnt/first", ErrNotMounted},
		"number 0":          {0, "/mnt/first", ErrNotMounted},
		"another place":     {first, "/mnt", ErrNotMounted},
		"something over it": {second, "/mnt/second", ErrNotMounted},
		"in a bind mount":   {first, "/mnt/over/first", ErrNotMounted},
		"missing":           {first, "/mnt/missing", ErrPathNotFound},
		"a link":            {first, "/proc/self/root/mnt/first", ErrPathIsLink},
	} {
		if err := Detach(n, testtarget.Alice, test.id, test.path); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
	if err := Detach(n, testtarget.Bob, first, "/mnt/first"); err == nil {
		t.Error("detached for bob")
	}
	if err := Detach(n, testtarget.Alice, first, "/mnt/first"); err != nil {
		t.Error(err)
	}
	p.Must("umount", "/mnt/second")
	if err := Detach(n, testtarget.Alice, second, "/mnt/second"); err != nil {
		t.Error(err)
	}
	if got := p.Mounted("bpf"); len(got) != 0 {
		t.Errorf("still mounted: %q", got)
	}
	// A mount in use goes, too.
	third := attach("/mnt/third")
	if _, files, err := p.Do("open", []string{"/mnt/third"}); err != nil {
		t.Error(err)
	} else {
		defer files[0].Close()
	}
	if err := Detach(n, testtarget.Alice, third, "/mnt/third"); err != nil {
		t.Error(err)
	}
	// The namespaces live as long as they are held, without any process.
	fourth := attach("/mnt/fourth")
	p.Kill()
	if err := Detach(n, testtarget.Alice, fourth, "/mnt/fourth"); err != nil {
		t.Errorf("after the process's end: %v", err)
	}
	if err := Detach(n, testtarget.Alice, fourth, "/mnt/fourth"); !errors.Is(err, ErrNotMounted) {
		t.Errorf("twice: got %v", err)
	}
}

// A container with ids of its own, none of which is its owner's, has a root.
func TestContainer(t *testing.T) {
	testtarget.NoLeaks(t)
	root := testtarget.NewContainer(t, testtarget.Alice).
		Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, Mapping: testtarget.Others})
	root.Must("tmpfs", "/mnt")
	root.Must("mkdir", "/mnt/root")
	root.Must("mkdir", "/mnt/root/bpf")
	n := namespacesOf(t, root)
	f := delegated(t, n, testtarget.Alice)
	for place, want := range map[[2]string]error{
		{"/mnt/root", "/mnt/root/bpf"}: ErrPathNotFound,
		{"/mnt/rot", "/bpf"}:           ErrPathNotFound,
		{"/mnt/root", "/../root/bpf"}:  ErrPathInvalid,
		{"mnt/root", "/bpf"}:           ErrPathInvalid,
		{"", "/bpf"}:                   ErrPathInvalid,
	} {
		if err := f.Attach(place[0], place[1]); !errors.Is(err, want) {
			t.Errorf("%q: got %v", place, err)
		}
	}
	if err := f.Attach("/mnt/root", "/bpf"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/mnt/root/bpf"}, root.Mounted("bpf")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	root.Must("mkdir", "/mnt/root/bpf/pinned")
	if err := Detach(n, testtarget.Alice, f.ID, "/mnt/root/bpf"); err != nil {
		t.Error(err)
	}
}
