// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// side is one of the things that a figure compares.
type side struct {
	name   string
	sample sampler
}

// series is what was measured of one side, in nanoseconds or in instructions.
type series struct {
	Name         string  `json:"name"`
	Samples      []int64 `json:"samples"`
	Instructions bool    `json:"instructions,omitempty"`
}

// quantile returns the sample that q (0 to 1) of them are below.
func (s series) quantile(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(s.Samples))
	return time.Duration(sorted[int(q*float64(len(sorted)-1))])
}

func (s series) median() time.Duration { return s.quantile(0.5) }

// interleave takes rounds of samples, one of each side in turn, so that what
// else the host does meets all sides alike. The first rounds don't count.
func interleave(warmUp, rounds int, sides ...side) ([]series, error) {
	measured := make([]series, len(sides))
	for i, side := range sides {
		measured[i].Name = side.name
	}
	for round := range warmUp + rounds {
		for i, side := range sides {
			took, err := side.sample()
			if err != nil {
				return nil, fmt.Errorf("cannot measure %q: %w", side.name, err)
			}
			if round >= warmUp {
				measured[i].Samples = append(measured[i].Samples, took)
			}
		}
	}
	return measured, nil
}

// figure is a value that has a bound.
type figure struct {
	Name   string   `json:"name"`
	Value  float64  `json:"value"`
	Unit   string   `json:"unit,omitempty"`
	Bound  string   `json:"bound"`
	OK     bool     `json:"ok"`
	Series []series `json:"series,omitempty"`
}

// compare makes a figure of a ratio.
func compare(name string, sides []series, over, under time.Duration) figure {
	return figure{Name: name, Value: float64(over) / float64(under), Series: sides}
}

func (f figure) atMost(bound float64) figure {
	f.Bound, f.OK = fmt.Sprintf("≤ %g", bound), f.Value <= bound
	return f
}

func (f figure) below(bound float64) figure {
	f.Bound, f.OK = fmt.Sprintf("< %g", bound), f.Value < bound
	return f
}

func (f figure) atLeast(bound float64) figure {
	f.Bound, f.OK = fmt.Sprintf("≥ %g", bound), f.Value >= bound
	return f
}

func (f figure) within(low, high float64) figure {
	f.Bound, f.OK = fmt.Sprintf("%g … %g", low, high), low <= f.Value && f.Value <= high
	return f
}

// line is the figure's row of the last table.
func (f figure) line() string {
	verdict := "ok"
	if !f.OK {
		verdict = "OVER"
	}
	return fmt.Sprintf("%-55s %8.2f %-4s %11s  %s", f.Name, f.Value, f.Unit, f.Bound, verdict)
}

// String shows the figure with its sides.
func (f figure) String() string {
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s\n", f.line())
	for _, s := range f.Series {
		if s.Instructions {
			fmt.Fprintf(&text, "    %-65s median %d instructions, quarters %d … %d, %d samples\n", s.Name,
				s.median(), s.quantile(0.25), s.quantile(0.75), len(s.Samples))
			continue
		}
		fmt.Fprintf(&text, "    %-65s median %8.3f ms, quarters %8.3f … %8.3f, %d samples\n", s.Name,
			milliseconds(s.median()), milliseconds(s.quantile(0.25)), milliseconds(s.quantile(0.75)), len(s.Samples))
	}
	return text.String()
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
