// SPDX-License-Identifier: Apache-2.0

// Package service is the daemon: it is activated by a socket, serves the
// fronts, and exits when there is nothing left to do.
package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/bus"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/limit"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/varlink"
)

const (
	// stateDir is where the ledger is. systemd makes its parent
	// (RuntimeDirectory=).
	stateDir = "/run/bpfbroker/grants"
	// guardDir is where the guard is pinned.
	guardDir = "/sys/fs/bpf/bpfbroker/guard"
	// objectsDir has what objects are pinned as, and objectUsersDir the processes
	// that they are kept for.
	objectsDir     = "/sys/fs/bpf/bpfbroker/objects"
	objectUsersDir = "/run/bpfbroker/objects"
	// socketName is the name that bpfbroker.socket gives the socket
	// (FileDescriptorName=).
	socketName = "varlink"
	// idleTime is how long nobody has to have been connected before the
	// daemon exits, as with systemd's own bus-activated services.
	idleTime = 30 * time.Second
)

// Run serves until SIGTERM, SIGINT or idleness. It needs the listening socket
// from systemd (sd_listen_fds(3)).
func Run(version string) error {
	var level slog.LevelVar
	slog.SetDefault(slog.New(journal.NewHandler(&level)))
	helpersDied := make(chan struct{})
	if err := kernel.StartHelpers(func() { close(helpersDied) }); err != nil {
		return err
	}
	// Before READY=1, from which on systemd may send it.
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	signals, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	listener, err := listen()
	if err != nil {
		return err
	}
	defer listener.Close()
	if initial, err := kernel.InInitialUserNamespace(); err != nil || !initial {
		return errors.Join(errors.New("cannot delegate anything: not in the initial user namespace"), err)
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return fmt.Errorf("cannot make the ledger's directory: %w", err)
	}
	polkit := authority.New()
	defer polkit.Close()
	g, noGuard := openGuard()
	b, err := broker.New(polkit, profile.Load(profile.DefaultDirs()), stateDir, g, noGuard)
	if err != nil {
		return err
	}
	defer b.Close()
	objects, err := catalog.New(objectsDir, objectUsersDir)
	if err != nil {
		return err
	}
	defer objects.Close()
	b.Publish(objects)
	// Before READY=1: what is loaded at boot is there for units after this one.
	b.SetObjects(catalog.Load(catalog.DefaultDirs()))
	users := limit.NewUsers(limit.Requests, limit.Rate, limit.Burst)
	socket, err := varlink.NewFront(b, users, version)
	if err != nil {
		return err
	}
	bus, err := bus.New(bus.Config{Broker: b, Users: users, OpenProcess: kernel.OpenProcess, LogLevel: &level})
	if err != nil {
		return err
	}

	ctx, cancel := context.WithCancelCause(signals)
	var reloading sync.WaitGroup
	// Before the broker is closed: it ends grants.
	defer reloading.Wait()
	defer cancel(nil)
	reloading.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-reload:
			}
			notify(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
			b.SetProfiles(profile.Load(profile.DefaultDirs()))
			b.SetObjects(catalog.Load(catalog.DefaultDirs()))
			notify(daemon.SdNotifyReady)
		}
	})
	go func() {
		waitIdle(ctx, b.Busy, socket, bus)
		notify(daemon.SdNotifyStopping)
		cancel(nil)
	}()
	go watchdog(ctx)
	go func() {
		select {
		case <-ctx.Done():
		case <-helpersDied:
			cancel(errors.New("cannot work in targets any more: somebody killed the process that does"))
		}
	}()

	served := make(chan error, 1)
	go func() { served <- bus.Serve(ctx) }()
	notify(daemon.SdNotifyReady)
	err = socket.Serve(ctx, listener)
	cancel(nil)
	// A signal is what should end it.
	if cause := context.Cause(ctx); cause != context.Canceled && signals.Err() == nil {
		err = errors.Join(err, cause)
	}
	return errors.Join(err, <-served)
}

// openGuard takes over the guard, or loads it. Where there can be none it says why:
// profiles that don't need it are served all the same.
func openGuard() (*guard.Guard, error) {
	g, err := guard.Open(guardDir)
	if errors.Is(err, syscall.EROFS) {
		err = &guard.Unavailable{Reason: "there is no directory for the guard", Remedy: "restart bpfbroker.socket, which makes it", Err: err}
	}
	var unavailable *guard.Unavailable
	switch {
	case errors.As(err, &unavailable):
		slog.Info("there is no guard", "reason", err)
	case err != nil:
		slog.Error("there is no guard", "error", err)
	}
	if err == nil {
		// The kernel's types took more memory than all the rest.
		debug.FreeOSMemory()
	}
	return g, err
}

// CheckConfig returns what is wrong with the profiles and the objects. It looks
// into the objects' ELF files and loads nothing.
func CheckConfig() []error {
	errs := profile.Load(profile.DefaultDirs()).Errors()
	return append(errs, catalog.Check(catalog.Load(catalog.DefaultDirs()))...)
}

// listen takes the socket over from systemd, which goes on listening on it
// when the daemon has gone.
func listen() (*net.UnixListener, error) {
	named, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("cannot take over sockets: %w", err)
	}
	if len(named) != 1 || len(named[socketName]) != 1 {
		return nil, errors.New("cannot serve: bpfbroker.socket has to start the service")
	}
	listener, ok := named[socketName][0].(*net.UnixListener)
	if !ok {
		return nil, errors.New("cannot serve: the socket is not a Unix stream socket")
	}
	listener.SetUnlinkOnClose(false)
	return listener, nil
}

// front is what a front says of its work: whether there is none, and since when.
type front interface{ IdleSince() (time.Time, bool) }

// waitIdle returns when ctx ends, or when nobody has been connected for a
// while and there is nothing whose end the daemon would have to see to.
func waitIdle(ctx context.Context, busy func() bool, fronts ...front) {
	wait := idleTime
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = idleTime
		idle := !busy()
		var last time.Time
		for _, front := range fronts {
			since, quiet := front.IdleSince()
			idle = idle && quiet
			if since.After(last) {
				last = since
			}
		}
		if idle {
			if wait = idleTime - time.Since(last); wait <= 0 {
				return
			}
		}
	}
}

// watchdog tells systemd that the daemon is alive, if it wants to know
// (WatchdogSec=).
func watchdog(ctx context.Context) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return
	}
	for {
		notify(daemon.SdNotifyWatchdog)
		select {
		case <-ctx.Done():
			return
		case <-time.After(interval / 2):
		}
	}
}

func notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		slog.Warn("cannot notify systemd", "error", err)
	}
}
