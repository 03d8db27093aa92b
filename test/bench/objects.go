// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
)

// published is an object with an array in it, which alice may read.
const published = `cat >/etc/bpfbroker/objects.d/bench.object <<'EOF'
[Object]
File=/usr/local/lib/count.bpf.o
Load=boot
[Map packets]
Access=read-only
[Program count]
Attach=none
EOF
cat >/etc/polkit-1/rules.d/10-bench.rules <<'EOF'
polkit.addRule(function(action, subject) {
    if (action.id == "org.bpfbroker.open-object" && action.lookup("object") == "bench" && subject.user == "alice") {
        return polkit.Result.YES;
    }
});
EOF
systemctl reset-failed bpfbroker.service; systemctl restart bpfbroker.service`

// openMap measures opening a published map on a connection that stands, over each
// front, beside what polkit and a round trip cost there.
func (b *bench) openMap(ctx context.Context) (_ []figure, err error) {
	if err := b.do(ctx, "sh", "-ec", published); err != nil {
		return nil, err
	}
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	var figures []figure
	for _, front := range []struct{ name, subject string }{{"socket", "unix-process"}, {"bus", "system-bus-name"}} {
		acquire := func(what string) sampler {
			return programs.start(b.Command(ctx, "alice", programDir+"/acquire", what, front.name))
		}
		polkit := programs.start(b.Command(ctx, "root", programDir+"/polkit", front.subject, uid, "org.bpfbroker.open-object",
			"object=bench", "map=packets", "program=", "access=read-only", "peer.unit="+commandUnit, "peer.user-unit="))
		sides, err := interleave(10, 300,
			side{"OpenMap over the " + front.name, acquire("map")},
			side{"polkit check", polkit},
			side{"round trip over the " + front.name, acquire("ping")},
		)
		if err != nil {
			return nil, err
		}
		f := compare("OpenMap over the "+front.name+" / (polkit + round trip)", sides, sides[0].median(), sides[1].median()+sides[2].median())
		figures = append(figures, f.atMost(1.5))
	}
	return figures, nil
}

// readMap measures what reading by the broker's descriptor costs its user, beside
// what reading by root's own costs root. One process takes turns with them.
func (b *bench) readMap(ctx context.Context) (_ []figure, err error) {
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	lookups := programs.start(b.Command(ctx, "root", "sh", "-c",
		"exec "+programDir+"/client lookups "+socket+" bench packets "+uid+" /sys/fs/bpf/bpfbroker/objects/bench@*/maps/packets"))
	sides, err := interleave(10, 1000, side{"1000 lookups by a user's descriptor", lookups}, side{"1000 lookups by root's own", lookups})
	if err != nil {
		return nil, err
	}
	f := compare("reading a published map / by root's own descriptor", sides, sides[0].median(), sides[1].median())
	return []figure{f.within(0.97, 1.03)}, nil
}

// boot measures what many objects add to the daemon's start, beside the time in
// which bpftool loads, attaches and pins the same files one after another.
func (b *bench) boot(ctx context.Context) (_ []figure, err error) {
	const objects = 20
	prepare := fmt.Sprintf(`mkdir /run/elf
for i in $(seq %d); do
	cp /usr/local/lib/exits.bpf.o /run/elf/$i.bpf.o
	printf '[Object]\nFile=/run/elf/%%d.bpf.o\nLoad=boot\n[Map exits]\nAccess=read-only\n' $i >/run/elf/boot$i.object
done
cat >/run/elf/bpftool.sh <<'EOF'
mkdir /sys/fs/bpf/bench
for i in $(seq %d); do
	bpftool prog loadall /run/elf/$i.bpf.o /sys/fs/bpf/bench/$i pinmaps /sys/fs/bpf/bench/maps$i autoattach
done
EOF`, objects, objects)
	if err := b.do(ctx, "sh", "-ec", prepare); err != nil {
		return nil, err
	}
	// What was loaded has gone before each sample, and the kernel is done with it.
	const clear = `systemctl stop bpfbroker.service; systemctl reset-failed bpfbroker.service
rm -rf /sys/fs/bpf/bench /sys/fs/bpf/bpfbroker/objects /run/bpfbroker/objects.d; mkdir -p /run/bpfbroker/objects.d; sleep 0.2
`
	var programs group
	defer func() {
		err = errors.Join(err, programs.close(), b.do(ctx, "sh", "-c", clear+"rm -r /run/elf; systemctl start bpfbroker.service"))
	}()
	sample := func(before, after string, command ...string) sampler {
		run := programs.start(b.Command(ctx, "root", programDir+"/spawn", command...))
		return func() (int64, error) {
			if err := b.do(ctx, "sh", "-ec", clear+before); err != nil {
				return 0, err
			}
			took, err := run()
			if err != nil {
				return 0, err
			}
			return took, b.do(ctx, "sh", "-c", after)
		}
	}
	pinned := func(links string) string { return fmt.Sprintf("ls -d %s | wc -l | grep -qx %d", links, objects) }
	sides, err := interleave(1, 15,
		side{fmt.Sprintf("daemon's start with %d objects", objects), sample("cp /run/elf/*.object /run/bpfbroker/objects.d",
			pinned("/sys/fs/bpf/bpfbroker/objects/boot*/links/*"), "systemctl", "start", "bpfbroker.service")},
		side{"daemon's start with none", sample("", "true", "systemctl", "start", "bpfbroker.service")},
		side{fmt.Sprintf("bpftool prog loadall … autoattach, %d times", objects), sample("",
			pinned("/sys/fs/bpf/bench/[0-9]*/*"), "sh", "-e", "/run/elf/bpftool.sh")},
	)
	if err != nil {
		return nil, err
	}
	f := compare(fmt.Sprintf("%d objects at the daemon's start / by bpftool", objects), sides, sides[0].median()-sides[1].median(), sides[2].median())
	return []figure{f.atMost(1)}, nil
}
