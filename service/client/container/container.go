// SPDX-License-Identifier: Apache-2.0

// Package container brings profiles into containers: by hooks that container
// engines run (OCI runtime specification, and podman's oci-hooks(5)), and by
// devices that their users name (CDI, the Container Device Interface).
package container

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

const (
	// Annotation is a container's annotation that names its profile.
	Annotation = "org.bpfbroker.profile"
	// TokenPath is where a container has the BPF file system. A kernel with BPF
	// has the directory in every sysfs.
	TokenPath = "/sys/fs/bpf"

	tokenVariable = "LIBBPF_BPF_TOKEN_PATH="
	// createRuntime is the hook that runs when the container's namespaces and
	// mounts are there, and its process has not entered its root yet.
	createRuntime = "createRuntime"
	// hookStderr is where crun has hooks write their errors to, else nowhere.
	hookStderr = "run.oci.hooks.stderr"
)

// hookArgs are the arguments of the createRuntime hook, but for the program's
// name and the profile's.
var hookArgs = []string{"hook", createRuntime, "-p"}

// hook is a hook as both specifications have it.
type hook struct {
	Name string   `json:"hookName,omitempty"` // CDI's
	Path string   `json:"path"`
	Args []string `json:"args"`
}

// newHook returns the hook that mounts a profile, with program as bpfbroker.
func newHook(program, profile string) hook {
	return hook{Path: program, Args: slices.Concat([]string{"bpfbroker"}, hookArgs, []string{profile})}
}

// profile is the profile of such a hook, "" for another hook.
func (h hook) profile() string {
	last := len(hookArgs) + 1
	if len(h.Args) != last+1 || !slices.Equal(h.Args[1:last], hookArgs) {
		return ""
	}
	return h.Args[last]
}

// Configuration is an OCI runtime configuration, as podman's precreate hook
// gets it.
type Configuration struct {
	document map[string]any
	// Profiles are those that its annotation and its hooks name. Without any
	// nothing has to be done.
	Profiles []string
	hooked   []string
}

