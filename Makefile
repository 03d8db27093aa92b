# SPDX-License-Identifier: Apache-2.0

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBEXECDIR ?= $(PREFIX)/libexec
DATADIR ?= $(PREFIX)/share
MANDIR ?= $(DATADIR)/man
# systemd, polkit and the journal look for a package's files below /usr.
UNITDIR ?= /usr/lib/systemd/system
USERUNITDIR ?= /usr/lib/systemd/user
CATALOGDIR ?= /usr/lib/systemd/catalog
PROFILEDIR ?= /usr/lib/bpfbroker/profiles.d
OBJECTDIR ?= /usr/lib/bpfbroker/objects.d
ELFDIR ?= /usr/lib/bpfbroker/objects
POLKITDIR ?= /usr/share/polkit-1/actions
DBUSDIR ?= /usr/share/dbus-1
# Container engines look there and in /etc, whatever the prefix.
HOOKDIR ?= /usr/share/containers/oci/hooks.d
VERSION ?= 0.1
GO ?= go
GOARCH ?= $(shell $(GO) env GOARCH)
BUILD ?= build

export CGO_ENABLED = 0
GOBUILD = $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION) -X main.exporter=$(LIBEXECDIR)/bpfbroker-export'
STATICCHECK = $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The manual, if there is something to make it with.
MAN = $(if $(shell command -v scdoc),bpfbroker.1 bpfbroker-profiles.5 bpfbroker-objects.5 bpfbrokerd.8)

all: $(BUILD)/bpfbroker $(BUILD)/bpfbroker-export $(BUILD)/bpfbrokerd $(BUILD)/bpfbroker.service $(BUILD)/bpfbroker-cdi.service $(BUILD)/bpfbroker-export.service $(BUILD)/bpfbroker.json $(MAN:%=$(BUILD)/man/%)

# Go knows best what has changed.
.PHONY: FORCE
FORCE:

$(BUILD)/%: FORCE
	$(GOBUILD) -o $@ ./cmd/$*

$(BUILD)/bpfbroker-export: FORCE
	$(GOBUILD) -tags export -o $@ ./cmd/bpfbroker

# PREFIX may have changed, too.
$(BUILD)/%.service: units/%.service.in FORCE
	mkdir -p $(BUILD)
	sed 's|@BINDIR@|$(BINDIR)|; s|@LIBEXECDIR@|$(LIBEXECDIR)|' $< >$@

$(BUILD)/%.json: packaging/oci/%.json.in FORCE
	mkdir -p $(BUILD)
	sed 's|@BINDIR@|$(BINDIR)|' $< >$@

$(BUILD)/man/%: packaging/man/%.scd Makefile
	mkdir -p $(@D)
	sed 's|@LIBEXECDIR@|$(LIBEXECDIR)|' $< | scdoc >$@

# Other architectures have it when somebody writes their system calls' names down.
SYSCALLS = $(wildcard bpf/objects/syscall-latency-$(GOARCH).bpf.o)

