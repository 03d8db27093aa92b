// SPDX-License-Identifier: Apache-2.0

// A client that speaks just enough Varlink:
//
//	client call SOCKET          from the connection to the answer of GetInfo
//	client token SOCKET PROFILE from the connection to the token
//	client lookups SOCKET OBJECT MAP UID PIN
//	                            1000 lookups in a published map
//	client crowd SOCKET PROFILE COUNT
//
// All but the last take samples. For a token the client has to be in namespaces
// of its user's. A crowd is that many processes, each of which makes
// namespaces of its own and gets a token; it prints their number when all of
// them have one, and lives until the end of its input.
#define _GNU_SOURCE
#include <sched.h>
#include <sys/prctl.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <linux/bpf.h>
#include <signal.h>

#include "sample.h"

static int dial(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	check(s >= 0, "make a socket");
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	check(connect(s, (struct sockaddr *)&address, sizeof(address)) == 0, "connect");
	return s;
}

// call sends a call and waits for its answer, which must not be an error. It
// returns the file descriptor that came with the answer, or -1.
static int call(int s, const char *request)
{
	char reply[65536];
	size_t length = 0, size = strlen(request) + 1;
	int file = -1;

	check(send(s, request, size, MSG_NOSIGNAL) == (ssize_t)size, "send");
	do
		length += receive(s, reply + length, sizeof(reply) - length, &file);
	while (reply[length - 1] != 0);
	if (strstr(reply, "\"error\"")) {
		fprintf(stderr, "refused: %s\n", reply);
		exit(1);
	}
	return file;
}

static void get_info(const char *path)
{
	int s = dial(path);

	call(s, "{\"method\":\"org.varlink.service.GetInfo\"}");
	close(s);
}

static int acquire_token(const char *path, const char *profile)
{
	char request[256];
	int s, mount, token;

	snprintf(request, sizeof(request),
		 "{\"method\":\"org.bpfbroker.Broker.AcquireToken\",\"parameters\":{\"profile\":\"%s\"}}", profile);
	s = dial(path);
	mount = call(s, request);
	check(mount >= 0, "get a mount");
	token = make_token(mount);
	close(mount);
	close(s);
	return token;
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), path);
	close(fd);
}

static void enter_namespaces(void)
{
	char uids[64], gids[64];

	snprintf(uids, sizeof(uids), "0 %d 1\n", (int)getuid());
	snprintf(gids, sizeof(gids), "0 %d 1\n", (int)getgid());
	check(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, "make namespaces");
	write_file("/proc/self/uid_map", uids);
	write_file("/proc/self/setgroups", "deny");
	write_file("/proc/self/gid_map", gids);
}

// join starts one of a crowd and waits until it has its token. It ends with
// its parent.
static void join(const char *path, const char *profile)
{
	int pair[2];
	char byte;
	pid_t pid;

	check(pipe2(pair, O_CLOEXEC) == 0, "make a pipe");
	pid = fork();
	check(pid >= 0, "fork");
	if (pid == 0) {
		enter_namespaces();
		// Only now: a change of credentials clears it.
		check(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0, "arrange for the end");
		acquire_token(path, profile);
		check(write(pair[1], "", 1) == 1, "report");
		for (;;)
			pause();
	}
	close(pair[1]);
	check(read(pair[0], &byte, 1) == 1, "get a token in each process");
	close(pair[0]);
}

// open_published opens a map for reading as a user without rights. It is a child
// that asks, which shares its descriptors with us.
static int open_published(const char *path, const char *object, const char *map, int uid)
{
	char request[256];
	pid_t pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	int status;

	check(pid >= 0, "start a child");
	if (pid == 0) {
		int s;

		check(setresgid(uid, uid, uid) == 0 && setresuid(uid, uid, uid) == 0, "become a user");
		snprintf(request, sizeof(request),
			 "{\"method\":\"org.bpfbroker.Broker.OpenMap\",\"parameters\":"
			 "{\"object\":\"%s\",\"map\":\"%s\",\"access\":\"read-only\"}}", object, map);
		s = dial(path);
		_exit(call(s, request));
	}
	check(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) > 2, "open a published map");
	return WEXITSTATUS(status);
}

static int64_t look_up(int map)
{
	uint32_t key = 0;
	uint64_t value;
	union bpf_attr attr = {.map_fd = map, .key = (uintptr_t)&key, .value = (uintptr_t)&value};
	int64_t start = now();

	for (int i = 0; i < 1000; i++)
		check(syscall(SYS_bpf, BPF_MAP_LOOKUP_ELEM, &attr, sizeof(attr)) == 0, "look up");
	return now() - start;
}

// lookups takes turns: first the user with the broker's descriptor, then root
// with its own.
static void lookups(int published, int uid, const char *pin)
{
	union bpf_attr attr = {.pathname = (uintptr_t)pin};
	int own = syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof(attr));

	check(own >= 0, "open the pin");
	while (wanted()) {
		check(seteuid(uid) == 0, "become a user");
		answer(look_up(published));
		check(seteuid(0) == 0, "become root");
		if (!wanted())
			break;
		answer(look_up(own));
	}
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "call")) {
		while (wanted()) {
			int64_t start = now();

			get_info(argv[2]);
			answer(now() - start);
		}
	} else if (argc == 4 && !strcmp(argv[1], "token")) {
		while (wanted()) {
			int64_t start = now();
			int token = acquire_token(argv[2], argv[3]);

			answer(now() - start);
			close(token);
		}
	} else if (argc == 7 && !strcmp(argv[1], "lookups")) {
		int user = atoi(argv[5]);

		lookups(open_published(argv[2], argv[3], argv[4], user), user, argv[6]);
	} else if (argc == 5 && !strcmp(argv[1], "crowd")) {
		int count = atoi(argv[4]);

		for (int i = 0; i < count; i++)
			join(argv[2], argv[3]);
		answer(count);
		wanted();
	} else {
		fprintf(stderr, "client: see client.c\n");
		return 2;
	}
	return 0;
}
