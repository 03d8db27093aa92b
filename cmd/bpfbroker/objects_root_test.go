// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func init() { programs["print-maps"] = printMaps }

// printMaps is a command that was given maps: it prints of each its name, type
// and first value, and whether it can be written to.
func printMaps() {
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || len(names) != n {
		fmt.Println("wrong environment")
		os.Exit(1)
	}
	for i, name := range names {
		m, err := ebpf.NewMapFromFD(3 + i)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(name, m.Type(), os.Args[1:])
	}
	os.Exit(9)
}

func blob(t testing.TB, types map[string]btf.Type) string {
	t.Helper()
	b, err := btf.NewBuilder(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, typ := range types {
		if _, err := b.Add(&btf.Typedef{Name: name, Type: typ}); err != nil {
			t.Fatal(err)
		}
	}
	data, err := b.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(data)
}

// objectAnswers are of a broker that has real maps.
func objectAnswers(t *testing.T) func(request) any {
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	u64 := &btf.Int{Name: "unsigned long", Size: 8}
	char := &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}
	key := &btf.Struct{Name: "key", Size: 8, Members: []btf.Member{
		{Name: "color", Type: &btf.Enum{Size: 4, Values: []btf.EnumValue{{Name: "RED", Value: 1}}}},
		{Name: "name", Type: &btf.Array{Index: u32, Type: char, Nelems: 4}, Offset: 32},
	}}
	value := &btf.Struct{Name: "value", Size: 40, Members: []btf.Member{
		{Name: "n", Type: u64},
		{Name: "slots", Type: &btf.Array{Index: u32, Type: u64, Nelems: 4}, Offset: 64},
	}}
	types := blob(t, map[string]btf.Type{"key": key, "value": value})
	maps := map[string]*ebpf.Map{}
	var descriptions []any
	for _, m := range []struct {
		name, btf string
		spec      ebpf.MapSpec
	}{
		{"hash", types, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 40, MaxEntries: 100}},
		{"empty", types, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 40, MaxEntries: 100}},
		{"percpu", types, ebpf.MapSpec{Type: ebpf.PerCPUHash, KeySize: 8, ValueSize: 40, MaxEntries: 100}},
		{"unknown", "", ebpf.MapSpec{Type: ebpf.Hash, KeySize: 2, ValueSize: 1, MaxEntries: 1}},
		{"hostile", "AAAA", ebpf.MapSpec{Type: ebpf.Hash, KeySize: 2, ValueSize: 1, MaxEntries: 1}},
		{"other", types, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 2, ValueSize: 1, MaxEntries: 1}},
		{"ring", blob(t, map[string]btf.Type{"value": key}), ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())}},
	} {
		made, err := ebpf.NewMap(&m.spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = made.Close() })
		maps[m.name] = made
		descriptions = append(descriptions, map[string]any{
			"name": m.name, "type": strings.ToLower(m.spec.Type.String()), "access": []string{"read-only"},
			"keySize": m.spec.KeySize, "valueSize": m.spec.ValueSize, "maxEntries": m.spec.MaxEntries, "btf": m.btf,
		})
	}
	put := func(m string, color uint32, name string, values ...uint64) {
		key := binary.NativeEndian.AppendUint32(nil, color)
		key = append(key, name...)
		value := make([]uint64, 5)
		copy(value, values)
		var data any = value
		if maps[m].Type() == ebpf.PerCPUHash {
			cpus := make([][5]uint64, ebpf.MustPossibleCPU())
			for i := range cpus {
				cpus[i] = [5]uint64(value)
			}
			data = cpus
		}
		if err := maps[m].Put(key, data); err != nil {
			t.Fatal(err)
		}
	}
	put("hash", 10, "b\x00\x00\x00", 7)
	put("hash", 9, "b\x00\x00\x00", 7, 0, 1)
	put("hash", 1, "a\x1bz\x00", 1<<63, 1, 2, 3, 4)
	put("percpu", 1, "x\x00\x00\x00", 2, 0, 3)
	for _, name := range []string{"unknown", "hostile", "other"} {
		if err := maps[name].Put([]byte{1, 2}, []byte{3}); err != nil {
			t.Fatal(err)
		}
	}
	return func(r request) any {
		switch strings.TrimPrefix(r.Method, "org.bpfbroker.Broker.") {
		case "DescribeObject":
			return map[string]any{"object": map[string]any{"name": "o", "maps": descriptions}}
		case "OpenMap":
			name, _ := r.Parameters["map"].(string)
			wanted := map[bool]string{true: "consume", false: "read-only"}[name == "ring"]
			if r.Parameters["access"] != wanted && r.Parameters["access"] != "read-write" {
				return refusal{"NotOffered", "wrong access", "request", ""}
			}
			if maps[name] == nil {
				return refusal{"NoSuchMap", "no such map", "request", ""}
			}
			return withFile{map[string]any{"mapFileDescriptor": 0, "access": r.Parameters["access"], "warnings": []string{"it can be pinned"}}, maps[name].FD()}
		}
		return refusal{"Internal", r.Method, "request", ""}
	}
}

