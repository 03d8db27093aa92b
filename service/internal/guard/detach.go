// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/bpfbroker/bpfbroker/bpf"
)

// Attachment is a program of a grant's that is attached to something.
type Attachment struct {
	Grant   uint64
	Program ebpf.ProgramID
	// How is the kind of the link, in the kernel's words, or "cgroup" for a
	// control group without one.
	How string
}

// Detach detaches the programs of revoked grants: ends the links that can be
// ended from outside, and takes programs without a link from the control
// groups. It returns the rest: attached until the last holder and pin of the
// link end. Programs that are attached by netlink to a network namespace's
// devices, or to a socket, are not found. It stops where the context ends, with
// its error. Needs CAP_SYS_ADMIN in the initial user namespace.
func (g *Guard) Detach(ctx context.Context, grants ...uint64) (rest []Attachment, err error) {
	programs, err := g.programs(grants)
	if err != nil || len(programs) == 0 {
		return nil, err
	}
	rest, err = detachLinks(ctx, programs)
	if err != nil {
		return rest, err
	}
	more, err := detachFromCgroups(ctx, programs)
	return append(rest, more...), err
}

// Programs returns the ids of a grant's programs.
func (g *Guard) Programs(grant uint64) (map[uint32]bool, error) {
	programs, err := g.programs([]uint64{grant})
	ids := map[uint32]bool{}
	for id := range programs {
		ids[uint32(id)] = true
	}
	return ids, err
}

// programs finds the programs of grants, and whose each is. One that has never
// had a descriptor isn't among them, and attached nowhere.
func (g *Guard) programs(grants []uint64) (map[ebpf.ProgramID]uint64, error) {
	wanted := map[uint64]bool{}
	for _, id := range grants {
		// Most have none any more, and that is all there is to be done.
		if usage, err := g.Usage(id); err == nil && usage.Programs > 0 {
			wanted[id] = true
		}
	}
	found := map[ebpf.ProgramID]uint64{}
	if len(wanted) == 0 {
		return found, nil
	}
	// A batch isn't sent back to the start by what is removed meanwhile.
	var cursor ebpf.MapBatchCursor
	keys, objects := make([]uint64, 4096), make([]bpf.GuardObject, 4096)
	for {
		n, err := g.maps.Objects.BatchLookup(&cursor, keys, objects, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("cannot read the guard's objects: %w", err)
		}
		for _, o := range objects[:n] {
			if o.Id != 0 && wanted[o.Grant] {
				found[ebpf.ProgramID(o.Id)] = o.Grant
			}
		}
		if err != nil {
			return found, nil
		}
	}
}

func detachLinks(ctx context.Context, programs map[ebpf.ProgramID]uint64) (rest []Attachment, err error) {
	var links link.Iterator
	defer links.Close()
	for links.Next() {
		if ctx.Err() != nil {
			return rest, ctx.Err()
		}
		info, err := links.Link.Info()
		if err != nil {
			continue // a kind that the library doesn't know
		}
		grant, ours := programs[info.Program]
		if !ours {
			continue
		}
		// Whatever the error is, one link mustn't save the others.
		if links.Link.Detach() != nil {
			rest = append(rest, Attachment{grant, info.Program, linkName(info.Type)})
		}
	}
	if err := links.Err(); err != nil {
		return rest, fmt.Errorf("cannot list links: %w", err)
	}
	return rest, nil
}

// linkNames are those of enum bpf_link_type (include/uapi/linux/bpf.h), of the
// links that can't be ended from outside.
var linkNames = map[link.Type]string{
	link.RawTracepointType: "raw tracepoint",
	link.TracingType:       "tracing",
	link.IterType:          "iter",
	link.PerfEventType:     "perf event",
	link.KprobeMultiType:   "kprobe multi",
	link.StructOpsType:     "struct_ops",
	link.UprobeMultiType:   "uprobe multi",
}

func linkName(kind link.Type) string {
	if name := linkNames[kind]; name != "" {
		return name
	}
	return fmt.Sprintf("kind %d", kind)
}

// cgroupAttachments are where programs of a type can be in a control group.
var cgroupAttachments = map[ebpf.ProgramType][]ebpf.AttachType{
	ebpf.CGroupSKB:     {ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress},
	ebpf.CGroupSock:    {ebpf.AttachCGroupInetSockCreate, ebpf.AttachCgroupInetSockRelease, ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind},
	ebpf.SockOps:       {ebpf.AttachCGroupSockOps},
	ebpf.CGroupDevice:  {ebpf.AttachCGroupDevice},
	ebpf.CGroupSysctl:  {ebpf.AttachCGroupSysctl},
	ebpf.CGroupSockopt: {ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSetsockopt},
	ebpf.CGroupSockAddr: {
		ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind,
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCgroupUnixConnect,
		ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCgroupUnixSendmsg,
		ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg, ebpf.AttachCgroupUnixRecvmsg,
		ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername, ebpf.AttachCgroupUnixGetpeername,
		ebpf.AttachCgroupInet4GetSockname, ebpf.AttachCgroupInet6GetSockname, ebpf.AttachCgroupUnixGetsockname,
	},
}

// cgroupRoot is where systemd has the unified hierarchy.
const cgroupRoot = "/sys/fs/cgroup"

// maxCgroups is how many control groups are searched: users can make as many
// as they like of their own.
const maxCgroups = 1 << 16

// detachFromCgroups takes programs from control groups that are attached there
// without a link, which nothing leads to.
func detachFromCgroups(ctx context.Context, programs map[ebpf.ProgramID]uint64) (rest []Attachment, err error) {
	kinds := map[ebpf.AttachType]bool{}
	for id := range programs {
		program, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it has gone
		}
		for _, attach := range cgroupAttachments[program.Type()] {
			kinds[attach] = true
		}
		_ = program.Close()
	}
	if len(kinds) == 0 {
		return nil, nil
	}
	searched := 0
	err = filepath.WalkDir(cgroupRoot, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil || !entry.IsDir():
			return nil // it has gone
		}
		if searched++; searched > maxCgroups {
			return errors.New("there are too many control groups")
		}
		rest = append(rest, detachFromCgroup(path, kinds, programs)...)
		return nil
	})
	if err != nil {
		return rest, fmt.Errorf("cannot search the control groups: %w", err)
	}
	return rest, nil
}

func detachFromCgroup(path string, kinds map[ebpf.AttachType]bool, programs map[ebpf.ProgramID]uint64) (rest []Attachment) {
	dir, err := os.Open(path)
	if err != nil {
		return nil // it has gone
	}
	defer dir.Close()
	for kind := range kinds {
		attached, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: kind})
		if err != nil {
			continue // this kernel hasn't got it
		}
		for _, a := range attached.Programs {
			grant, ours := programs[a.ID]
			if !ours {
				continue
			}
			program, err := ebpf.NewProgramFromID(a.ID)
			if err != nil {
				continue // it has gone
			}
			err = link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: program, Attach: kind})
			_ = program.Close()
			if err != nil {
				rest = append(rest, Attachment{grant, a.ID, "cgroup"})
			}
		}
	}
	return rest
}
