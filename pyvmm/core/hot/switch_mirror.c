// A port's frames in a pcap file (draft-ietf-opsawg-pcap), as on a wire: complete, cut to size. An error or a full file ends
// the mirror; frames go on.

#include "switch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	PCAP_NANOSECONDS = 0xa1b23c4d,
	PCAP_ETHERNET = 1,
	PCAP_SNAP = 1 << 18,
};

struct pcap_header {
	uint32_t magic;
	uint16_t major, minor;
	uint32_t zero[2], snap, link;
};

struct pcap_record {
	uint32_t seconds, nanoseconds, captured, size;
};

static void end(SwitchObject *self, struct switch_port *port, const char *why, int error)
{
	mirror_stop(port);
	port->mirror_ended = why;
	port->mirror_error = error;
	self->ended = true;
}

void mirror_flush(SwitchObject *self, struct switch_port *port)
{
	struct switch_mirror *mirror = port->mirror;
	for (size_t done = 0; done < mirror->used;) {
		ssize_t now = write(mirror->fd, mirror->buffer + done, mirror->used - done);
		if (now < 0 && errno == EINTR)
			continue;
		if (now <= 0) {
			mirror->used = 0;
			end(self, port, "mirror: the file cannot be written", now ? errno : 0);
			return;
		}
		done += (size_t)now;
	}
	mirror->used = 0;
}

// Room for a frame, its record before it; NULL: the mirror has ended.
static uint8_t *add(SwitchObject *self, struct switch_port *port, size_t size)
{
	struct switch_mirror *mirror = port->mirror;
	struct pcap_record record = {(uint32_t)self->wall.tv_sec, (uint32_t)self->wall.tv_nsec, (uint32_t)size,
				     (uint32_t)size};
	if (sizeof(record) + size > mirror->left) {
		mirror_flush(self, port);
		if (port->mirror)
			end(self, port, "mirror: the file is as large as it may be", 0);
		return NULL;
	}
	if (mirror->used + sizeof(record) + size > sizeof(mirror->buffer)) {
		mirror_flush(self, port);
		if (!port->mirror)
			return NULL;
	}
	uint8_t *to = mirror->buffer + mirror->used;
	memcpy(to, &record, sizeof(record));
	mirror->used += sizeof(record) + size;
	mirror->left -= sizeof(record) + size;
	return to + sizeof(record);
}

struct mirrored {
	SwitchObject *self;
	struct switch_port *port;
	const struct switch_frame *frame;
	bool tagged;
};

static bool add_segment(void *context, const uint8_t *headers, size_t size, size_t offset, size_t length)
{
	const struct mirrored *mirrored = context;
	const struct switch_frame *frame = mirrored->frame;
	uint8_t *to = add(mirrored->self, mirrored->port,
			  size - frame->tag + (mirrored->tagged ? NET_TAG : 0) + length);
	if (!to)
		return false;
	to += switch_retag(frame, mirrored->tagged, headers, size, to);
	memcpy(to, frame->data + offset, length);
	return true;
}

void mirror_frame(SwitchObject *self, struct switch_port *port, const struct switch_frame *frame, bool tagged)
{
	if (frame->vnet.gso_type) {
		struct mirrored mirrored = {self, port, frame, tagged};
		net_segment(&frame->vnet, &frame->parsed, frame->data,
			    &(struct iovec){frame->data, frame->parsed.size}, 1, add_segment, &mirrored);
		return;
	}
	size_t size = frame->parsed.size - frame->tag + (tagged ? NET_TAG : 0);
	uint8_t *to = add(self, port, size);
	if (!to)
		return;
	switch_retag(frame, tagged, frame->data, frame->parsed.size, to);
	struct net_vnet vnet = frame->vnet;
	vnet.csum_start = (uint16_t)(vnet.csum_start - frame->tag + (tagged ? NET_TAG : 0));
	net_complete_checksum(&vnet, &(struct iovec){to, size}, 1);
}

bool mirror_start(struct switch_port *port, int fd, uint64_t limit)
{
	mirror_stop(port);
	struct switch_mirror *mirror = malloc(sizeof(*mirror));
	if (!mirror) {
		close(fd);
		return false;
	}
	mirror->fd = fd;
	mirror->left = limit;
	const struct pcap_header header = {PCAP_NANOSECONDS, 2, 4, {0}, PCAP_SNAP, PCAP_ETHERNET};
	memcpy(mirror->buffer, &header, sizeof(header));
	mirror->used = sizeof(header);
	mirror->left -= limit < sizeof(header) ? limit : sizeof(header);
	port->mirror = mirror;
	return true;
}

void mirror_stop(struct switch_port *port)
{
	if (!port->mirror)
		return;
	close(port->mirror->fd);
	free(port->mirror);
	port->mirror = NULL;
}
