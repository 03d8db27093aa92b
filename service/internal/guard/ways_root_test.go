// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// What the matrix attaches that takes more than a program and a target.

// Functions, for programs that replace others' (ext).

// typedFunction is the number of "int function(struct xdp_md *)" in typedTypes.
const typedFunction = 3

// typedTypes loads the types of a function that can be replaced.
func typedTypes() (int, error) {
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	packet := &btf.Struct{Name: "xdp_md", Size: 4, Members: []btf.Member{{Name: "data", Type: number}}}
	function := &btf.Func{
		Name: "function", Linkage: btf.GlobalFunc,
		Type: &btf.FuncProto{Return: number, Params: []btf.FuncParam{{Name: "packet", Type: &btf.Pointer{Target: packet}}}},
	}
	builder, err := btf.NewBuilder([]btf.Type{number, packet}, nil)
	if err != nil {
		return -1, err
	}
	if id, err := builder.Add(function); err != nil || id != typedFunction {
		return -1, fmt.Errorf("the function is number %d: %w", id, err)
	}
	data, err := builder.Marshal(nil, &btf.MarshalOptions{Order: binary.NativeEndian})
	if err != nil {
		return -1, err
	}
	attr := struct {
		types           *byte
		log             uint64
		size, logSize   uint32
		level, trueSize uint32
		flags, token    uint32
	}{types: &data[0], size: uint32(len(data))}
	attr.token, attr.flags = tokenFD()
	fd, err := call(18, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(data)
	return fd, err
}

// loadReplaceable loads a program whose function can be replaced.
func loadReplaceable() (int, error) {
	types, err := typedTypes()
	if err != nil {
		return -1, err
	}
	defer unix.Close(types)
	return load(program{Type: typeXDP, Attach: attachXDP, Instructions: []uint64{2<<32 | 0xb7, exit}, Types: uint32(types)})
}

// replaceable is a program of the process's own with such a function, which it
// keeps.
func replaceable() int {
	if ownReplaceable == 0 {
		fd, err := loadReplaceable()
		if err != nil {
			panic(err)
		}
		held.programs = append(held.programs, fd)
		ownReplaceable = fd
	}
	return ownReplaceable
}

var ownReplaceable int

// Congestion control, which is what struct_ops are tried with.

// congestion is where the kernel has what of tcp_congestion_ops.
type congestion struct {
	Value, Size uint32 // the type of the map's value, and its size
	Type        uint32
	Name        uint32
	Members     map[uint32]uint32 // offsets in the value, of those that must be there, by their place among the members
}

func findCongestion(t *testing.T, types *btf.Spec) (c congestion) {
	t.Helper()
	var ops, value *btf.Struct
	if err := types.TypeByName("tcp_congestion_ops", &ops); err != nil {
		t.Fatal(err)
	}
	if err := types.TypeByName("bpf_struct_ops_tcp_congestion_ops", &value); err != nil {
		t.Fatal(err)
	}
	id := func(s *btf.Struct) uint32 {
		id, err := types.TypeID(s)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(id)
	}
	c = congestion{Type: id(ops), Value: id(value), Size: value.Size, Members: map[uint32]uint32{}}
	data := value.Members[1].Offset.Bytes()
	for i, m := range ops.Members {
		switch m.Name {
		case "ssthresh", "cong_avoid", "undo_cwnd":
			c.Members[uint32(i)] = data + m.Offset.Bytes()
		case "name":
			c.Name = data + m.Offset.Bytes()
		}
	}
	return c
}

// newMap makes a map for a congestion control, to be linked or not.
func (c congestion) newMap(linked bool) (int, error) {
	types, err := typedTypes()
	if err != nil {
		return -1, err
	}
	defer unix.Close(types)
	attr := struct {
		kind, key, value, entries, flags uint32
		_                                [7]uint32
		types, keyType, valueType        uint32
		kernelType                       uint32
		_                                [3]uint32
		token                            uint32
	}{kind: 26, key: 4, value: c.Size, entries: 1, types: uint32(types), kernelType: c.Value}
	attr.token, attr.flags = tokenFD()
	if linked {
		attr.flags |= 1 << 13 // BPF_F_LINK
	}
	return call(0, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// fill loads programs for a congestion control and puts them into its map. That
// registers it, if the map isn't to be linked.
func (c congestion) fill(fd int, name string) error {
	value := make([]byte, c.Size)
	for member, offset := range c.Members {
		p, err := load(program{Type: typeStructOps, Attach: member, BTF: c.Type, Instructions: []uint64{one, exit}})
		if err != nil {
			return err
		}
		defer unix.Close(p)
		binary.NativeEndian.PutUint64(value[offset:], uint64(p))
	}
	copy(value[c.Name:], name)
	return updateElement(fd, value)
}

// element is what MAP_UPDATE_ELEM and MAP_DELETE_ELEM read.
type element struct {
	fd, _ uint32
	key   *uint32
	value *byte
	flags uint64
}

func updateElement(fd int, value []byte) error {
	attr := element{fd: uint32(fd), key: new(uint32), value: &value[0]}
	_, err := call(2, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(value)
	return err
}

func deleteElement(fd int) error {
	attr := element{fd: uint32(fd), key: new(uint32)}
	_, err := call(3, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

// make makes a map that is ready to be linked.
func (c congestion) make(name string) (int, error) {
	fd, err := c.newMap(true)
	if err != nil {
		return -1, err
	}
	if err := c.fill(fd, name); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// register has a map attach a congestion control without a link.
func (c congestion) register() error {
	fd, err := c.newMap(false)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := c.fill(fd, "hostile"); err != nil {
		return err
	}
	return deleteElement(fd)
}

func linkMap(fd int) (int, error) { return createLink(uint32(fd), 0, attachStructOps) }

// updateLink puts a program, or a map, in the place of a link's.
func updateLink(link, with int) error {
	attr := struct{ link, with, flags, old uint32 }{link: uint32(link), with: uint32(with)}
	_, err := call(29, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

// putIntoMap puts an XDP program into a map of devices or processors.
func putIntoMap(kind uint32, p int) error {
	attr := struct {
		kind, key, value, entries, flags uint32
		_                                [14]uint32
		token                            uint32
	}{kind: kind, key: 4, value: 8, entries: 1}
	attr.token, attr.flags = tokenFD()
	fd, err := call(0, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// The first is the device, or the length of the queue.
	return updateElement(fd, binary.NativeEndian.AppendUint32([]byte{1, 0, 0, 0}, uint32(p)))
}

// attachToSocket attaches a program to a socket, as a filter or to choose among
// those of a port.
func attachToSocket(p int, option int) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	if err := unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		return err
	}
	return unix.SetsockoptInt(socket, unix.SOL_SOCKET, option, p)
}

// Netlink.

const netkitName = "netkit0"

// netkit is the number of the network namespace's netkit device, or 0.
func netkit() uint32 {
	device, err := net.InterfaceByName(netkitName)
	if err != nil {
		return 0
	}
	return uint32(device.Index)
}

// equipNetwork gives the process's network namespace what is attached to there
// that it hasn't got by itself.
func equipNetwork() error {
	// struct ifinfomsg
	up := binary.NativeEndian.AppendUint32(make([]byte, 4), 1)
	up = binary.NativeEndian.AppendUint32(up, unix.IFF_UP)
	up = binary.NativeEndian.AppendUint32(up, unix.IFF_UP)
	if err := netlink(unix.RTM_NEWLINK, 0, up); err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	binary.NativeEndian.PutUint32(up[4:], 0)
	device := slices.Concat(up, attribute(unix.IFLA_IFNAME, netkitName+"\x00"),
		attribute(unix.IFLA_LINKINFO, attribute(unix.IFLA_INFO_KIND, "netkit")))
	if err := netlink(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, device); err != nil {
		return fmt.Errorf("cannot make a netkit device: %w", err)
	}
	// Where a clsact qdisc is, tc's filters can be.
	qdisc := slices.Concat(trafficControl(0xffff0000, 0xfffffff1, 0), attribute(unix.TCA_KIND, "clsact\x00"))
	if err := netlink(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL, qdisc); err != nil {
		return fmt.Errorf("cannot make a qdisc: %w", err)
	}
	return nil
}

// attachByNetlink attaches a program to what the network namespace has, and
// detaches it again.
func attachByNetlink(kind uint32, p int) error {
	fd := binary.NativeEndian.AppendUint32(nil, uint32(p))
	word := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	switch kind {
	case typeXDP:
		set := func(fd []byte) error {
			device := binary.NativeEndian.AppendUint32(make([]byte, 4), 1)
			return netlink(unix.RTM_SETLINK, 0, slices.Concat(device, make([]byte, 8),
				attribute(unix.IFLA_XDP|unix.NLA_F_NESTED, attribute(unix.IFLA_XDP_FD, fd), attribute(unix.IFLA_XDP_FLAGS, word(unix.XDP_FLAGS_SKB_MODE)))))
		}
		if err := set(fd); err != nil {
			return err
		}
		return set(word(1<<32 - 1))
	case typeSchedCLS, typeSchedAct:
		const priority, everything = 1 << 16, 3 << 8                            // ETH_P_ALL
		options := slices.Concat(attribute(6, fd), attribute(7, "hostile\x00")) // TCA_BPF_FD, TCA_BPF_NAME
		if kind == typeSchedAct {
			// An action of a filter that lets everything pass: TCA_BPF_OPS_LEN, TCA_BPF_OPS, and TCA_BPF_ACT with TCA_ACT_KIND
			// and TCA_ACT_OPTIONS, which are TCA_ACT_BPF_PARMS, TCA_ACT_BPF_FD, TCA_ACT_BPF_NAME
			action := slices.Concat(attribute(2, make([]byte, 20)), attribute(5, fd), attribute(6, "hostile\x00"))
			options = slices.Concat(attribute(4, []byte{1, 0}), attribute(5, []byte{6, 0, 0, 0, 255, 255, 255, 255}),
				attribute(1, attribute(1, attribute(1, "bpf\x00"), attribute(2, action))))
		}
		filter := slices.Concat(trafficControl(0, 0xfffffff2, priority|everything), attribute(unix.TCA_KIND, "bpf\x00"), attribute(unix.TCA_OPTIONS, options))
		if err := netlink(unix.RTM_NEWTFILTER, create, filter); err != nil {
			return err
		}
		return netlink(unix.RTM_DELTFILTER, 0, trafficControl(0, 0xfffffff2, priority|everything))
	case typeLWTIn, typeLWTOut, typeLWTXmit, typeLWTSeg6Local:
		// LWT_BPF_IN, _OUT, _XMIT
		way := map[uint32]uint16{typeLWTIn: 1, typeLWTOut: 2, typeLWTXmit: 3}[kind]
		program := slices.Concat(attribute(1, fd), attribute(2, "hostile\x00"))
		family, length, address := byte(unix.AF_INET), byte(24), []byte{192, 0, 2, 0}
		encapsulation, options := uint16(6), attribute(way|unix.NLA_F_NESTED, program) // LWTUNNEL_ENCAP_BPF
		if kind == typeLWTSeg6Local {
			family, length, address = unix.AF_INET6, 64, net.ParseIP("2001:db8::")
			// LWTUNNEL_ENCAP_SEG6_LOCAL, SEG6_LOCAL_ACTION, SEG6_LOCAL_ACTION_END_BPF, SEG6_LOCAL_BPF
			encapsulation, options = 7, slices.Concat(attribute(1, word(15)), attribute(8|unix.NLA_F_NESTED, program))
		}
		route := slices.Concat([]byte{family, length, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, 0, 0, 0, 0},
			attribute(unix.RTA_DST, []byte(address)), attribute(unix.RTA_OIF, word(netkit())),
			attribute(unix.RTA_ENCAP_TYPE, binary.NativeEndian.AppendUint16(nil, encapsulation)),
			attribute(unix.RTA_ENCAP|unix.NLA_F_NESTED, options))
		if err := netlink(unix.RTM_NEWROUTE, create, route); err != nil {
			return err
		}
		return netlink(unix.RTM_DELROUTE, 0, route)
	}
	return unix.EOPNOTSUPP
}

// trafficControl is a struct tcmsg about lo.
func trafficControl(handle, parent, info uint32) []byte {
	m := binary.NativeEndian.AppendUint32(make([]byte, 4), 1)
	for _, word := range []uint32{handle, parent, info} {
		m = binary.NativeEndian.AppendUint32(m, word)
	}
	return m
}

// attribute is one of netlink's, made of strings and bytes.
func attribute[T string | []byte](kind uint16, parts ...T) []byte {
	var content []byte
	for _, part := range parts {
		content = append(content, part...)
	}
	a := binary.NativeEndian.AppendUint16(nil, uint16(4+len(content)))
	a = binary.NativeEndian.AppendUint16(a, kind)
	a = append(a, content...)
	return append(a, make([]byte, -len(a)&3)...)
}

// netlink has the kernel do something, and returns its error.
func netlink(kind, flags uint16, body []byte) error {
	socket, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m = append(append(m, make([]byte, 8)...), body...)
	if err := unix.Sendto(socket, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(socket, answer, 0)
		if err != nil || n < unix.NLMSG_HDRLEN+4 {
			return fmt.Errorf("no answer: %w", err)
		}
		if binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
			continue
		}
		if errno := -int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); errno != 0 {
			return unix.Errno(errno)
		}
		return nil
	}
}

// loadModules loads those that the machine's maker has put there.
func loadModules(t *testing.T) {
	t.Helper()
	modules, err := filepath.Glob("/modules/*")
	if err != nil || len(modules) == 0 {
		t.Fatalf("got %d modules, %v", len(modules), err)
	}
	for _, path := range modules {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.FinitModule(int(f.Fd()), "", unix.MODULE_INIT_COMPRESSED_FILE)
		_ = f.Close()
		if err != nil && err != unix.EEXIST {
			t.Fatalf("%s: %v", path, err)
		}
	}
}
