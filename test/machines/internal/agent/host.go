// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kill is what Run takes for SIGKILL, which it could not pass on.
const Kill = unix.SIGPWR

// killTime is how long a command that was killed has to end and to be heard of.
const killTime = 3 * time.Second

// protocols returns HTTP/2 alone, without TLS.
func protocols() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// transport returns the way to the agent through the connections that dial makes.
func transport(dial func(context.Context) (net.Conn, error)) *http.Transport {
	return &http.Transport{
		Protocols:   protocols(),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}
}

// Serve serves the agent, or a Proxy, to whoever connects, until the listener is closed.
func Serve(listener net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, Protocols: protocols(), ErrorLog: log.New(io.Discard, "", 0)}
	defer server.Close()
	return server.Serve(listener)
}

// Proxy shares the machine's port, which it takes over, out among those whom it is served to.
type Proxy struct {
	httputil.ReverseProxy
}

// NewProxy returns a proxy for the machine's port.
func NewProxy(port net.Conn) *Proxy {
	ports := make(chan net.Conn, 1)
	ports <- port
	return &Proxy{httputil.ReverseProxy{
		Transport: transport(func(context.Context) (net.Conn, error) {
			select {
			case port := <-ports:
				return port, nil
			default:
				return nil, errors.New("the machine's port is closed")
			}
		}),
		Rewrite:       func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "machine" },
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "cannot reach the machine: "+err.Error(), http.StatusBadGateway)
		},
	}}
}

// AwaitReady waits until the agent answers.
func (p *Proxy) AwaitReady(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://machine/ready", nil)
	if err != nil {
		return err
	}
	response, err := p.Transport.RoundTrip(request)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

// Args returns the arguments with which a process calls Run, for a proxy that listens at a socket of the unix family.
func Args(socket string, c Command) ([]string, error) {
	text, err := encode(c)
	return []string{socket, text}, err
}

// Run runs a command in the machine, as the process that calls it with these Args: the input, the output and the signals
// are the process's, and it ends as the command does.
func Run(args []string) {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	status, err := run(args, signals)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(125)
	}
	if status.Signaled() {
		signal.Reset(status.Signal())
		_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // it isn't this process that failed
		_ = syscall.Kill(os.Getpid(), status.Signal())
		os.Exit(128 + int(status.Signal()))
	}
	os.Exit(status.ExitStatus())
}

func run(args []string, signals <-chan os.Signal) (syscall.WaitStatus, error) {
	if len(args) != 2 {
		return 0, errors.New("not called with the arguments that Args returns")
	}
	socket := args[0]
	c, err := decode(args[1])
	if err != nil {
		return 0, err
	}
	if c.Input, c.OneOutput, err = connections(); err != nil {
		return 0, err
	}
	text, err := encode(c)
	if err != nil {
		return 0, err
	}
	client := &http.Client{Transport: transport(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	})}
	identifier := rand.Text()
	send := func(path, command string, body io.Reader) (*http.Response, error) {
		request, err := http.NewRequest(http.MethodPost, "http://machine"+path, body)
		if err != nil {
			return nil, err
		}
		request.Header.Set(headerCommand, command)
		request.Header.Set(headerIdentifier, identifier)
		response, err := client.Do(request)
		if err != nil {
			return nil, err
		}
		if response.StatusCode != http.StatusOK {
			defer response.Body.Close()
			message, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
			return nil, errors.New(strings.TrimSpace(string(message)))
		}
		return response, nil
	}

	var input io.Reader
	if c.Input {
		input = struct{ io.Reader }{os.Stdin} // which nobody closes while it is read
	}
	response, err := send("/run", text, input)
	if err != nil {
		return 0, err
	}
	// Its body isn't closed: that would wait for the end of the input.
	go func() {
		for s := range signals {
			number, ok := s.(syscall.Signal)
			if !ok || number == syscall.SIGURG || number == syscall.SIGCHLD || number == syscall.SIGPIPE {
				continue // this process's own business
			}
			if number == Kill {
				number = syscall.SIGKILL
				// What it wrote before can be more than anybody here reads.
				time.AfterFunc(killTime, func() { _ = syscall.Kill(os.Getpid(), syscall.SIGKILL) })
			}
			if response, err := send("/signal/"+strconv.Itoa(int(number)), "", nil); err == nil {
				response.Body.Close()
			}
		}
	}()
	return receive(response.Body)
}

// connections tells what the process's input and output are.
func connections() (input, oneOutput bool, err error) {
	var stat [3]unix.Stat_t
	for i := range stat {
		if err := unix.Fstat(i, &stat[i]); err != nil {
			return false, false, err
		}
	}
	null := stat[0].Mode&unix.S_IFMT == unix.S_IFCHR && stat[0].Rdev == unix.Mkdev(1, 3)
	return !null, stat[1].Dev == stat[2].Dev && stat[1].Ino == stat[2].Ino, nil
}

// receive writes what comes to standard output and error, until the command has ended.
func receive(reader io.Reader) (syscall.WaitStatus, error) {
	var head [5]byte
	for {
		if _, err := io.ReadFull(reader, head[:]); err != nil {
			return 0, fmt.Errorf("cannot hear of the machine any more: %w", err)
		}
		size := binary.BigEndian.Uint32(head[1:])
		output := os.Stdout
		switch head[0] {
		case frameErrors:
			output = os.Stderr
		case frameEnd:
			var status [4]byte
			_, err := io.ReadFull(reader, status[:])
			return syscall.WaitStatus(binary.BigEndian.Uint32(status[:])), err
		}
		if _, err := io.CopyN(output, reader, int64(size)); err != nil {
			return 0, fmt.Errorf("cannot pass on what the command writes: %w", err)
		}
	}
}
