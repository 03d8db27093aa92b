// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

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
			for _, word := range args {
				if _, _, err := a.splitMap(word); err != nil {
					return err
				}
			}
			return a.export(command.Context(), address, args)
		},
	}
	command.Flags().StringVar(&address, "listen", "127.0.0.1:9436", "HOST:PORT, or the absolute path of a Unix socket")
	return command
}
