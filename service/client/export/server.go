// SPDX-License-Identifier: Apache-2.0

package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Limits of the server.
const (
	maxScrapes     = 2 // under way; others get 503
	maxConnections = 32
	maxHeader      = 8 << 10
	requestTime    = 5 * time.Second // for a request to arrive
	scrapeTime     = 10 * time.Second
	answerTime     = 30 * time.Second // for an answer to be taken
)

// Listen takes the socket that systemd passes to the process. If there is none
// it listens at an address of TCP (HOST:PORT), or if that is an absolute path on
// a Unix socket, which is for the user alone. The caller closes it.
func Listen(address string) (net.Listener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("cannot take systemd's socket: %w", err)
	}
	if len(passed) == 1 && passed[0] != nil {
		return passed[0], nil
	}
	if len(passed) > 0 {
		return nil, errors.New("cannot take systemd's socket: it is to be one that accepts connections")
	}
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
		defer syscall.Umask(syscall.Umask(0o177))
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %w", err)
	}
	return l, nil
}

// Serve answers requests for /metrics until the context ends, and closes the
// listener. It tells systemd that it is ready.
func (e *Exporter) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler:           e.Handler(l.Addr()),
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      answerTime,
		MaxHeaderBytes:    maxHeader,
	}
	// Who is done makes room for others.
	server.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.Background(), scrapeTime)
		defer cancel()
		_ = server.Shutdown(ctx)
		_ = server.Close()
	})
	defer stop()
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		slog.Warn("cannot notify systemd", "error", err)
	}
	err := server.Serve(&limited{Listener: l, free: make(chan struct{}, maxConnections)})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("cannot serve: %w", err)
}

// Handler answers requests for /metrics that come to an address.
func (e *Exporter) Handler(address net.Addr) http.Handler {
	metrics := promhttp.HandlerFor(prometheus.GathererFunc(e.Gather), promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes,
		Timeout:             scrapeTime,
		EnableOpenMetrics:   true,
	})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	if !isLoopback(address.String()) {
		return mux
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A page in a browser on this machine may reach it by a name of the
		// page's own, and read the answer.
		if r.Host != "" && !isLoopback(r.Host) {
			http.Error(w, "This address has no such host.", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// isLoopback says whether a host, with a port perhaps, is this machine by an
// address or name that nobody else can give it.
func isLoopback(hostPort string) bool {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		host = strings.Trim(hostPort, "[]")
	}
	address, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && address.IsLoopback()
}

// limited is a listener that waits while there are too many connections.
type limited struct {
	net.Listener
	free chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	l.free <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &counted{Conn: c, free: l.free}, nil
}

type counted struct {
	net.Conn
	free chan struct{}
	once sync.Once
}

func (c *counted) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { <-c.free })
	return err
}
