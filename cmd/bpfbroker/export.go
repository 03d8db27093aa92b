// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/export"
)

func (a *app) exportCommand() *cobra.Command {
	var address string
	command := &cobra.Command{
		Use:   "export [--listen ADDRESS] NAME/MAP…",
		Short: "Serve maps as OpenMetrics",
		Long: `Serve maps as OpenMetrics over HTTP, at /metrics, until SIGINT or SIGTERM. With
a socket from systemd it serves there.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeMaps,
		RunE: func(command *cobra.Command, args []string) error {
			var maps []export.Map
			for _, word := range args {
				object, name, err := a.splitMap(word)
				if err != nil {
					return err
				}
				maps = append(maps, export.Map{Object: object, Name: name})
			}
			ctx, stop := signal.NotifyContext(command.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return a.export(ctx, address, maps)
		},
	}
	command.Flags().StringVar(&address, "listen", "127.0.0.1:9436", "HOST:PORT, or the absolute path of a Unix socket")
	return command
}

// export serves maps. Nobody is asked for a password: there may be nobody when a
// map is opened again.
func (a *app) export(ctx context.Context, address string, maps []export.Map) error {
	c := a.client()
	defer c.Close()
	e, err := export.New(ctx, func(ctx context.Context, m export.Map) (*client.Table, error) {
		return c.OpenTable(ctx, m.Object, m.Name)
	}, maps)
	if err != nil {
		return err
	}
	defer e.Close()
	l, err := export.Listen(address)
	if err != nil {
		return err
	}
	return e.Serve(ctx, l)
}
