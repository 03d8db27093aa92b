// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"unicode/utf8"
)

// jsonFormat is the value of --json.
type jsonFormat string

const (
	jsonOff    jsonFormat = "off"
	jsonShort  jsonFormat = "short"
	jsonPretty jsonFormat = "pretty"
	jsonAuto   jsonFormat = "auto"
)

// String returns the format as Set takes it.
func (f *jsonFormat) String() string { return string(*f) }

// Type is what the help calls the value.
func (f *jsonFormat) Type() string { return "FORMAT" }

// Set takes the option's value.
func (f *jsonFormat) Set(value string) error {
	switch format := jsonFormat(value); format {
	case jsonOff, jsonShort, jsonPretty, jsonAuto:
		*f = format
		return nil
	}
	return fmt.Errorf("%q is not pretty, short or off", value)
}

// wantsJSON says whether output is JSON.
func (a *app) wantsJSON() bool { return a.json != "" && a.json != jsonOff }

// printJSON prints a value in the format that was asked for.
func (a *app) printJSON(value any) error {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if a.json == jsonPretty || a.json == jsonAuto && isTerminal(os.Stdout) {
		encoder.SetIndent("", "        ")
	}
	if err := encoder.Encode(value); err != nil {
		return fmt.Errorf("cannot encode: %w", err)
	}
	return a.print(out.String())
}

// table is what is printed in columns.
type table struct {
	header []string
	rows   [][]string
	// state is the index of the column that gets colours.
	state int
	// noun names the rows in the last line, "" for none.
	noun string
}

// colors are the escape sequences of the words in a state column.
var colors = map[string]string{
	"yes": "\x1b[32m", "ok": "\x1b[32m", "ask": "\x1b[33m", "no": "\x1b[31m",
}

const colorOff = "\x1b[0m"

func (a *app) printTable(t table) error {
	var rows [][]string
	if !a.noLegend && len(t.rows) > 0 {
		rows = append(rows, t.header)
	}
	rows = append(rows, t.rows...)
	widths := make([]int, len(t.header))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	color := useColor()
	var out strings.Builder
	for _, row := range rows {
		last := len(row) - 1
		for last > 0 && row[last] == "" {
			last--
		}
		for i, cell := range row[:last+1] {
			text := printable(cell)
			if code := colors[cell]; color && i == t.state && code != "" {
				text = code + text + colorOff
			}
			out.WriteString(text)
			if i < last {
				out.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+1))
			}
		}
		out.WriteByte('\n')
	}
	if !a.noLegend && t.noun != "" {
		if len(t.rows) > 0 {
			out.WriteByte('\n')
		}
		fmt.Fprintf(&out, "%d %s listed.\n", len(t.rows), t.noun)
	}
	return a.print(out.String())
}

func useColor() bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && isTerminal(os.Stdout)
}

// print writes text to standard output, or to the pager that systemd's tools
// would take.
func (a *app) print(text string) error {
	if pager := pagerCommand(); pager != nil && !a.noPager && isTerminal(os.Stdout) {
		pager.Stdin = strings.NewReader(text)
		pager.Stdout, pager.Stderr = os.Stdout, os.Stderr
		if pager.Start() == nil {
			_ = pager.Wait() // its user ended it
			return nil
		}
	}
	if _, err := os.Stdout.WriteString(text); err != nil {
		return fmt.Errorf("cannot print: %w", err)
	}
	return nil
}

// pagerCommand returns the pager, nil for none.
func pagerCommand() *exec.Cmd {
	words := []string{"less"}
	for _, name := range []string{"PAGER", "SYSTEMD_PAGER"} {
		if value, ok := os.LookupEnv(name); ok {
			words = strings.Fields(value)
		}
	}
	if len(words) == 0 || words[0] == "cat" {
		return nil
	}
	pager := exec.Command(words[0], words[1:]...)
	// less leaves by itself if all fits on the screen, and gives no shell to
	// somebody who may only run bpfbroker, by sudo.
	less := os.Getenv("SYSTEMD_LESS")
	if less == "" {
		less = "FRSXMK"
	}
	pager.Env = append(os.Environ(), "LESS="+less, "LESSSECURE=1")
	return pager
}
