// SPDX-License-Identifier: Apache-2.0

// Command bpfbrokerd is the broker's daemon, see bpfbrokerd(8).
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/bpfbroker/bpfbroker/service"
)

// version is set by the Makefile.
var version = "unreleased"

func main() {
	check := flag.Bool("check-config", false, "check the profiles and exit")
	show := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "bpfbrokerd: takes no arguments")
		os.Exit(2)
	}
	switch {
	case *show:
		fmt.Println("bpfbrokerd", version)
	case *check:
		errs := service.CheckConfig()
		for _, err := range errs {
			fmt.Fprintln(os.Stderr, err)
		}
		if len(errs) > 0 {
			os.Exit(1)
		}
	default:
		if err := service.Run(version); err != nil {
			fmt.Fprintln(os.Stderr, "bpfbrokerd:", err)
			os.Exit(1)
		}
	}
}
