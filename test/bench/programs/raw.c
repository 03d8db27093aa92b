// SPDX-License-Identifier: Apache-2.0

// What the kernel has to do for a token, and nothing around it: raw UID. Needs
// root. A sample is the time from the fork of a child, which opens a BPF file
// system in namespaces of the user's, until the child has handed over the
// mount and is gone, and that which a process in the namespaces then needs to
// make its token.
#define _GNU_SOURCE
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>

#include "sample.h"

static const char *const options[][2] = {
	{"delegate_cmds", "0x40021"},
	{"delegate_maps", "0x1fffffffe"},
	{"delegate_progs", "0xfffffffe"},
	{"delegate_attachs", "0xffffffffffff"},
	{"mode", "0700"},
};

static void send_file(int socket, int file)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {.header = {
		.cmsg_level = SOL_SOCKET,
		.cmsg_type = SCM_RIGHTS,
		.cmsg_len = CMSG_LEN(sizeof(int)),
	}};
	struct iovec data = {.iov_base = "", .iov_len = 1};
	struct msghdr message = {
		.msg_iov = &data,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};

	memcpy(CMSG_DATA(&control.header), &file, sizeof(file));
	check(sendmsg(socket, &message, MSG_NOSIGNAL) == 1, "send a file descriptor");
}

static int receive_file(int socket)
{
	char byte;
	int file = -1;

	receive(socket, &byte, 1, &file);
	check(file >= 0, "receive a file descriptor");
	return file;
}

static void make_pair(int pair[2])
{
	check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0, "make a socket pair");
}

static void become(uid_t uid)
{
	check(setgroups(0, NULL) == 0 && setresgid(uid, uid, uid) == 0 && setresuid(uid, uid, uid) == 0, "become the user");
}

static int open_namespace(pid_t pid, const char *name)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/ns/%s", pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	check(fd >= 0, path);
	return fd;
}

static void map_ids(pid_t pid, uid_t uid, const char *name)
{
	char path[64];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	file = fopen(path, "w");
	check(file && fprintf(file, "0 %d 1\n", (int)uid) > 0 && fclose(file) == 0, path);
}

// live is the process in the namespaces. For each mount that it gets it makes
// a token, and answers how long that took. It ends when nobody sends any more.
static void live(int socket, uid_t uid)
{
	char byte;

	become(uid);
	check(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, "make namespaces");
	send_byte(socket);
	while (recv(socket, &byte, 1, MSG_PEEK) == 1) {
		int mount = receive_file(socket);
		int64_t start = now();
		int token = make_token(mount);
		int64_t took = now() - start;

		check(send(socket, &took, sizeof(took), MSG_NOSIGNAL) == sizeof(took), "answer");
		close(token);
		close(mount);
	}
	exit(0);
}

// help is the child in the namespaces.
static void help(int socket, uid_t uid, int user, int mount_namespace)
{
	int context, mount;
	char byte;

	become(uid);
	check(setns(user, CLONE_NEWUSER) == 0 && setns(mount_namespace, CLONE_NEWNS) == 0, "enter the namespaces");
	context = fsopen("bpf", FSOPEN_CLOEXEC);
	check(context >= 0, "open a file system");
	send_file(socket, context);
	check(recv(socket, &byte, 1, 0) == 1, "wait");
	mount = fsmount(context, FSMOUNT_CLOEXEC, 0);
	check(mount >= 0, "mount");
	make_token(mount);
	send_file(socket, mount);
	_exit(0);
}

// make_mount is what somebody privileged does.
static int make_mount(uid_t uid, int user, int mount_namespace)
{
	char owner[16];
	int pair[2], context, mount, status;
	pid_t pid;

	snprintf(owner, sizeof(owner), "%d", (int)uid);
	make_pair(pair);
	pid = fork();
	check(pid >= 0, "fork");
	if (pid == 0)
		help(pair[1], uid, user, mount_namespace);
	close(pair[1]);
	context = receive_file(pair[0]);
	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
		check(fsconfig(context, FSCONFIG_SET_STRING, options[i][0], options[i][1], 0) == 0, options[i][0]);
	check(fsconfig(context, FSCONFIG_SET_STRING, "uid", owner, 0) == 0, "set the owner");
	check(fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0, "create a file system");
	close(context);
	send_byte(pair[0]);
	mount = receive_file(pair[0]);
	check(waitpid(pid, &status, 0) == pid && status == 0, "wait for the child");
	close(pair[0]);
	return mount;
}

int main(int argc, char **argv)
{
	int pair[2], user, mount_namespace;
	uid_t uid;
	char byte;
	pid_t pid;

	check(argc == 2, "do without a UID");
	uid = atoi(argv[1]);
	make_pair(pair);
	pid = fork();
	check(pid >= 0, "fork");
	if (pid == 0) {
		close(pair[0]);
		live(pair[1], uid);
	}
	close(pair[1]);
	check(recv(pair[0], &byte, 1, 0) == 1, "wait for the namespaces");
	map_ids(pid, uid, "uid_map");
	map_ids(pid, uid, "gid_map");
	user = open_namespace(pid, "user");
	mount_namespace = open_namespace(pid, "mnt");

	while (wanted()) {
		int64_t start = now(), rest;
		int mount = make_mount(uid, user, mount_namespace);
		int64_t took = now() - start;

		send_file(pair[0], mount);
		check(recv(pair[0], &rest, sizeof(rest), 0) == sizeof(rest), "hear of the token");
		close(mount);
		answer(took + rest);
	}
	return 0;
}
