/* Sends frames of a local experimental type (0x88b5) through a network interface, as many as go, with growing numbers
 * behind their header, until it is killed: blast INTERFACE BYTES. What the interface has no room for is dropped there, so
 * a frame's number tells how many have been.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define BATCH 64
#define TYPE 0x88b5
#define NUMBER_AT 16

int main(int count, char **words)
{
    static const uint8_t header[] = {0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, TYPE >> 8, TYPE & 0xff};
    static uint8_t frames[BATCH][9014];
    struct iovec pieces[BATCH];
    struct mmsghdr messages[BATCH];
    struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_protocol = htons(TYPE)};
    uint64_t number = 0;
    size_t bytes;
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    if (count != 3 || fd < 0 || (bytes = strtoul(words[2], NULL, 10)) < NUMBER_AT + 8 || bytes > sizeof(frames[0])) {
        perror("blast");
        return 1;
    }
    place.sll_ifindex = (int)if_nametoindex(words[1]);
    if (!place.sll_ifindex || bind(fd, (struct sockaddr *)&place, sizeof(place)) < 0) {
        perror(words[1]);
        return 1;
    }
    memset(messages, 0, sizeof(messages));
    for (int i = 0; i < BATCH; i++) {
        memcpy(frames[i], header, sizeof(header));
        pieces[i] = (struct iovec){frames[i], bytes};
        messages[i].msg_hdr.msg_iov = &pieces[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            number++;
            memcpy(frames[i] + NUMBER_AT, &number, sizeof(number));
        }
        if (sendmmsg(fd, messages, BATCH, 0) < 0 && errno != ENOBUFS && errno != EAGAIN && errno != ENETDOWN) {
            perror(words[1]);
            return 1;
        }
        sched_yield();
    }
}