// ParseConfiguration reads a configuration.
func ParseConfiguration(data []byte) (*Configuration, error) {
	var names struct {
		Annotations map[string]string `json:"annotations"`
		Hooks       struct {
			CreateRuntime []hook `json:"createRuntime"`
		} `json:"hooks"`
	}
	if err := json.Unmarshal(data, &names); err != nil {
		return nil, fmt.Errorf("cannot read the container's configuration: %w", err)
	}
	c := &Configuration{}
	for _, h := range names.Hooks.CreateRuntime {
		if profile := h.profile(); profile != "" {
			c.hooked = append(c.hooked, profile)
		}
	}
	c.Profiles = slices.Clone(c.hooked)
	if profile := names.Annotations[Annotation]; profile != "" && !slices.Contains(c.hooked, profile) {
		c.Profiles = append(c.Profiles, profile)
	}
	if len(c.Profiles) == 0 {
		return c, nil
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber() // numbers stay what they are
	if err := decoder.Decode(&c.document); err != nil {
		return nil, fmt.Errorf("cannot read the container's configuration: %w", err)
	}
	return c, nil
}

// Edit adds what a container needs to use its profiles, and returns the
// configuration: for each profile a createRuntime hook that runs program, the
// capabilities, and bpf(2) where seccomp would refuse it. stderr is a path that
// hooks write their errors to, "" for none.
func (c *Configuration) Edit(program string, capabilities []string, stderr string) ([]byte, error) {
	e := editor{}
	process := e.object(c.document, "process")
	e.appendMissing(process, "env", tokenVariable+TokenPath)
	if len(capabilities) > 0 {
		sets := e.object(process, "capabilities")
		for _, set := range []string{"bounding", "effective", "permitted", "inheritable", "ambient"} {
			e.appendMissing(sets, set, capabilities...)
		}
	}
	if linux := e.object(c.document, "linux"); linux["seccomp"] != nil {
		e.allow(e.object(linux, "seccomp"), "bpf")
	}
	for _, profile := range c.Profiles {
		if !slices.Contains(c.hooked, profile) {
			hooks := e.object(c.document, "hooks")
			hooks[createRuntime] = append(e.list(hooks, createRuntime), newHook(program, profile))
		}
	}
	if stderr != "" {
		e.object(c.document, "annotations")[hookStderr] = stderr
	}
	if e.err != nil {
		return nil, fmt.Errorf("cannot edit the container's configuration: %w", e.err)
	}
	data, err := json.Marshal(c.document)
	if err != nil {
		return nil, fmt.Errorf("cannot write the container's configuration: %w", err)
	}
	return data, nil
}

// editor changes a JSON document, and keeps the first error.
type editor struct{ err error }

// object returns a member, made if it isn't there.
func (e *editor) object(parent map[string]any, key string) map[string]any {
	child, ok := parent[key].(map[string]any)
	if !ok {
		e.expect(parent, key)
		child = map[string]any{}
		parent[key] = child
	}
	return child
}

// list returns a member, nil if it isn't there.
func (e *editor) list(parent map[string]any, key string) []any {
	child, ok := parent[key].([]any)
	if !ok {
		e.expect(parent, key)
	}
	return child
}

// expect complains of a member that is there and is something else.
func (e *editor) expect(parent map[string]any, key string) {
	if parent[key] != nil && e.err == nil {
		e.err = fmt.Errorf("%q is not what it should be", key)
	}
}

func (e *editor) appendMissing(parent map[string]any, key string, values ...string) {
	all := e.list(parent, key)
	for _, value := range values {
		if !slices.Contains(all, any(value)) {
			all = append(all, value)
		}
	}
	parent[key] = all
}

// allow has seccomp allow a system call that its rules refuse.
func (e *editor) allow(seccomp map[string]any, name string) {
	var rules []any
	for _, rule := range e.list(seccomp, "syscalls") {
		rule, ok := rule.(map[string]any)
		if !ok {
			e.err = errors.New("a rule of seccomp's is no object")
			return
		}
		names := slices.DeleteFunc(e.list(rule, "names"), func(n any) bool { return n == name })
		if len(names) > 0 {
			rule["names"] = names
			rules = append(rules, rule)
		}
	}
	seccomp["syscalls"] = append(rules, map[string]any{"names": []any{name}, "action": "SCMP_ACT_ALLOW"})
}

// maxInput bounds what is read of a container engine.
const maxInput = 16 << 20

// State is what a createRuntime hook is told of its container.
type State struct {
	// PID is the container's process, in the hook's pid namespace.
	PID int
	// Root is the container's root directory before its process has entered it,
	// without links in its path.
	Root string
}

// ParseState reads a container's state, and its configuration for the root.
func ParseState(data []byte) (*State, error) {
	var state struct {
		PID    int    `json:"pid"`
		Bundle string `json:"bundle"`
	}
	if err := json.Unmarshal(data, &state); err != nil {
		return nil, fmt.Errorf("cannot read the container's state: %w", err)
	}
	if state.PID <= 0 || !filepath.IsAbs(state.Bundle) {
		return nil, errors.New("cannot read the container's state: no process or no bundle in it")
	}
	file, err := os.Open(filepath.Join(state.Bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("cannot read the container's configuration: %w", err)
	}
	defer file.Close()
	data, err = ReadAll(file)
	if err != nil {
		return nil, err
	}
	var config struct {
		Root struct {
			Path string `json:"path"`
		} `json:"root"`
	}
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("cannot read the container's configuration: %w", err)
	}
	root := config.Root.Path
	if !filepath.IsAbs(root) {
		root = filepath.Join(state.Bundle, root)
	}
	root, err = filepath.EvalSymlinks(root)
	if err != nil {
		return nil, fmt.Errorf("cannot find the container's root directory: %w", err)
	}
	return &State{PID: state.PID, Root: root}, nil
}

// ReadAll reads what a container engine says, up to 16 MiB.
func ReadAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err == nil && len(data) > maxInput {
		err = errors.New("it is longer than 16 MiB")
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read what the container engine says: %w", err)
	}
	return data, nil
}
