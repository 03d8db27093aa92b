// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// TestMoved loads programs that the kernel moves in its memory, after the guard
// has seen them: for the space that inlined helpers need, and for hardening.
func TestMoved(t *testing.T) {
	g := open(t)
	const harden = "/proc/sys/net/core/bpf_jit_harden"
	t.Cleanup(func() {
		if err := os.WriteFile(harden, []byte("0"), 0); err != nil {
			t.Error(err)
		}
	})
	grows := program{Type: typeSocketFilter}
	for range 500 {
		grows.Instructions = append(grows.Instructions, helper(118)) // jiffies64
	}
	grows.Instructions = append(grows.Instructions, zero, exit)
	for name, test := range map[string]struct {
		program program
		harden  string
	}{
		"grows":    {grows, "0"},
		"hardened": {program{Type: typeSocketFilter, Instructions: []uint64{0x12345678_000000b7, zero, exit}}, "2"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(harden, []byte(test.harden), 0); err != nil {
				t.Fatal(err)
			}
			target := testtarget.New(t, testtarget.Alice)
			p := everything()
			p.MaxPrograms = 1
			id := grant(t, g, target, p)
			expect(t, target, 0, "load", loading(test.program))
			expect(t, target, unix.EPERM, "load", loading(test.program))
			programs, err := g.programs([]uint64{id})
			if err != nil || len(programs) != 1 {
				t.Errorf("got the programs %v, %v", programs, err)
			}
			_, files, err := target.Do("give", nil)
			if err != nil || len(files) != 1 {
				t.Fatalf("got %d files, %v", len(files), err)
			}
			bob := testtarget.Start(t, testtarget.Attr{UID: testtarget.Bob})
			expect(t, bob, 0, "hold", nil, files...)
			if got := bob.Must("programs"); got != "0" {
				t.Errorf("a stranger has received %s programs", got)
			}
			_ = files[0].Close()
			expect(t, target, 0, "drop", nil)
			testtarget.Eventually(t, "all is given back", func() bool {
				usage, err := g.Usage(id)
				return err == nil && usage == Usage{Tokens: 1}
			})
			expect(t, target, 0, "dropall", nil)
		})
	}
}
