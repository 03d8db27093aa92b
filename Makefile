# SPDX-License-Identifier: Apache-2.0

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBEXECDIR ?= $(PREFIX)/libexec
DATADIR ?= $(PREFIX)/share
# systemd, polkit and the journal look for a package's files below /usr.
UNITDIR ?= /usr/lib/systemd/system
CATALOGDIR ?= /usr/lib/systemd/catalog
PROFILEDIR ?= /usr/lib/bpfbroker/profiles.d
POLKITDIR ?= /usr/share/polkit-1/actions
VERSION ?= 0.1
GO ?= go
BUILD ?= build

export CGO_ENABLED = 0
GOBUILD = $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)'
STATICCHECK = $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2

all: $(BUILD)/bpfbroker $(BUILD)/bpfbrokerd $(BUILD)/bpfbroker.service

# Go knows best what has changed.
.PHONY: FORCE
FORCE:

$(BUILD)/%: FORCE
	$(GOBUILD) -o $@ ./cmd/$*

$(BUILD)/bpfbroker.service: units/bpfbroker.service.in Makefile
	mkdir -p $(BUILD)
	sed 's|@LIBEXECDIR@|$(LIBEXECDIR)|' units/bpfbroker.service.in >$@

install: all
	install -D -m 0755 -t $(DESTDIR)$(BINDIR) $(BUILD)/bpfbroker
	install -D -m 0755 -t $(DESTDIR)$(LIBEXECDIR) $(BUILD)/bpfbrokerd
	install -D -m 0644 -t $(DESTDIR)$(UNITDIR) units/bpfbroker.socket $(BUILD)/bpfbroker.service
	install -D -m 0644 -t $(DESTDIR)$(POLKITDIR) polkit/org.bpfbroker.policy
	install -D -m 0644 -t $(DESTDIR)$(CATALOGDIR) packaging/journal/bpfbroker.catalog
	install -D -m 0644 -t $(DESTDIR)$(PROFILEDIR) packaging/profiles/*.profile
	install -D -m 0644 -t $(DESTDIR)$(DATADIR)/doc/bpfbroker/polkit polkit/examples/*.rules
	install -d -m 0755 $(DESTDIR)/etc/bpfbroker/profiles.d

# What the tests run in their machines.
install-programs: $(BUILD)/count.bpf.o
	$(GOBUILD) -o $(BUILD)/ebpf-example ./test/programs/ebpf-example
	install -D -m 0755 -t $(DESTDIR)/usr/local/bin $(BUILD)/ebpf-example
	install -D -m 0644 -t $(DESTDIR)/usr/local/lib $(BUILD)/count.bpf.o

$(BUILD)/%.bpf.o: test/programs/%.bpf.c
	mkdir -p $(BUILD)
	clang -O2 -g -target bpf -mcpu=v3 -c $< -o $@

uninstall:
	rm -f $(DESTDIR)$(BINDIR)/bpfbroker $(DESTDIR)$(LIBEXECDIR)/bpfbrokerd
	rm -f $(DESTDIR)$(UNITDIR)/bpfbroker.socket $(DESTDIR)$(UNITDIR)/bpfbroker.service
	rm -f $(DESTDIR)$(POLKITDIR)/org.bpfbroker.policy $(DESTDIR)$(CATALOGDIR)/bpfbroker.catalog
	rm -rf $(DESTDIR)$(PROFILEDIR) $(DESTDIR)$(DATADIR)/doc/bpfbroker

clean:
	rm -rf $(BUILD)

# Everything from here on needs root, the network and a Debian.

# What can be checked without privileges.
check:
	@unformatted=$$(gofmt -l cmd service test); [ -z "$$unformatted" ] || { echo "not gofmt-clean: $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(STATICCHECK) ./...
	$(GO) test ./cmd/... ./service/...

demo:
	test/setup make clang
	$(GO) run ./test/demo

.PHONY: all install install-programs uninstall clean check demo
