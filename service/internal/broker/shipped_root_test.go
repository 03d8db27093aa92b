// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

package broker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// The shipped profiles, with what their drop-in would say, are of a kind that
// this kernel grants.
func TestShippedProfiles(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	shipped, err := filepath.Glob("../../../packaging/profiles/*.profile")
	if err != nil || len(shipped) < 4 {
		t.Fatalf("profiles %q, %v", shipped, err)
	}
	var names []string
	for _, path := range shipped {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		base := filepath.Base(path)
		names = append(names, strings.TrimSuffix(base, ".profile"))
		dropIn := filepath.Join(f.profiles, base+".d")
		if err := os.Mkdir(dropIn, 0o755); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string][]byte{filepath.Join(f.profiles, base): text, dropIn + "/guard.conf": []byte("[Profile]\nGuard=optional\n")} {
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	f.SetProfiles(f.load())
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	for _, name := range append(names, "any") {
		_, mount, err := f.AcquireToken(t.Context(), c, name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		mount.Close()
	}
}
