// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// guardBounds are those of what guard measures, by kind.
var guardBounds = map[string]func(figure) figure{
	"create":    func(f figure) figure { return f.atMost(1.15) },
	"load":      func(f figure) figure { return f.atMost(1.15) },
	"long load": func(f figure) figure { return f.atMost(1.25) },
	"run":       func(f figure) figure { return f.within(0.98, 1.02) },
	"stranger":  func(f figure) figure { return f.atMost(1.03) },
}

// guard measures bpf(2) on the kernels that can have the guard, with it and
// without it, in turns. Everything is emulated, so time would tell more of the
// host than of the guard: what is compared is how many instructions the
// processor needs.
func guard(ctx context.Context) ([]figure, error) {
	suite := filepath.Join(buildDir, "guard")
	if err := host(ctx, "go", "test", "-c", "-tags", "root kernels", "-o", suite, "./service/internal/guard"); err != nil {
		return nil, err
	}
	var figures []figure
	for _, version := range []string{"6.12", "7.2"} {
		image, err := machines.Kernel(ctx, version)
		if err != nil {
			return nil, err
		}
		output, err := guardSamples(ctx, image, suite)
		if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(output) {
			data, ok := bytes.CutPrefix(line, []byte("cost: "))
			if !ok {
				continue
			}
			var c struct {
				Kind, Name    string
				With, Without []int64
			}
			if err := json.Unmarshal(data, &c); err != nil {
				return nil, fmt.Errorf("cannot read the guard's samples: %w", err)
			}
			with := series{Name: c.Name + ", with the guard", Samples: c.With, Instructions: true}
			without := series{Name: c.Name + ", without it", Samples: c.Without, Instructions: true}
			bound := guardBounds[c.Kind]
			if bound == nil || len(c.With) == 0 || len(c.Without) == 0 {
				return nil, fmt.Errorf("cannot read the guard's samples: %.100s", data)
			}
			figures = append(figures, bound(compare(version+" "+c.Name, []series{with, without}, with.median(), without.median())))
		}
	}
	if len(figures) == 0 {
		return nil, errors.New("cannot measure the guard: there are no samples")
	}
	return figures, nil
}

// guardSamples runs the benchmark of service/internal/guard.
func guardSamples(ctx context.Context, image *machines.Image, suite string) (output []byte, err error) {
	files := map[string]string{
		"/suite": suite,
		"/usr/lib/bpfbroker/profiles.d/network.profile": "packaging/profiles/network.profile",
	}
	argv := strings.Fields("/suite -test.run=^$ -test.bench=^BenchmarkCost$ -test.benchtime=1x -test.timeout=0")
	for range 3 { // as some crash
		run, cancel := context.WithTimeout(ctx, 30*time.Minute)
		var code int
		output, code, err = machines.CountInKernel(run, image, files, argv, []string{"GODEBUG=asyncpreemptoff=1"})
		cancel()
		if err == nil && code != 0 {
			return nil, fmt.Errorf("cannot measure the guard:\n%s", output)
		}
		if err == nil || ctx.Err() != nil {
			break
		}
	}
	return output, err
}
