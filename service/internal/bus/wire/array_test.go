// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

type row struct {
	Path   dbus.ObjectPath
	Name   string
	Number uint32
	Large  uint64
}

// An array is encoded as godbus does it.
func TestArray(t *testing.T) {
	rows := []row{}
	a := NewArray("osut", 0)
	for i := range 20 {
		encode := func(rows any) []byte {
			data, fds, err := encode(message(dbus.TypeMethodReply, ":1.1", map[dbus.HeaderField]any{dbus.FieldReplySerial: uint32(i)}, rows))
			if err != nil || len(fds) != 0 {
				t.Fatal(err, fds)
			}
			// The fields before the body are in any order.
			body := int(binary.LittleEndian.Uint32(data[4:]))
			h, err := parseHead(data)
			if err == nil {
				err = h.readRest(bufio.NewReader(bytes.NewReader(data[headLen:])))
			}
			if err != nil || h.Size != len(data) || h.Signature != "a(osut)" {
				t.Fatalf("%d bytes: %+v, %v", len(data), h, err)
			}
			return data[len(data)-body:]
		}
		if diff := cmp.Diff(encode(rows), encode(a)); diff != "" {
			t.Errorf("%d rows (-godbus +ours):\n%s", i, diff)
		}
		r := row{dbus.ObjectPath("/x" + strings.Repeat("y", i)), strings.Repeat("ä", 2*i), uint32(i), uint64(i) << 60}
		rows = append(rows, r)
		a.Struct()
		a.String(string(r.Path))
		a.String(r.Name)
		a.Uint32(r.Number)
		a.Uint64(r.Large)
	}
}

func BenchmarkArray(b *testing.B) {
	for b.Loop() {
		a := NewArray("osut", 0)
		for range 10_000 {
			a.Struct()
			a.String("/org/bpfbroker/Broker1/grant/0123456789abcdef")
			a.String("machine-command.service, network, unlimited, /sys/fs/bpf")
			a.Uint32(1)
			a.Uint64(2)
		}
		if _, _, err := encode(message(dbus.TypeMethodReply, ":1.1", map[dbus.HeaderField]any{dbus.FieldReplySerial: uint32(1)}, a)); err != nil {
			b.Fatal(err)
		}
	}
}
