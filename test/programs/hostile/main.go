// SPDX-License-Identifier: Apache-2.0

// Command hostile does to the broker what no client should, to its socket:
//
//	hostile raw TEXT…       send each text with a NUL, print the answers
//	hostile flood BYTES     send so much without a NUL, print the answer
//	hostile fds N TEXT      send a text with N file descriptors, print the answer
//	hostile hold N          open N connections, print how many the broker kept open,
//	                        hold them until standard input ends
//	hostile half            send half a message, hold it until the broker hangs up
//	hostile deaf            send calls and never read, until the broker hangs up
//	hostile open N OBJECT MAP
//	                        have N users open a published map at once, print how
//	                        many could and what the others heard; for root
//	hostile stop PID        stop the processes that the daemon with that id starts,
//	                        until standard input ends
//
// and to the broker on the bus:
//
//	hostile bus-nonsense [ID|PID]…  call every method wrongly, print the errors
//	hostile bus-fds N       send N messages with file descriptors, print the errors
//	hostile bus-crowd N     keep N calls under way until standard input ends
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const socket = "/run/bpfbroker/org.bpfbroker.Broker"

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		os.Exit(1)
	}
}

func run(what string, args []string) error {
	if strings.HasPrefix(what, "bus-") {
		return onBus(what, args)
	}
	if what == "stop" {
		return stop(args[0])
	}
	if what == "hold" || what == "open" {
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		if what == "open" {
			return open(n, args[1], args[2])
		}
		return hold(n)
	}
	conn, err := dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	answers := bufio.NewReader(conn)
	switch what {
	case "raw":
		for _, text := range args {
			if _, err := conn.Write([]byte(text + "\x00")); err != nil {
				return err
			}
			if err := printAnswer(answers); err != nil {
				return err
			}
		}
		return nil
	case "flood":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		// The broker stops reading long before the end.
		_, _ = conn.Write([]byte(strings.Repeat("x", n)))
		return printAnswer(answers)
	case "fds":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		rights := syscall.UnixRights(make([]int, n)...) // standard input, N times
		if _, _, err := conn.WriteMsgUnix([]byte(args[1]+"\x00"), rights, nil); err != nil {
			return err
		}
		return printAnswer(answers)
	case "half":
		if _, err := conn.Write([]byte(`{"method":"org.varlink.serv`)); err != nil {
			return err
		}
		return hungUp(conn)
	case "deaf":
		call := []byte(`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.bpfbroker.Broker"}}` + "\x00")
		for {
			if _, err := conn.Write(call); err != nil {
				return nil
			}
		}
	}
	return errors.New("cannot understand the arguments")
}

func dial() (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
}

func printAnswer(answers *bufio.Reader) error {
	answer, err := answers.ReadString(0)
	if err != nil {
		return fmt.Errorf("cannot read an answer: %w", err)
	}
	fmt.Println(strings.TrimSuffix(answer, "\x00"))
	return nil
}

func hungUp(conn *net.UnixConn) error {
	_, err := conn.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("the broker did not hang up: %w", err)
}

func hold(n int) error {
	kept := 0
	var all []net.Conn
	for range n {
		conn, err := dial()
		if err != nil {
			return err
		}
		all = append(all, conn)
		// A refusal is there as soon as the connection has been accepted; who is
		// kept hears nothing until it asks.
		if _, err := conn.Write([]byte(`{"method":"org.varlink.service.GetInfo"}` + "\x00")); err != nil {
			continue
		}
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		answer, err := bufio.NewReader(conn).ReadString(0)
		if err == nil && !strings.Contains(answer, `"error"`) {
			kept++
		}
	}
	fmt.Println(kept)
	_, err := io.Copy(io.Discard, os.Stdin)
	for _, conn := range all {
		_ = conn.Close()
	}
	return err
}

// stop stops whatever the daemon starts, as far as that is allowed, until standard
// input ends.
func stop(daemon string) error {
	fmt.Println("ready")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		files, err := filepath.Glob("/proc/" + daemon + "/task/*/children")
		if err != nil {
			return err
		}
		for _, file := range files {
			children, _ := os.ReadFile(file) // the thread may have gone
			for child := range strings.FieldsSeq(string(children)) {
				if pid, err := strconv.Atoi(child); err == nil {
					_ = syscall.Kill(pid, syscall.SIGSTOP)
				}
			}
		}
	}
}
