// SPDX-License-Identifier: Apache-2.0

// A sample is the time that a command takes: spawn COMMAND [ARGUMENT...]
#define _GNU_SOURCE
#include <spawn.h>
#include <sys/wait.h>

#include "sample.h"

int main(int argc, char **argv)
{
	posix_spawn_file_actions_t actions;

	check(argc > 1, "do without a command");
	// Standard input and output are for samples.
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
	while (wanted()) {
		int64_t start = now();
		int status;
		pid_t pid;

		errno = posix_spawnp(&pid, argv[1], &actions, NULL, argv + 1, environ);
		check(errno == 0, "start the command");
		check(waitpid(pid, &status, 0) == pid, "wait for the command");
		answer(now() - start);
		if (status) {
			fprintf(stderr, "%s ended with status %#x\n", argv[1], status);
			return 1;
		}
	}
	return 0;
}
