// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/typed"
)

func (a *app) objectDumpCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "dump NAME/MAP",
		Short:             "Print a map's entries by their types",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeMaps,
		RunE: func(command *cobra.Command, args []string) error {
			t, err := a.openTable(command.Context(), args[0])
			if err != nil {
				return err
			}
			defer t.Close()
			if t.Key == nil {
				return fmt.Errorf("cannot print %s: a %v has no entries; see \"bpfbroker object watch\"", args[0], t.Type())
			}
			return a.dump(t)
		},
	}
}

// interval is between two looks at a map.
const interval = time.Second

func (a *app) objectWatchCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "watch NAME/MAP",
		Short: "Print a ring buffer's records as they come, or a map every second",
		Long: `Print a ring buffer's records as they come, each on a line, or what is in a map
every second. Records that are printed are taken out of the ring buffer.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeMaps,
		RunE: func(command *cobra.Command, args []string) error {
			t, err := a.openTable(command.Context(), args[0])
			if err != nil {
				return err
			}
			defer t.Close()
			if a.json == jsonAuto {
				a.json = jsonShort
			}
			a.noPager = true
			if t.Key == nil {
				return a.watchRing(t)
			}
			for {
				if isTerminal(os.Stdout) && !a.wantsJSON() {
					if err := a.print(clearScreen); err != nil {
						return err
					}
				}
				if err := a.dump(t); err != nil {
					return err
				}
				time.Sleep(interval)
			}
		},
	}
}

// clearScreen moves to a terminal's first line and clears it.
const clearScreen = "\x1b[H\x1b[2J"

// entry is one of a map. Value is nil if there is one for each processor.
type entry struct {
	Key    any   `json:"key"`
	Value  any   `json:"value,omitempty"`
	Values []any `json:"values,omitempty"`
}

// dump prints a map. The tables have the sum of what processors have, where
// there is one; JSON has what each has.
func (a *app) dump(t *client.Table) error {
	var entries []entry
	for e, err := range typed.Entries(t.Map) {
		if err != nil {
			return err
		}
		decoded, err := a.decode(t, e)
		if err != nil {
			return err
		}
		entries = append(entries, decoded)
	}
	slices.SortFunc(entries, func(a, b entry) int { return typed.Compare(a.Key, b.Key) })
	if a.wantsJSON() {
		if entries == nil {
			entries = []entry{}
		}
		return a.printJSON(entries)
	}
	header := append(columns(t.Key, "KEY"), columns(t.Value, "VALUE")...)
	out := table{header: header, state: -1, noun: "entries"}
	for _, e := range entries {
		row := cells(nil, t.Key, e.Key)
		if e.Values != nil {
			row = append(row, cell(e.Values))
		} else {
			row = cells(row, t.Value, e.Value)
		}
		out.rows = append(out.rows, row)
	}
	return a.printTable(out)
}

func (a *app) decode(t *client.Table, e typed.Entry) (entry, error) {
	key, err := t.Key.Decode(e.Key)
	if err != nil {
		return entry{}, err
	}
	if len(e.Values) == 1 && !t.PerCPU() {
		value, err := t.Value.Decode(e.Values[0])
		return entry{Key: key, Value: value}, err
	}
	if !a.wantsJSON() {
		if sum, ok := t.Value.Sum(e.Values); ok {
			return entry{Key: key, Value: sum}, nil
		}
	}
	values := make([]any, len(e.Values))
	for i, data := range e.Values {
		if values[i], err = t.Value.Decode(data); err != nil {
			return entry{}, err
		}
	}
	return entry{Key: key, Values: values}, nil
}

// columns are the headings of a type's parts, structures in it taken apart.
func columns(t *typed.Type, name string) []string {
	if t.Kind != typed.Struct {
		return []string{strings.ToUpper(name)}
	}
	var all []string
	for _, f := range t.Fields {
		name := f.Name
		for _, column := range columns(f.Type, name) {
			if f.Type.Kind == typed.Struct {
				column = strings.ToUpper(name) + "." + column
			}
			all = append(all, column)
		}
	}
	return all
}

// cells appends a value's parts, as columns has them.
func cells(row []string, t *typed.Type, value any) []string {
	record, ok := value.(typed.Record)
	if t.Kind != typed.Struct || !ok {
		return append(row, cell(value))
	}
	for i, f := range t.Fields {
		row = cells(row, f.Type, record[i].Value)
	}
	return row
}

// cell writes a value. The zeros at the end of a list, of which histograms have
// many, are left out.
func cell(value any) string {
	list, ok := value.([]any)
	if !ok {
		return typed.Format(value)
	}
	end := len(list)
	for end > 0 && (list[end-1] == any(uint64(0)) || list[end-1] == any(int64(0))) {
		end--
	}
	text := typed.Format(list[:end])
	switch {
	case end == len(list):
		return text
	case end == 0:
		return "[…]"
	}
	return strings.TrimSuffix(text, "]") + ",…]"
}

// watchRing prints records until there is an error.
func (a *app) watchRing(t *client.Table) error {
	ring, err := ringbuf.NewReader(t.Map)
	if err != nil {
		return fmt.Errorf("cannot read the ring buffer: %w", err)
	}
	defer ring.Close()
	var record ringbuf.Record
	for {
		if err := ring.ReadInto(&record); err != nil {
			return fmt.Errorf("cannot read the ring buffer: %w", err)
		}
		typ := t.Value
		if typ.Size == 0 {
			typ = typed.Raw(len(record.RawSample))
		}
		value, err := typ.Decode(record.RawSample)
		if err != nil {
			return err
		}
		if a.wantsJSON() {
			err = a.printJSON(value)
		} else {
			err = a.print(line(value) + "\n")
		}
		if err != nil {
			return err
		}
	}
}

// line writes a record as NAME=VALUE, or what is none as it is.
func line(value any) string {
	record, ok := value.(typed.Record)
	if !ok {
		return printable(typed.Format(value))
	}
	var words []string
	for _, m := range record {
		text := typed.Format(m.Value)
		if text == "" || strings.ContainsFunc(text, needsQuotes) {
			text = strconv.Quote(text)
		}
		words = append(words, printable(m.Name)+"="+text)
	}
	return strings.Join(words, " ")
}

func needsQuotes(r rune) bool { return r <= ' ' || r == '"' || r == '\\' || !strconv.IsPrint(r) }
