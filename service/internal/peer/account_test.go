// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// All subordinate uids of one user count as one.
func TestAccount(t *testing.T) {
	t.Parallel()
	r := ranges{path: filepath.Join(t.TempDir(), "subuid")}
	if got := r.account(100001); got != 100001 {
		t.Errorf("without the file: %d", got)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(r.path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("# comment\nalice:100000:65536\nbob:165536:65536\nalice:300000:10\n\nx:y:z\nx:1\ncarol:-1:5\ncarol:4294967290:4294967295\ndave:0:10\nerin:5000:0\n")
	for uid, want := range map[uint32]uint32{
		0: 0, 1000: 1000, 99999: 99999, 100000: 100000, 100001: 100000, 165535: 100000, 165536: 165536, 231071: 165536, 231072: 231072,
		299999: 299999, 300000: 100000, 300009: 100000, 300010: 300010, 4294967289: 4294967289, 4294967290: 4294967290, 4294967295: 4294967290,
		5: 0, 5000: 5000,
	} {
		if got := r.account(uid); got != want {
			t.Errorf("%d counts by %d, not by %d", uid, got, want)
		}
	}
	write("bob:100000:65536\n")
	if got := r.account(300001); got != 300001 {
		t.Errorf("after an edit: %d", got)
	}
	write(strings.Repeat("#", maxRanges) + "\nbob:100000:65536\n")
	if got := r.account(100001); got != 100001 {
		t.Errorf("beyond the limit: %d", got)
	}
	// The same length at another time.
	write("bob:100000:65536\n")
	_ = r.account(100001)
	write("bob:200000:65536\n")
	if err := os.Chtimes(r.path, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := r.account(200001); got != 200000 {
		t.Errorf("after an edit of the same length: %d", got)
	}
}

// It is asked at each connection.
func BenchmarkAccount(b *testing.B) {
	r := ranges{path: filepath.Join(b.TempDir(), "subuid")}
	if err := os.WriteFile(r.path, []byte(strings.Repeat("alice:100000:65536\n", 1000)), 0o644); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		_ = r.account(1000)
	}
}
