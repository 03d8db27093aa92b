// SPDX-License-Identifier: Apache-2.0

//go:build root

package typed

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
)

func TestEntries(t *testing.T) {
	const entries = 3000
	for _, test := range []struct {
		kind      ebpf.MapType
		valueSize uint32
		flags     uint32
	}{
		{kind: ebpf.Hash, valueSize: 8},
		{kind: ebpf.Hash, valueSize: 3},
		{kind: ebpf.Array, valueSize: 8},
		{kind: ebpf.LRUHash, valueSize: 8},
		{kind: ebpf.PerCPUHash, valueSize: 3},
		{kind: ebpf.PerCPUArray, valueSize: 8},
		{kind: ebpf.LRUCPUHash, valueSize: 5},
		{kind: ebpf.LPMTrie, valueSize: 8, flags: 1},
		// So large that buckets of the table have more than is read at once.
		{kind: ebpf.Hash, valueSize: 128 << 10, flags: 1},
		{kind: ebpf.PerCPUHash, valueSize: 12 << 10},
	} {
		t.Run(test.kind.String(), func(t *testing.T) {
			max := uint32(entries)
			switch {
			case test.valueSize > 1000:
				max = 200
			case test.kind == ebpf.LRUHash, test.kind == ebpf.LRUCPUHash:
				max = 4 * entries // so that none goes
			}
			spec := &ebpf.MapSpec{Type: test.kind, KeySize: 4, ValueSize: test.valueSize, MaxEntries: max, Flags: test.flags}
			if test.kind == ebpf.LPMTrie {
				spec.KeySize = 8
			}
			m, err := ebpf.NewMap(spec)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			n := min(max, entries)
			for i := range n {
				key := binary.NativeEndian.AppendUint32(nil, i)
				if test.kind == ebpf.LPMTrie {
					key = append(binary.NativeEndian.AppendUint32(nil, 32), key...)
				}
				value := make([]byte, test.valueSize)
				copy(value, key[len(key)-4:])
				var values any = value
				if HasPerCPUValue(test.kind) {
					perCPU := make([][]byte, ebpf.MustPossibleCPU())
					for cpu := range perCPU {
						perCPU[cpu] = append([]byte(nil), value...)
						perCPU[cpu][2] = byte(cpu)
					}
					values = perCPU
				}
				if err := m.Put(key, values); err != nil {
					t.Fatal(err)
				}
			}
			seen := make(map[uint32]bool)
			for e, err := range Entries(m) {
				if err != nil {
					t.Fatal(err)
				}
				key := binary.NativeEndian.Uint32(e.Key[len(e.Key)-4:])
				want := 1
				if HasPerCPUValue(test.kind) {
					want = ebpf.MustPossibleCPU()
				}
				if len(e.Values) != want {
					t.Fatalf("%d values, want %d", len(e.Values), want)
				}
				for cpu, value := range e.Values {
					if len(value) != int(test.valueSize) || value[0] != byte(key) || value[1] != byte(key>>8) || want > 1 && value[2] != byte(cpu) {
						t.Fatalf("key %d has value %x on processor %d", key, value[:3], cpu)
					}
				}
				seen[key] = true
			}
			if len(seen) != int(n) {
				t.Errorf("%d entries, want %d", len(seen), n)
			}
			// Who has enough gets no more.
			for range Entries(m) {
				break
			}
		})
	}
}

func TestNoEntries(t *testing.T) {
	for _, spec := range []*ebpf.MapSpec{
		{Type: ebpf.Queue, ValueSize: 4, MaxEntries: 1},
		{Type: ebpf.RingBuf, MaxEntries: 4096},
		{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1},
	} {
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		for e, err := range Entries(m) {
			if err == nil {
				t.Errorf("%v: got %v", spec.Type, e)
			}
		}
	}
}
