// SPDX-License-Identifier: Apache-2.0

// Command token-client uses the Go client as a program of a user's would.
//
//	token-client mount PID PROFILE PATH   mount a token in a process's namespaces
//	token-client token PROFILE            get a token for its own namespace and hold
//	                                      it until its standard input ends
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		var refused *client.Error
		if errors.As(err, &refused) {
			fmt.Println(refused.Name, refused.Layer)
		}
		fmt.Fprintln(os.Stderr, "token-client:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	c := client.New()
	defer c.Close()
	switch {
	case len(args) == 4 && args[0] == "mount":
		pid, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		pidfd := os.NewFile(uintptr(fd), "pidfd")
		defer pidfd.Close()
		g, err := c.MountToken(ctx, args[2], pidfd, args[3])
		if err != nil {
			return err
		}
		fmt.Println(g.ID)
		return nil
	case len(args) == 2 && args[0] == "token":
		g, token, err := c.Token(ctx, args[1])
		if err != nil {
			return err
		}
		defer token.Close()
		info, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", token.Fd()))
		if err != nil {
			return err
		}
		defer info.Close()
		text := g.ID + "\n"
		for lines := bufio.NewScanner(info); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "allowed_") {
				text += lines.Text() + "\n"
			}
		}
		fmt.Print(text)
		_, err = bufio.NewReader(os.Stdin).ReadString(0)
		_ = err // the end of the input
		return nil
	}
	return errors.New("cannot understand the arguments")
}
