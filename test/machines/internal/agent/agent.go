// SPDX-License-Identifier: Apache-2.0

// Package agent carries commands into an emulated machine. The agent runs in the machine and serves HTTP/2, which is there
// for its streams, over the one port that leads out of it; Proxy shares that port out on the host; Run is a host's process
// that stands for one in the machine.
package agent

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// PortName is the name of the agent's port.
	PortName = "org.bpfbroker.agent"
	// outputTime is how long what a command started may write after the command itself has ended.
	outputTime = 10 * time.Second
)

// Command is what to run.
type Command struct {
	User  string
	Group string   // the path of its control group
	Env   []string // in addition to the user's
	Line  []string // the program and its arguments
	// What the host's process is connected to, set by Run: an input with something in it, and one pipe for all output.
	Input, OneOutput bool
}

// A reply consists of frames: a kind, a length of four bytes, and that many bytes.
const (
	frameOutput = 1 + iota // for standard output
	frameErrors            // for standard error
	frameEnd               // how the command ended: a syscall.WaitStatus of four bytes
)

// header has the command of a request, header identifier what the host calls it.
const (
	headerCommand    = "Command"
	headerIdentifier = "Identifier"
)

func encode(c Command) (string, error) {
	data, err := json.Marshal(c)
	return base64.StdEncoding.EncodeToString(data), err
}

func decode(text string) (c Command, err error) {
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, err
	}
	if len(c.Line) == 0 {
		return c, errors.New("no program is named")
	}
	return c, nil
}

// agent runs commands and remembers them.
type agent struct {
	mutex   sync.Mutex
	running map[string]*os.Process // by what the host calls them
}

// Handler returns the agent: it runs commands on the system that it is on, and needs root.
func Handler() http.Handler {
	a := &agent{running: map[string]*os.Process{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST /run", a.run)
	mux.HandleFunc("POST /signal/{number}", a.signal)
	return mux
}

// run runs a command as long as its request lasts.
func (a *agent) run(w http.ResponseWriter, r *http.Request) {
	c, err := decode(r.Header.Get(headerCommand))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	cmd, err := command(r.Context(), c)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	group, err := os.Open(filepath.Join("/sys/fs/cgroup", c.Group))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer group.Close()
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())

	reply := &reply{w: w}
	cmd.Stdout, cmd.Stderr = frames{reply, frameOutput}, frames{reply, frameErrors}
	if c.OneOutput {
		cmd.Stderr = cmd.Stdout
	}
	var input io.WriteCloser
	if c.Input {
		if input, err = cmd.StdinPipe(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	if err := cmd.Start(); err != nil {
		// As a shell says it.
		code := 126
		if errors.Is(err, fs.ErrNotExist) {
			code = 127
		}
		fmt.Fprintln(cmd.Stderr, err)
		reply.end(syscall.WaitStatus(code << 8))
		return
	}
	a.remember(r.Header.Get(headerIdentifier), cmd.Process)
	defer a.forget(r.Header.Get(headerIdentifier))
	reply.flush()
	if c.Input {
		go func() {
			_, _ = io.Copy(input, r.Body) // it may not want all of it
			input.Close()
		}()
	}
	if err := cmd.Wait(); cmd.ProcessState == nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	reply.end(cmd.ProcessState.Sys().(syscall.WaitStatus))
}

// command makes what runs a command, without its input, output and control group.
func command(ctx context.Context, c Command) (*exec.Cmd, error) {
	data, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return nil, err
	}
	account, err := FindAccount(data, c.User)
	if err != nil {
		return nil, err
	}
	groups, err := account.groups()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, find(c.Line[0], account.path()), c.Line[1:]...)
	cmd.Args[0] = c.Line[0]
	cmd.Err = nil
	cmd.Env = append(account.Env(), c.Env...)
	cmd.Dir = "/"
	cmd.WaitDelay = outputTime
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: account.UID, Gid: account.GID, Groups: groups}}
	return cmd, nil
}

// find returns where a program is, as execvp(3) does, or a name that there is no file of.
func find(name, path string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file
		}
	}
	return "/nonexistent/" + name
}

// groups returns the groups that the system has the user in.
func (a Account) groups() ([]uint32, error) {
	entry := &user.User{Username: a.User, Gid: strconv.FormatUint(uint64(a.GID), 10)}
	names, err := entry.GroupIds()
	if err != nil {
		return nil, err
	}
	var groups []uint32
	for _, name := range names {
		number, err := strconv.ParseUint(name, 10, 32)
		if err != nil {
			return nil, err
		}
		groups = append(groups, uint32(number))
	}
	return groups, nil
}

// signal sends a signal to a command that was started.
func (a *agent) signal(w http.ResponseWriter, r *http.Request) {
	number, err := strconv.Atoi(r.PathValue("number"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.mutex.Lock()
	process := a.running[r.Header.Get(headerIdentifier)]
	a.mutex.Unlock()
	if process == nil {
		return // it has ended
	}
	if err := process.Signal(syscall.Signal(number)); err != nil && !errors.Is(err, os.ErrProcessDone) {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (a *agent) remember(identifier string, process *os.Process) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.running[identifier] = process
}

func (a *agent) forget(identifier string) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	delete(a.running, identifier)
}

// reply writes frames.
type reply struct {
	mutex sync.Mutex
	w     http.ResponseWriter
}

func (r *reply) flush() {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	_ = http.NewResponseController(r.w).Flush() // an error shows when the next frame is written
}

func (r *reply) write(kind byte, data []byte) error {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	frame := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(data)))
	if _, err := r.w.Write(append(frame, data...)); err != nil {
		return err
	}
	return http.NewResponseController(r.w).Flush()
}

func (r *reply) end(status syscall.WaitStatus) {
	_ = r.write(frameEnd, binary.BigEndian.AppendUint32(nil, uint32(status))) // whom to tell, if nobody listens?
}

// frames is an io.Writer of frames of one kind.
type frames struct {
	reply *reply
	kind  byte
}

func (f frames) Write(data []byte) (int, error) {
	if err := f.reply.write(f.kind, data); err != nil {
		return 0, err
	}
	return len(data), nil
}
