// SPDX-License-Identifier: Apache-2.0

// What the measuring programs have in common. For each line that one reads, it
// takes a sample and prints how long that took, in nanoseconds: so the reader
// of the samples decides which program has its turn.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline void check(int good, const char *what)
{
	if (good)
		return;
	fprintf(stderr, "cannot %s: %s\n", what, strerror(errno));
	exit(1);
}

static inline int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

// wanted waits until a sample is wanted, and returns 0 when none will be.
static inline int wanted(void)
{
	char line[16];

	return fgets(line, sizeof(line), stdin) != NULL;
}

static inline void answer(int64_t nanoseconds)
{
	printf("%lld\n", (long long)nanoseconds);
	check(fflush(stdout) == 0, "print a sample");
}

// make_token makes a BPF token of a detached BPF file system. bpf.h of an
// older system doesn't know it (Linux 6.9).
static inline int make_token(int mount)
{
	struct {
		uint32_t flags, bpffs;
	} attr = {0};
	const int bpf_token_create = 36;
	int directory, token;

	directory = openat(mount, ".", O_DIRECTORY | O_CLOEXEC);
	check(directory >= 0, "open the BPF file system");
	attr.bpffs = directory;
	token = syscall(SYS_bpf, bpf_token_create, &attr, sizeof(attr));
	check(token >= 0, "create a token");
	close(directory);
	return token;
}

static inline void send_byte(int socket)
{
	check(send(socket, "", 1, MSG_NOSIGNAL) == 1, "send");
}

// receive appends to the buffer what one recvmsg brings, and returns its
// length. A file descriptor that came along goes to *file.
static inline ssize_t receive(int socket, char *buffer, size_t size, int *file)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec data = {.iov_base = buffer, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &data,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	check(n > 0, "receive");
	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(file, CMSG_DATA(header), sizeof(int));
	return n;
}
