// Runs a command and prints its wall-clock nanoseconds, its CPU time in microseconds, its peak memory in KiB and its exit
// status. A process starts with its parent's peak memory, so the parent must be small: this one.
// Usage: spawn COMMAND [ARGUMENT...]. Standard output and error of the command are dropped.

#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		fprintf(stderr, "usage: spawn COMMAND [ARGUMENT...]\n");
		return 2;
	}
	posix_spawn_file_actions_t actions;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDWR, 0);
	posix_spawn_file_actions_adddup2(&actions, 0, 1);
	posix_spawn_file_actions_adddup2(&actions, 0, 2);
	pid_t child;
	uint64_t start = now();
	if (posix_spawnp(&child, argv[1], &actions, NULL, argv + 1, environ)) {
		fprintf(stderr, "cannot run %s\n", argv[1]);
		return 1;
	}
	int status;
	struct rusage usage;
	if (wait4(child, &status, 0, &usage) != child)
		return 1;
	uint64_t end = now();
	long long cpu = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000LL + usage.ru_utime.tv_usec +
			usage.ru_stime.tv_usec;
	printf("%llu %lld %ld %d\n", (unsigned long long)(end - start), cpu, usage.ru_maxrss,
	       WIFEXITED(status) ? WEXITSTATUS(status) : -1);
	return 0;
}
