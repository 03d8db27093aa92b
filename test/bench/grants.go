// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// bus measures a token over the bus beside one over the socket, each on a
// connection that stands.
func (b *bench) bus(ctx context.Context) (_ []figure, err error) {
	var programs group
	defer func() { err = errors.Join(err, programs.close()) }()
	acquire := func(args ...string) sampler {
		return programs.start(b.Command(ctx, "alice", "unshare", append([]string{"-Urm", programDir + "/acquire"}, args...)...))
	}
	sides, err := interleave(10, 300,
		side{"a token over the bus", acquire("token", "bus", profile)},
		side{"a token over the socket", acquire("token", "socket", profile)},
	)
	if err != nil {
		return nil, err
	}
	f := compare("AcquireToken over the bus / over the socket", sides, sides[0].median(), sides[1].median())
	return []figure{f.atMost(1.5)}, nil
}

// many measures a token while there are a crowd's grants, beside one while there
// are none.
func (b *bench) many(ctx context.Context) (_ []figure, err error) {
	sides := []series{{Name: fmt.Sprintf("a token beside %d grants", crowd)}, {Name: "a token beside none"}}
	take := func(into *series) (err error) {
		var programs group
		defer func() { err = errors.Join(err, programs.close()) }()
		measured, err := interleave(10, 100, side{into.Name, programs.start(b.tokenClient(ctx))})
		if err == nil {
			into.Samples = append(into.Samples, measured[0].Samples...)
		}
		return err
	}
	for range 3 {
		if err := take(&sides[1]); err != nil {
			return nil, err
		}
		cmd := b.Command(ctx, "alice", programDir+"/client", "crowd", socket, profile, strconv.Itoa(crowd))
		in, out, err := pipes(cmd)
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return nil, err
		}
		_, err = readNumber(bufio.NewReader(out))
		if err == nil {
			err = take(&sides[0])
		}
		if err := errors.Join(err, in.Close(), cmd.Wait()); err != nil {
			return nil, err
		}
		if err := b.awaitNone(ctx); err != nil {
			return nil, err
		}
	}
	f := compare(fmt.Sprintf("a token beside %d grants / beside none", crowd), sides, sides[0].median(), sides[1].median())
	return []figure{f.atMost(1.2)}, nil
}

// awaitNone waits until all grants have ended.
func (b *bench) awaitNone(ctx context.Context) error {
	deadline := time.Now().Add(endTime)
	for b.do(ctx, "sh", "-c", "! ls /run/bpfbroker/grants | grep -q .") != nil {
		if time.Now().After(deadline) {
			return errors.New("cannot wait any longer for the grants to end")
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

// list measures the list of all grants, when there are many and when there are
// few. As no user may have so many, they are copies of one in the ledger.
func (b *bench) list(ctx context.Context) (_ []figure, err error) {
	const few, many = 100, 10_000
	cmd := b.Command(ctx, "alice", programDir+"/client", "crowd", socket, profile, "1")
	in, out, err := pipes(cmd)
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, b.do(ctx, "sh", "-c", "systemctl stop bpfbroker.service; rm -f /run/bpfbroker/grants/*; systemctl reset-failed bpfbroker.service"), in.Close(), cmd.Wait())
	}()
	if _, err := readNumber(bufio.NewReader(out)); err != nil {
		return nil, err
	}
	if err := b.do(ctx, "sh", "-c", "systemctl stop bpfbroker.service; cat /run/bpfbroker/grants/* >/run/row"); err != nil {
		return nil, err
	}
	sides := []series{{Name: fmt.Sprintf("ListGrants of %d grants", many)}, {Name: fmt.Sprintf("ListGrants of %d grants", few)}}
	for range 2 {
		for i, count := range []int{many, few} {
			copies := fmt.Sprintf(`systemctl stop bpfbroker.service; systemctl reset-failed bpfbroker.service; rm -f /run/bpfbroker/grants/*
awk '{ for (i = 1; i <= %d; i++) { id = sprintf("%%016x", i); row = $0; sub(/"id":"[0-9a-f]*"/, "\"id\":\"" id "\"", row); file = "/run/bpfbroker/grants/" id; printf "%%s", row >file; close(file) } }' /run/row
bpfbroker list --all --no-legend | wc -l | grep -qx %d`, count, count)
			if err := b.do(ctx, "sh", "-ec", copies); err != nil {
				return nil, err
			}
			var programs group
			measured, err := interleave(5, 50, side{sides[i].Name, programs.start(b.Command(ctx, "root", programDir+"/acquire", "list", "bus"))})
			if err := errors.Join(err, programs.close()); err != nil {
				return nil, err
			}
			sides[i].Samples = append(sides[i].Samples, measured[0].Samples...)
		}
	}
	f := compare(fmt.Sprintf("ListGrants of %d grants / of %d", many, few), sides, sides[0].median(), sides[1].median())
	return []figure{f.below(50)}, nil
}
