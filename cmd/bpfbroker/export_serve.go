// SPDX-License-Identifier: Apache-2.0

//go:build export

package main

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/export"
)

// export serves maps. Nobody is asked for a password: there may be nobody when a
// map is opened again.
func (a *app) export(ctx context.Context, address string, words []string) error {
	var maps []export.Map
	for _, word := range words {
		object, name, err := a.splitMap(word)
		if err != nil {
			return err
		}
		maps = append(maps, export.Map{Object: object, Name: name})
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
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
