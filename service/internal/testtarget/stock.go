// SPDX-License-Identifier: Apache-2.0

package testtarget

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stock is what a process could leak: its file descriptors, with what they
// lead to, and its children, zombies too.
type stock map[string]string

func takeStock() stock {
	s := stock{}
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		// The one that lists the directory is closed by now.
		if link, err := os.Readlink(fd); err == nil {
			s["descriptor "+filepath.Base(fd)] = link
		}
	}
	for pid, state := range children(os.Getpid()) {
		s["child "+strconv.Itoa(pid)] = state
	}
	return s
}

// children returns the states of a process's children.
func children(parent int) map[int]string {
	found := map[int]string{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		data, err := os.ReadFile(stat)
		if err != nil {
			continue // it has gone
		}
		pid, rest, _ := strings.Cut(string(data), " ")
		// A command may have any name.
		fields := strings.Fields(rest[strings.LastIndex(rest, ")")+1:])
		if fields[1] == strconv.Itoa(parent) {
			n, _ := strconv.Atoi(pid)
			found[n] = fields[0]
		}
	}
	return found
}

// wait waits until there is nothing that wasn't there, and says what remains.
func (s stock) wait() string {
	var leaks []string
	for range 100 {
		leaks = nil
		now := takeStock()
		for _, key := range slices.Sorted(maps.Keys(now)) {
			if _, child := strings.CutPrefix(key, "child "); now[key] != s[key] && (!child || s[key] == "") {
				leaks = append(leaks, fmt.Sprintf("%s: %s", key, now[key]))
			}
		}
		if leaks == nil {
			return ""
		}
		time.Sleep(20 * time.Millisecond)
	}
	return "leaked: " + strings.Join(leaks, "; ")
}

// NoLeaks fails the test if, in the end, its process has file descriptors or
// children that it hasn't got now. It is for tests that run alone.
func NoLeaks(t testing.TB) {
	t.Helper()
	before := takeStock()
	t.Cleanup(func() {
		if leaks := before.wait(); leaks != "" {
			t.Error(leaks)
		}
	})
}

// ReapOrphans reaps the ended ones among the children that the test's process
// has got from others, as a subreaper, and returns how many are left. Its own
// are known by having been started here.
func ReapOrphans(t testing.TB) int {
	t.Helper()
	left := 0
	for pid := range children(os.Getpid()) {
		if _, own := started.Load(pid); own {
			continue
		}
		if got, err := unix.Wait4(pid, nil, unix.WALL|unix.WNOHANG, nil); err == nil && got == 0 {
			left++
		}
	}
	return left
}

// started has the pids of the processes that start started.
var started sync.Map

// warmUp has the runtime open what it opens once and for all.
func warmUp() {
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	_ = r.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, _ = r.Read(make([]byte, 1))
	_, _ = r.Close(), w.Close()
}

// Mounts returns the mount points of a process, as /proc/PID/mountinfo has
// them.
func (p *Process) Mounts() []string {
	p.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.PID))
	if err != nil {
		p.t.Fatal(err)
	}
	var mounts []string
	for line := range strings.Lines(string(data)) {
		mounts = append(mounts, strings.TrimSpace(line))
	}
	return mounts
}

// Mounted returns those of a type, by their mount points.
func (p *Process) Mounted(kind string) []string {
	p.t.Helper()
	var points []string
	for _, line := range p.Mounts() {
		before, after, _ := strings.Cut(line, " - ")
		if strings.Fields(after)[0] == kind {
			points = append(points, strings.Fields(before)[4])
		}
	}
	return points
}