install: all
	install -D -m 0755 -t $(DESTDIR)$(BINDIR) $(BUILD)/bpfbroker
	install -D -m 0755 -t $(DESTDIR)$(LIBEXECDIR) $(BUILD)/bpfbrokerd $(BUILD)/bpfbroker-export
	install -D -m 0644 -t $(DESTDIR)$(UNITDIR) units/bpfbroker.socket $(BUILD)/bpfbroker.service $(BUILD)/bpfbroker-cdi.service
	install -D -m 0644 -t $(DESTDIR)$(POLKITDIR) polkit/org.bpfbroker.policy
	install -D -m 0644 -t $(DESTDIR)$(DBUSDIR)/system.d packaging/dbus/org.bpfbroker.Broker1.conf
	install -D -m 0644 -t $(DESTDIR)$(DBUSDIR)/system-services packaging/dbus/org.bpfbroker.Broker1.service
	install -D -m 0644 -t $(DESTDIR)$(DBUSDIR)/interfaces packaging/dbus/org.bpfbroker.Broker1.xml
	install -D -m 0644 -t $(DESTDIR)$(CATALOGDIR) packaging/journal/bpfbroker.catalog
	install -D -m 0644 -t $(DESTDIR)$(PROFILEDIR) packaging/profiles/*.profile
	install -D -m 0644 -t $(DESTDIR)$(USERUNITDIR) units/bpfbroker-export.socket $(BUILD)/bpfbroker-export.service
	install -D -m 0644 -t $(DESTDIR)$(ELFDIR) bpf/objects/execs.bpf.o bpf/objects/tcp-connections.bpf.o
	install -D -m 0644 -t $(DESTDIR)$(OBJECTDIR) packaging/objects/execs.object packaging/objects/tcp-connections.object
ifneq ($(SYSCALLS),)
	install -m 0644 $(SYSCALLS) $(DESTDIR)$(ELFDIR)/syscall-latency.bpf.o
	install -m 0644 -t $(DESTDIR)$(OBJECTDIR) packaging/objects/syscall-latency.object
endif
	install -D -m 0644 -t $(DESTDIR)$(DATADIR)/doc/bpfbroker/polkit polkit/examples/*.rules
	install -D -m 0644 -t $(DESTDIR)$(DATADIR)/doc/bpfbroker/units units/examples/profile.conf
	install -D -m 0644 -t $(DESTDIR)$(HOOKDIR) $(BUILD)/bpfbroker.json
	install -d -m 0755 $(DESTDIR)/etc/bpfbroker/profiles.d $(DESTDIR)/etc/bpfbroker/objects.d
	for page in $(MAN); do install -D -m 0644 -t $(DESTDIR)$(MANDIR)/man$${page##*.} $(BUILD)/man/$$page || exit 1; done
	install -d -m 0755 $(DESTDIR)$(DATADIR)/bash-completion/completions $(DESTDIR)$(DATADIR)/zsh/site-functions $(DESTDIR)$(DATADIR)/fish/vendor_completions.d
	$(BUILD)/bpfbroker completion bash >$(DESTDIR)$(DATADIR)/bash-completion/completions/bpfbroker
	$(BUILD)/bpfbroker completion zsh >$(DESTDIR)$(DATADIR)/zsh/site-functions/_bpfbroker
	$(BUILD)/bpfbroker completion fish >$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/bpfbroker.fish

# What the tests run in their machines.
install-programs: $(BUILD)/count.bpf.o $(BUILD)/exits.bpf.o
	$(GOBUILD) -o $(BUILD)/programs/ ./test/programs/...
	install -D -m 0755 -t $(DESTDIR)/usr/local/bin $(BUILD)/programs/*
	install -D -m 0644 -t $(DESTDIR)/usr/local/lib $(BUILD)/count.bpf.o $(BUILD)/exits.bpf.o service/internal/catalog/testdata/*.bpf.o

$(BUILD)/%.bpf.o: test/programs/%.bpf.c
	mkdir -p $(BUILD)
	clang -O2 -g -target bpf -mcpu=v3 -c $< -o $@

# The guard stays in the kernel: see README.
uninstall:
	rm -f $(DESTDIR)$(BINDIR)/bpfbroker $(DESTDIR)$(LIBEXECDIR)/bpfbrokerd $(DESTDIR)$(LIBEXECDIR)/bpfbroker-export
	rm -f $(DESTDIR)$(UNITDIR)/bpfbroker.socket $(DESTDIR)$(UNITDIR)/bpfbroker.service $(DESTDIR)$(UNITDIR)/bpfbroker-cdi.service $(DESTDIR)$(HOOKDIR)/bpfbroker.json
	rm -f $(DESTDIR)$(POLKITDIR)/org.bpfbroker.policy $(DESTDIR)$(CATALOGDIR)/bpfbroker.catalog
	rm -f $(DESTDIR)$(DBUSDIR)/system.d/org.bpfbroker.Broker1.conf $(DESTDIR)$(DBUSDIR)/system-services/org.bpfbroker.Broker1.service
	rm -f $(DESTDIR)$(DBUSDIR)/interfaces/org.bpfbroker.Broker1.xml
	rm -f $(DESTDIR)$(USERUNITDIR)/bpfbroker-export.socket $(DESTDIR)$(USERUNITDIR)/bpfbroker-export.service
	rm -rf $(DESTDIR)$(OBJECTDIR) $(DESTDIR)$(ELFDIR)
	rm -rf $(DESTDIR)$(PROFILEDIR) $(DESTDIR)$(DATADIR)/doc/bpfbroker
	rm -f $(DESTDIR)$(MANDIR)/man1/bpfbroker.1 $(DESTDIR)$(MANDIR)/man5/bpfbroker-profiles.5 $(DESTDIR)$(MANDIR)/man5/bpfbroker-objects.5 $(DESTDIR)$(MANDIR)/man8/bpfbrokerd.8
	rm -f $(DESTDIR)$(DATADIR)/bash-completion/completions/bpfbroker $(DESTDIR)$(DATADIR)/zsh/site-functions/_bpfbroker
	rm -f $(DESTDIR)$(DATADIR)/fish/vendor_completions.d/bpfbroker.fish

clean:
	rm -rf $(BUILD)

# BPF programs are in the repository as clang makes them, since who builds
# bpfbroker needs no clang. System calls have other numbers on each architecture.
OBJECTS = execs tcp-connections syscall-latency-amd64 syscall-latency-arm64
COMPILED = $(OBJECTS:%=bpf/objects/%.bpf.o) $(patsubst %.c,%.o,$(wildcard service/internal/catalog/testdata/*.bpf.c))
COMPILEDFROM = bpf/bpf.go bpf/guard.bpf.c bpf/kernel.h bpf/objects/*.[ch] service/internal/catalog/testdata/*.c

generate: compile
	{ echo "# $$(clang --version | head -n 1)"; sha256sum $(COMPILEDFROM) $(COMPILED) bpf/guard_bpfel.*; } >bpf/generated.sha256

# Each clang makes other bytes. The sums show also with another one whether what
# is in the repository was made from its source.
check-generate:
	sha256sum --check --quiet bpf/generated.sha256
	$(MAKE) compile COMPILETO=$(BUILD)/generated/
	if grep -Fqx "# $$(clang --version | head -n 1)" bpf/generated.sha256; then cd $(BUILD)/generated && grep -E '\.o$$|_bpfel\.go$$' $(CURDIR)/bpf/generated.sha256 | sha256sum --check --quiet; fi

compile: $(COMPILED:%=$(COMPILETO)%)
	BPF_OUT=$(abspath $(COMPILETO)bpf) $(GO) generate ./bpf

CLANG_BPF = mkdir -p $(@D) && clang -O2 -g -Wall -Werror -target bpf -mcpu=v3 -fdebug-prefix-map=$(CURDIR)=.

$(COMPILETO)bpf/objects/syscall-latency-%.bpf.o: FORCE
	$(CLANG_BPF) -DARCH_$* -c bpf/objects/syscall-latency.bpf.c -o $@
	llvm-strip -g $@

$(COMPILETO)%.bpf.o: FORCE
	$(CLANG_BPF) -c $*.bpf.c -o $@
	llvm-strip -g $@

# What can be checked without privileges.
check:
	@unformatted=$$(gofmt -l bpf cmd packaging service test units); [ -z "$$unformatted" ] || { echo "not gofmt-clean: $$unformatted" >&2; exit 1; }
	$(GO) mod tidy -diff
	$(GO) vet ./cmd/bpfbroker
	$(GO) vet -tags root,kernels,export ./...
	$(STATICCHECK) -tags root,kernels,export ./...
	$(GO) test -tags export ./bpf/... ./cmd/... ./packaging/... ./service/... ./units/...

# Everything from here on needs root, the network and a Debian, and installs
# with apt what is missing.

# All tests: what needs no privileges, then the layers that need root, then a
# machine, then other kernels.
test:
	test/setup $(TEST_PACKAGES)
	shellcheck test/setup test/machines/recipe.sh .ci/run
	xmllint --noout polkit/org.bpfbroker.policy
	$(MAKE) check check-generate
	$(GO) test -tags root ./service/internal/kernel ./service/internal/delegate ./service/internal/grant ./service/internal/broker ./service/internal/catalog ./bpf/objects ./service/client/...
	$(GO) test -tags root,export ./cmd/bpfbroker
	$(GO) test -count=1 ./test/machines ./test/scenarios
	$(MAKE) test-kernels

TEST_PACKAGES = make clang llvm curl scdoc man-db dbus procps shellcheck libxml2-utils e2fsprogs xz-utils qemu-system-x86

# The same on Debian's kernels, in QEMU: suites alone, and a whole system.
test-kernels:
	test/setup make clang e2fsprogs xz-utils qemu-system-x86
	cd test/kernels && $(GO) test -count=1 -tags kernels -timeout 28m

# All scenarios in an emulated system, of which "make test" has time for a share.
test-systems:
	test/setup make clang e2fsprogs xz-utils qemu-system-x86
	$(GO) test -count=1 -tags kernels -timeout 60m ./test/scenarios

# The guard's tests there, with a million swaps and ten thousand grants.
test-attacks:
	test/setup make clang e2fsprogs xz-utils qemu-system-x86
	cd test/kernels && BPFBROKER_TEST_ATTACKS=full $(GO) test -count=1 -tags kernels -timeout 2h -run 'TestSuites/.*/guard$$'

demo:
	test/setup make clang
	$(GO) run ./test/demo

bench:
	test/setup make clang gcc libc6-dev e2fsprogs xz-utils qemu-system-x86
	$(GO) run ./test/bench
	$(GO) test -tags root -run '^$$' -bench . ./service/client/export

.PHONY: all install install-programs generate check-generate compile uninstall clean check test test-kernels test-systems test-attacks demo bench
