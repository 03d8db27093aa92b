// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) objectsCommand() *cobra.Command {
	return listing(a, "objects", "List the objects that are published", (*client.Client).ListObjects,
		table{header: []string{"NAME", "STATE", "AVAILABLE", "DESCRIPTION"}, state: 2, noun: "objects"},
		func(o client.ObjectSummary) []string {
			return []string{o.Name, o.State, yesNo(o.Available), o.Description}
		})
}

func (a *app) objectCommand() *cobra.Command {
	object := &cobra.Command{
		Use:   "object",
		Short: "Use a published object",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return a.usageError("no command given after \"object\"") },
	}
	object.AddCommand(a.objectShowCommand(), a.objectDumpCommand(), a.objectWatchCommand(), a.objectOpenCommand(), a.objectMountCommand())
	return object
}

func (a *app) objectShowCommand() *cobra.Command {
	return showing(a, "Show what an object offers, with the types of its maps", a.completeObjects, (*client.Client).DescribeObject, describeObject)
}

// indent is for C's types, which have lines.
var indent = strings.NewReplacer("\n", "\n  ", "\t", "    ")

// describeObject writes an object out.
func describeObject(o *client.Object) string {
	var out sheet
	out.line("Object:", o.Name)
	if o.Description != "" {
		out.line("Description:", o.Description)
	}
	out.line("State:", o.State)
	out.available(o.Available, o.Reason, o.Remedy)
	out.line("Load:", o.Load)
	out.line("Keep:", o.Keep)
	for _, m := range o.Maps {
		out.line("Map:", m.Name)
		details := []string{"type " + m.Type + ", at most " + strconv.Itoa(m.MaxEntries) + " entries"}
		if m.IsRing() {
			details[0] = "type " + m.Type + ", " + strconv.Itoa(m.MaxEntries) + " bytes"
		}
		var access []string
		for _, word := range m.Access {
			access = append(access, string(word))
		}
		details = append(details, "access "+strings.Join(access, " "))
		if m.KeyType != "" {
			details = append(details, "key "+m.KeyType)
		}
		if m.ValueType != "" {
			details = append(details, "value "+m.ValueType)
		}
		for _, detail := range details {
			out.lines("", strings.Split(indent.Replace("\n" + detail)[1:], "\n"))
		}
	}
	for _, p := range o.Programs {
		out.line("Program:", p.Name+" ("+p.Type+")")
	}
	for _, l := range o.Links {
		label := "Attached:"
		if !l.Attached {
			label = "Not attached:"
		}
		out.line(label, l.Name+", to "+l.Type+" "+l.Target)
	}
	out.lines("Files:", o.Files)
	return out.String()
}

// splitMap takes NAME/MAP apart.
func (a *app) splitMap(word string) (object, name string, err error) {
	object, name, ok := strings.Cut(word, "/")
	if !ok || object == "" || name == "" {
		return "", "", a.usageError("%q is not the NAME/MAP of an object's map", word)
	}
	return object, name, nil
}

