// Frames from one end of a switch to another, or the least that anything between two sockets does.
// Usage: frames send FROM TO SIZE GSO COUNT WINDOW PARTS: sends COUNT messages of SIZE bytes, headers with them, into FROM
// and takes from TO the PARTS that each becomes, with at most WINDOW of them under way; prints nanoseconds.
//        frames relay FROM TO: carries messages from one socket to the other until the first one ends.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { BATCH = 32, ROOM = 69760, VNET = 10 };

static uint8_t buffers[BATCH][ROOM];
static int from, to;
static long count, window, cut;
static size_t size;
static _Atomic long arrived;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void set_up(struct mmsghdr *messages, struct iovec *parts, uint8_t (*rooms)[ROOM], size_t length)
{
	for (unsigned i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){rooms[i], length};
		messages[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &parts[i], .msg_iovlen = 1}};
	}
}

static void *receive(void *rooms)
{
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	set_up(messages, parts, rooms, ROOM);
	while (arrived < count * cut) {
		int got = recvmmsg(to, messages, BATCH, MSG_WAITFORONE, NULL);
		if (got <= 0)
			die("recvmmsg");
		arrived += got;
	}
	return NULL;
}

static void put16(uint8_t *at, unsigned value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

// A TCP segment over IPv4 whose checksum is left to others if it is to be cut.
static void write_message(uint8_t *at, unsigned gso)
{
	uint8_t *frame = at + VNET, *ip = frame + 14, *tcp = ip + 20;
	size_t length = size - VNET - 14;
	memset(at, 0, size);
	if (gso) {
		const uint8_t header[VNET] = {1, 1, 54, 0, (uint8_t)gso, (uint8_t)(gso >> 8), 34, 0, 16, 0};
		memcpy(at, header, VNET);
	}
	memcpy(frame, "\x00\x15\x5d\x00\x00\x02\x00\x15\x5d\x00\x00\x01\x08\x00", 14);
	ip[0] = 0x45;
	put16(ip + 2, (unsigned)length);
	ip[8] = 64;
	ip[9] = 6;
	memcpy(ip + 12, "\x0a\x00\x00\x01\x0a\x00\x00\x02", 8);
	tcp[12] = 0x50;
	tcp[13] = 0x10;
}

static int send_all(char **arguments)
{
	static uint8_t others[BATCH][ROOM];
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	pthread_t receiver;
	struct timespec start, end;
	size = strtoul(arguments[0], NULL, 0);
	count = strtol(arguments[2], NULL, 0);
	window = strtol(arguments[3], NULL, 0);
	cut = strtol(arguments[4], NULL, 0);
	if (size < VNET + 54 || size > ROOM || cut < 1)
		return 2;
	set_up(messages, parts, buffers, size);
	for (unsigned i = 0; i < BATCH; i++)
		write_message(buffers[i], (unsigned)strtoul(arguments[1], NULL, 0));
	clock_gettime(CLOCK_MONOTONIC, &start);
	if (pthread_create(&receiver, NULL, receive, others))
		die("pthread_create");
	for (long sent = 0; sent < count;) {
		long room = window - (sent - arrived / cut);
		if (room > count - sent)
			room = count - sent;
		// In large steps, as a NIC's queue is emptied.
		if (room < (window < BATCH ? 1 : BATCH) && room < count - sent) {
			const struct timespec moment = {0, 20000};
			nanosleep(&moment, NULL);
			continue;
		}
		int done = sendmmsg(from, messages, room < BATCH ? (unsigned)room : BATCH, 0);
		if (done < 0)
			die("sendmmsg");
		sent += done;
	}
	pthread_join(receiver, NULL);
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%lld\n", (long long)(end.tv_sec - start.tv_sec) * 1000000000 + (end.tv_nsec - start.tv_nsec));
	return 0;
}

static int relay(void)
{
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	set_up(messages, parts, buffers, ROOM);
	for (;;) {
		int got = recvmmsg(from, messages, BATCH, MSG_WAITFORONE, NULL);
		if (got <= 0 || !messages[0].msg_len)
			return 0;
		for (int i = 0; i < got; i++)
			parts[i].iov_len = messages[i].msg_len;
		for (int done = 0, now; done < got; done += now) {
			now = sendmmsg(to, messages + done, (unsigned)(got - done), 0);
			if (now < 0)
				return 0;
		}
		for (int i = 0; i < got; i++)
			parts[i].iov_len = ROOM;
	}
}

int main(int argc, char **argv)
{
	if (argc != 9 && argc != 4)
		return 2;
	from = atoi(argv[2]);
	to = atoi(argv[3]);
	return argc == 4 ? relay() : send_all(argv + 4);
}
