// SPDX-License-Identifier: Apache-2.0

package typed

import (
	"errors"
	"fmt"
	"iter"
	"reflect"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
)

// Entry is a key and its value as they are in a map. Values has one value, or
// in a per-CPU map one for each possible processor. They are good until the
// next Entry comes.
type Entry struct {
	Key    []byte
	Values [][]byte
}

// batchBytes is about how much is read from a map with one system call.
const batchBytes = 256 << 10

// Entries reads a map's entries, many with each system call where the kernel
// can do that (5.6 for most types). What changes meanwhile may be missing or be
// there twice. After an error there is nothing more. The map needs to be
// readable and to be of a type whose entries have bytes for values: others give
// an error. It stays the caller's.
func Entries(m *ebpf.Map) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if m.KeySize() == 0 {
			yield(Entry{}, fmt.Errorf("cannot read the map: a %v has no entries", m.Type()))
			return
		}
		r := reader{m: m, values: 1, stride: int(m.ValueSize())}
		if HasPerCPUValue(m.Type()) {
			n, err := ebpf.PossibleCPU()
			if err != nil {
				yield(Entry{}, fmt.Errorf("cannot count processors: %w", err))
				return
			}
			r.values, r.stride = n, (r.stride+7)&^7
		}
		r.entry.Values = make([][]byte, r.values)
		err := r.batches(yield)
		// Not for this type, or a bucket of the hash table has more than were
		// asked for. Of an unprivileged caller's failures cilium/ebpf takes most
		// for the first.
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, syscall.ENOSPC) {
			err = r.single(yield)
		}
		if err != nil && !errors.Is(err, errEnough) {
			yield(Entry{}, fmt.Errorf("cannot read the map: %w", err))
		}
	}
}

// HasPerCPUValue says whether maps of a type have a value for each processor.
func HasPerCPUValue(t ebpf.MapType) bool {
	switch t {
	case ebpf.PerCPUHash, ebpf.PerCPUArray, ebpf.LRUCPUHash, ebpf.PerCPUCGroupStorage:
		return true
	}
	return false
}

// errEnough says that the reader wants no more.
var errEnough = errors.New("enough")

type reader struct {
	m      *ebpf.Map
	values int // with each key
	stride int // from one value to the next
	entry  Entry
}

func (r *reader) yield(key, values []byte, yield func(Entry, error) bool) error {
	r.entry.Key = key
	for i := range r.entry.Values {
		start := i * r.stride
		r.entry.Values[i] = values[start : start+int(r.m.ValueSize())]
	}
	if !yield(r.entry, nil) {
		return errEnough
	}
	return nil
}

// slice returns memory for n elements of a size, as a slice of arrays, which
// cilium/ebpf needs to count them, and as bytes.
func slice(n, size int) (elements any, data []byte) {
	t := reflect.ArrayOf(size, reflect.TypeFor[byte]())
	s := reflect.MakeSlice(reflect.SliceOf(t), n, n)
	return s.Interface(), unsafe.Slice((*byte)(s.UnsafePointer()), n*size)
}

func (r *reader) batches(yield func(Entry, error) bool) error {
	keySize, valueSize := int(r.m.KeySize()), r.values*r.stride
	n := max(1, min(batchBytes/(keySize+valueSize), int(r.m.MaxEntries())))
	keys, keyData := slice(n, keySize)
	values, valueData := slice(n, valueSize)
	var cursor ebpf.MapBatchCursor
	for {
		got, err := r.m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return err
		}
		for i := range got {
			if err := r.yield(keyData[i*keySize:(i+1)*keySize], valueData[i*valueSize:], yield); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
	}
}

// single reads one entry with two system calls.
func (r *reader) single(yield func(Entry, error) bool) error {
	key := make([]byte, r.m.KeySize())
	value := make([]byte, r.values*r.stride)
	var perCPU any
	if HasPerCPUValue(r.m.Type()) {
		perCPU, value = slice(r.values, int(r.m.ValueSize()))
		r.stride = int(r.m.ValueSize())
	}
	for entries := r.m.Iterate(); ; {
		var more bool
		if perCPU != nil {
			more = entries.Next(&key, perCPU)
		} else {
			more = entries.Next(&key, &value)
		}
		if !more {
			return entries.Err()
		}
		if err := r.yield(key, value, yield); err != nil {
			return err
		}
	}
}