// TestObjectScripts runs testdata/objects/*.txtar against a broker with real
// maps.
func TestObjectScripts(t *testing.T) {
	f := newFake(t, objectAnswers(t))
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/objects",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE") != "",
		Setup: func(env *testscript.Env) error {
			env.Setenv(socketVariable, f.socket)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"status": status, "await": await},
	})
}

// await is the script command "await FILE": it waits until there is one.
func await(ts *testscript.TestScript, neg bool, args []string) {
	for range 1000 {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("waited in vain for %s", args[0])
}

// produce writes a record into a ring buffer, as a program does.
func produce(t *testing.T, ring *ebpf.Map, record string) {
	t.Helper()
	words := [2]uint32{binary.NativeEndian.Uint32([]byte(record)), binary.NativeEndian.Uint32([]byte(record[4:]))}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: asm.Instructions{
		asm.StoreImm(asm.RFP, -8, int64(words[0]), asm.Word),
		asm.StoreImm(asm.RFP, -4, int64(words[1]), asm.Word),
		asm.LoadMapPtr(asm.R1, ring.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -8),
		asm.Mov.Imm(asm.R3, 8),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 14)}); err != nil {
		t.Fatal(err)
	}
}

// TestWatch watches a ring buffer and a map.
func TestWatch(t *testing.T) {
	answer := objectAnswers(t)
	f := newFake(t, answer)
	opened := answer(request{Method: "OpenMap", Parameters: map[string]any{"map": "ring", "access": "consume"}}).(withFile)
	fd, err := unix.Dup(opened.fd)
	if err != nil {
		t.Fatal(err)
	}
	ring, err := ebpf.NewMapFromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"o/ring"}, "color=RED name=ab\ncolor=2 name=\"\"\ncolor=2 name=\"\\x1b c\"\n"},
		{[]string{"-j", "o/ring"}, `{"color":"RED","name":"ab"}` + "\n" + `{"color":2,"name":""}` + "\n" + `{"color":2,"name":"\u001b c"}` + "\n"},
		{[]string{"--json=short", "o/percpu"}, strings.Repeat(`[{"key":{"color":"RED","name":"x"},"values":[`+
			strings.TrimSuffix(strings.Repeat(`{"n":2,"slots":[0,3,0,0]},`, ebpf.MustPossibleCPU()), ",")+`]}]`+"\n", 2)},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			command := exec.Command("/proc/self/exe", append([]string{"-q", "object", "watch"}, test.args...)...)
			command.Args[0] = "bpfbroker"
			command.Env = append(os.Environ(), socketVariable+"="+f.socket)
			out, err := command.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			command.Stderr = os.Stderr
			if err := command.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = command.Wait() }()
			defer func() { _ = command.Process.Kill() }()
			timer := time.AfterFunc(20*time.Second, func() { _ = command.Process.Kill() })
			defer timer.Stop()
			if strings.Contains(test.args[len(test.args)-1], "ring") {
				for _, record := range []string{"\x01\x00\x00\x00ab\x00\x00", "\x02\x00\x00\x00\x00\x00\x00\x00", "\x02\x00\x00\x00\x1b c\x00"} {
					produce(t, ring, record)
				}
			}
			var got bytes.Buffer
			data := make([]byte, 4096)
			for got.Len() < len(test.want) {
				n, err := out.Read(data)
				got.Write(data[:n])
				if err != nil {
					break
				}
			}
			if got.String() != test.want {
				t.Errorf("got %q, want %q", got.String(), test.want)
			}
		})
	}
}