// openTable opens a map for reading.
func (a *app) openTable(ctx context.Context, word string) (*client.Table, error) {
	object, name, err := a.splitMap(word)
	if err != nil {
		return nil, err
	}
	var t *client.Table
	err = a.ask(ctx, func(c *client.Client, _ func()) error {
		t, err = c.OpenTable(ctx, object, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	a.warn(t.Warnings)
	return t, nil
}

func (a *app) warn(warnings []string) {
	if a.quiet {
		return
	}
	for _, w := range warnings {
		fmt.Fprintf(os.Stderr, "bpfbroker: %s\n", printable(w))
	}
}

func (a *app) objectOpenCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "open NAME/MAP[:ACCESS]… -- COMMAND [ARGUMENT…]",
		Short: "Run a command with file descriptors of maps",
		Long: `Run a command with file descriptors of maps, in its process: from 3 on, in the
order given. LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES tell it of them, as
sd_listen_fds(3) says; the names are those given, without ACCESS.`,
		ValidArgsFunction: a.completeMaps,
		RunE: func(command *cobra.Command, args []string) error {
			dash := command.ArgsLenAtDash()
			switch {
			case dash < 0 || dash == len(args):
				return a.usageError("object open: no command given after \"--\"")
			case dash == 0:
				return a.usageError("object open: no map given")
			case dash > maxOpen:
				return a.usageError("object open: more than %d maps", maxOpen)
			}
			return a.objectOpen(command.Context(), args[:dash], args[dash:])
		},
	}
	return command
}

// maxOpen is how many maps "object open" takes.
const maxOpen = 64

// firstListenFD is SD_LISTEN_FDS_START of sd-daemon.h.
const firstListenFD = 3

func (a *app) objectOpen(ctx context.Context, words, command []string) error {
	path, err := lookUp(command[0])
	if err != nil {
		return err
	}
	// The command's file descriptors get their numbers now: what Go's runtime
	// opens later must not be closed under its feet.
	if err := reserve(firstListenFD + len(words)); err != nil {
		return err
	}
	var names []string
	for i, word := range words {
		name, access, _ := strings.Cut(word, ":")
		object, mapName, err := a.splitMap(name)
		if err != nil {
			return err
		}
		if err := a.openAt(ctx, firstListenFD+i, object, mapName, client.Access(access)); err != nil {
			return err
		}
		names = append(names, name)
	}
	environment := slices.DeleteFunc(os.Environ(), func(variable string) bool { return strings.HasPrefix(variable, "LISTEN_") })
	environment = append(environment,
		"LISTEN_FDS="+strconv.Itoa(len(words)), "LISTEN_PID="+strconv.Itoa(os.Getpid()), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	return cannotRun(command[0], syscall.Exec(path, command, environment), exitNotExecutable)
}

// reserve opens all file descriptors below end that aren't open yet.
func reserve(end int) error {
	for {
		null, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot reserve file descriptors: %w", err)
		}
		if null >= end { // the lowest one that was free
			return syscall.Close(null)
		}
	}
}

// openAt opens a map as the file descriptor fd, which a command inherits.
// Without an access it is read-only, and a ring buffer to consume.
func (a *app) openAt(ctx context.Context, fd int, object, name string, access client.Access) error {
	return a.ask(ctx, func(c *client.Client, _ func()) error {
		wanted := access
		if wanted == "" {
			o, err := c.DescribeObject(ctx, object)
			if err != nil {
				return err
			}
			wanted = client.ReadOnly
			if slices.ContainsFunc(o.Maps, func(m client.ObjectMap) bool { return m.Name == name && m.IsRing() }) {
				wanted = client.Consume
			}
		}
		m, warnings, err := c.OpenMap(ctx, object, name, wanted)
		if err != nil {
			return err
		}
		defer m.Close()
		a.warn(warnings)
		if err := syscall.Dup3(m.FD(), fd, 0); err != nil {
			return fmt.Errorf("cannot pass the map on: %w", err)
		}
		return nil
	})
}

func (a *app) objectMountCommand() *cobra.Command {
	var pid int
	command := &cobra.Command{
		Use:   "mount [--pid PID] NAME… PATH",
		Short: "Mount objects as a BPF file system",
		Long: `Mount objects as a BPF file system that cannot be written to, with a directory
for each, at PATH in the mount namespace of a process. Both that namespace and
its user namespace have to be the user's own.`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeObjects,
		RunE: func(command *cobra.Command, args []string) error {
			last := len(args) - 1
			return a.objectMount(command.Context(), args[:last], pid, args[last])
		},
	}
	command.Flags().IntVar(&pid, "pid", 0, "a process in the mount namespace; without, this one's")
	return command
}

func (a *app) objectMount(ctx context.Context, objects []string, pid int, path string) error {
	var process *os.File
	if pid != 0 {
		var err error
		if process, err = client.OpenProcess(pid); err != nil {
			return fmt.Errorf("cannot open process %d: %w", pid, err)
		}
		defer process.Close()
	}
	return a.ask(ctx, func(c *client.Client, _ func()) error {
		_, warnings, err := c.MountObjects(ctx, objects, process, path)
		a.warn(warnings)
		return err
	})
}

// completeObjects offers the objects' names to the shell.
func (a *app) completeObjects(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completions(a, (*client.Client).ListObjects, func(o client.ObjectSummary) cobra.Completion {
		return cobra.CompletionWithDesc(o.Name, o.Description)
	})
}

// completeMaps offers NAME/MAP: first the objects, then the maps of the one
// that is there.
func (a *app) completeMaps(command *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	object, _, named := strings.Cut(word, "/")
	if !named {
		objects, directive := a.completeObjects(command, args, word)
		for i, o := range objects {
			name, description, _ := strings.Cut(o, "\t")
			objects[i] = cobra.CompletionWithDesc(name+"/", description)
		}
		return objects, directive | cobra.ShellCompDirectiveNoSpace
	}
	c := a.client()
	defer c.Close()
	o, err := c.DescribeObject(command.Context(), object)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []cobra.Completion
	for _, m := range o.Maps {
		names = append(names, cobra.CompletionWithDesc(object+"/"+m.Name, m.Type))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
