// A NIC over guest memory that changes under its hands: packets that are nearly right, rings that are not, a port that is
// full or gone, buffers and settings that change. Whatever comes out of the port has to make sense to a network, and each
// section of the receive buffer has to be somewhere, once.

#include "world.h"

#include "../../../pyvmm/core/hot/net.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	STEPS = 60,
	CHANNELS = 2,
	RING_PAGES = 2,
	INCOMING = 0, // the first page of the first channel's rings; then the outgoing one, then the next channel's
	BUFFERS = CHANNELS * 2 * RING_PAGES,
	BUFFER_PAGES = RAM_SIZE / HOT_PAGE_SIZE - BUFFERS,
	SECTION = 1280,
	SEND_SECTION = 2048,
	RING = (RING_PAGES - 1) * HOT_PAGE_SIZE,
	HELD = 64,
};

static PyObject *device, *queues[CHANNELS], *incoming[CHANNELS], *outgoing[CHANNELS];
static int port[2], doorbell;
static uint64_t held[CHANNELS][HELD]; // transactions that the guest has seen
static unsigned held_count[CHANNELS];

// A call that may refuse its arguments.
static void call(PyObject *object, const char *name, PyObject *arguments)
{
	PyObject *method = PyObject_GetAttrString(object, name);
	PyObject *result = method && arguments ? PyObject_Call(method, arguments, NULL) : NULL;
	if (!result && !PyErr_ExceptionMatches(PyExc_ValueError))
		fail("a method of a NIC raises what is not documented");
	PyErr_Clear();
	Py_XDECREF(result);
	Py_XDECREF(arguments);
	Py_XDECREF(method);
}

static PyObject *ring_at(unsigned page)
{
	memset(world.ram + page * HOT_PAGE_SIZE, 0, HOT_PAGE_SIZE);
	PyObject *ring = PyObject_CallFunction((PyObject *)&Ring_Type, "O(II)", world.memory, page, page + 1);
	if (!ring)
		fail("no ring");
	return ring;
}

static unsigned page_of(unsigned channel, bool out)
{
	return INCOMING + (2 * channel + out) * RING_PAGES;
}

static void open_channel(unsigned index)
{
	Py_XSETREF(incoming[index], ring_at(page_of(index, false)));
	Py_XSETREF(outgoing[index], ring_at(page_of(index, true)));
	Py_XSETREF(queues[index], PyObject_CallFunction((PyObject *)&NetQueue_Type, "OIOOOi", device, index, world.memory,
							incoming[index], outgoing[index], doorbell));
	if (!queues[index])
		fail("no queue");
}

// The pages behind the rings in any order, and sometimes others.
static PyObject *some_runs(void)
{
	PyObject *runs = PyList_New(0);
	unsigned first = (unsigned)below(BUFFER_PAGES);
	for (unsigned i = 0; i < BUFFER_PAGES; i++) {
		unsigned page = BUFFERS + (first + i * 3) % BUFFER_PAGES;
		uint64_t gpa = one_in(100) ? some_gpa() : page * HOT_PAGE_SIZE;
		PyObject *run = Py_BuildValue("(KI)", gpa, one_in(100) ? (unsigned)draw() : HOT_PAGE_SIZE);
		if (PyList_Append(runs, run) < 0)
			fail("no run");
		Py_DECREF(run);
	}
	return runs;
}

static void set_buffers(void)
{
	static const unsigned sizes[] = {SECTION, SECTION, SECTION, 2000, 4096, 5000};
	if (one_in(8))
		call(device, "set_receive_buffer", Py_BuildValue("(O)", Py_None));
	call(device, "set_receive_buffer", Py_BuildValue("(NII)", some_runs(), 7, sizes[below(6)]));
	call(device, "set_send_buffer", Py_BuildValue("(NI)", some_runs(), SEND_SECTION));
	memset(held_count, 0, sizeof(held_count));
}

static void set_filter(void)
{
	call(device, "set_filter",
	     Py_BuildValue("(Iy#(y#))", one_in(4) ? (unsigned)below(64) : 0x20, "\0\x15\x5d\0\0\1", (Py_ssize_t)6,
			   "\x33\x33\0\0\0\1", (Py_ssize_t)6));
}

static void set_rss(void)
{
	char key[NET_KEY];
	fill(key, sizeof(key));
	PyObject *table = one_in(3) ? PyList_New(0) : Py_BuildValue("[IIII]", 0, (unsigned)below(3), 1, 1);
	call(device, "set_rss", Py_BuildValue("(y#NI)", key, (Py_ssize_t)NET_KEY, table, (unsigned)below(1 << 17)));
}

static void begin(void)
{
	doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (doorbell < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, port) < 0)
		fail("no port");
	device = PyObject_CallFunction((PyObject *)&NetDevice_Type, "O", world.memory);
	if (!device)
		fail("no NIC");
	for (unsigned i = 0; i < CHANNELS; i++)
		open_channel(i);
	set_buffers();
	set_filter();
	call(device, "set_port", Py_BuildValue("(i)", port[0]));
	call(device, "set_link", Py_BuildValue("(O)", Py_True));
	call(device, "set_offloads", Py_BuildValue("(I)", (unsigned)below(256)));
}

static void end(void)
{
	for (unsigned i = 0; i < CHANNELS; i++) {
		Py_CLEAR(queues[i]);
		Py_CLEAR(incoming[i]);
		Py_CLEAR(outgoing[i]);
	}
	Py_CLEAR(device);
	close(port[0]);
	close(port[1]);
	close(doorbell);
}

// Frames ---------------------------------------------------------------------------------------------------

// TCP or UDP over IPv4 or IPv6, with up to two tags; nearly right. Returns where IP begins.
static unsigned some_frame(uint8_t *frame, uint32_t size)
{
	unsigned at = 12, protocol = one_in(3) ? PROTOCOL_UDP : PROTOCOL_TCP;
	memset(frame, 0, size < 128 ? size : 128);
	memcpy(frame, one_in(2) ? "\0\x15\x5d\0\0\1" : one_in(2) ? "\xff\xff\xff\xff\xff\xff" : "\x33\x33\0\0\0\1", 6);
	frame[11] = 9;
	for (; at < 20 && one_in(4); at += NET_TAG) {
		net_put16(frame + at, one_in(4) ? ETHERTYPE_SERVICE_VLAN : ETHERTYPE_VLAN);
		net_put16(frame + at + 2, (unsigned)draw() & 0xffff);
	}
	bool six = one_in(2);
	net_put16(frame + at, six ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4);
	uint8_t *ip = frame + at + 2, *transport = ip + (six ? 40 : 20);
	unsigned length = size - at - 2;
	if (six) {
		ip[0] = 0x60;
		net_put16(ip + 4, length - 40);
		ip[6] = (uint8_t)(one_in(20) ? draw() : protocol);
	} else {
		ip[0] = 0x45;
		net_put16(ip + 2, length);
		ip[9] = (uint8_t)protocol;
	}
	fill(ip + (six ? 8 : 12), six ? 32 : 8);
	if (protocol == PROTOCOL_TCP)
		transport[12] = 0x50;
	while (one_in(8))
		frame[below(size < 100 ? size : 100)] = (uint8_t)draw();
	return at + 2;
}

static void arrive(void)
{
	static const uint32_t sizes[] = {90, 100, 1000, 1514, 1518, 3000, 20000, 65535};
	static uint8_t frame[VNET_SIZE + 70000];
	uint32_t size = one_in(10) ? (uint32_t)below(90) : sizes[below(8)];
	unsigned network = some_frame(frame + VNET_SIZE, size < 90 ? 90 : size);
	bool six = frame[VNET_SIZE + network] >> 4 == 6;
	uint16_t transport = (uint16_t)(network + (six ? 40 : 20));
	struct net_vnet vnet = {0};
	if (!one_in(3)) {
		vnet = (struct net_vnet){VNET_NEEDS_CSUM, 0, 0, 0, transport, 16};
		if (size > 1518)
			vnet.gso_type = six ? VNET_GSO_TCPV6 : VNET_GSO_TCPV4;
		vnet.gso_size = (uint16_t)below(2000);
	}
	if (one_in(8))
		fill((uint8_t *)&vnet + below(VNET_SIZE), 1);
	memcpy(frame, &vnet, VNET_SIZE);
	if (write(port[1], frame, one_in(40) ? below(VNET_SIZE) : VNET_SIZE + size) < 0 && errno != EAGAIN && errno != EPIPE)
		fail("a frame cannot arrive");
}

// What the network gets has to be of use to it.
static void check_sent(void)
{
	static uint8_t frame[VNET_SIZE + NET_MAX_FRAME + NET_TAG];
	ssize_t size;
	while ((size = read(port[1], frame, sizeof(frame))) > 0) {
		struct net_vnet vnet;
		struct net_frame parsed;
		memcpy(&vnet, frame, VNET_SIZE);
		size -= VNET_SIZE;
		if (size < NET_ETHERNET)
			fail("a frame without a header is sent");
		if (!net_frame_parse(&parsed, frame + VNET_SIZE, (size_t)size, (size_t)size)) {
			if (size <= NET_MAX_FRAME)
				fail("a frame that is none is sent");
		} else if (vnet.flags & ~VNET_NEEDS_CSUM || !net_vnet_valid(&vnet, &parsed) ||
			   (parsed.tags <= NET_MAX_TAGS && !parsed.obscured && !net_vnet_plain(&vnet, &parsed))) {
			fail("a frame with an offload that makes no sense is sent");
		}
		world.frames++;
	}
}

// The guest ------------------------------------------------------------------------------------------------

static void put_packet(unsigned channel, const uint8_t *packet, uint32_t length)
{
	uint8_t *control = world.ram + page_of(channel, false) * HOT_PAGE_SIZE, *data = control + HOT_PAGE_SIZE;
	uint32_t in = get_le32(control), out = get_le32(control + 4);
	if (in >= RING || out >= RING || length + 8 > RING - (in - out + RING) % RING - 8)
		return;
	for (uint32_t i = 0; i < length + 8; i++)
		data[(in + i) % RING] = packet[i];
	put_le32(control, (in + length + 8) % RING);
}

// Writes an RNDIS packet; returns its length.
static uint32_t some_rndis(uint8_t *to, uint32_t room)
{
	static const uint32_t kinds[] = {PPI_CHECKSUM, PPI_LSO, PPI_VLAN, PPI_HASH};
	uint32_t ppis = 16 * (uint32_t)below(4), head = NET_RNDIS_HEADER + ppis, size = 90 + (uint32_t)below(room - 200);
	unsigned network = some_frame(to + head, size);
	bool six = to[head + network] >> 4 == 6;
	if (one_in(2))
		memset(to + head + network + (six ? 4 : 2), 0, 2); // as with LSO
	memset(to, 0, head);
	put_le32(to, RNDIS_PACKET);
	put_le32(to + 4, head + size);
	put_le32(to + 8, head - 8);
	put_le32(to + 12, size);
	put_le32(to + 28, NET_RNDIS_HEADER - 8);
	put_le32(to + 32, ppis);
	for (uint8_t *ppi = to + NET_RNDIS_HEADER; ppi < to + head; ppi += 16) {
		uint32_t kind = kinds[below(4)];
		put_le32(ppi, 16);
		put_le32(ppi + 4, kind);
		put_le32(ppi + 8, 12);
		put_le32(ppi + 12, kind == PPI_LSO ? (uint32_t)(below(1600) | 1 << 30 | (uint64_t)six << 31) : (uint32_t)draw());
		if (kind == PPI_CHECKSUM)
			put_le32(ppi + 12, 1 << below(5));
	}
	while (one_in(6)) {
		uint32_t lie = one_in(2) ? (uint32_t)below(2000) : (uint32_t)draw();
		put_le32(to + 4 * below(head / 4), lie);
	}
	return head + size;
}

static void send_packet(unsigned channel)
{
	uint8_t packet[512] = {0};
	bool direct = one_in(2);
	uint32_t section = (uint32_t)below(one_in(30) ? 1000 : BUFFER_PAGES * HOT_PAGE_SIZE / SEND_SECTION);
	uint32_t first = BUFFERS + (uint32_t)below(BUFFER_PAGES - 1), room = direct ? 2 * HOT_PAGE_SIZE : SEND_SECTION;
	uint32_t header = 16, length = some_rndis(world.ram + first * HOT_PAGE_SIZE, room);
	// Sections of the send buffer are wherever its pages are, so what is in them is chance.
	if (direct) {
		uint32_t start = one_in(3) ? (uint32_t)below(4) : 0, ranges = 1 + (uint32_t)below(3);
		header += 8;
		put_le32(packet + 20, one_in(40) ? (uint32_t)below(9) : ranges);
		for (uint32_t i = 0; i < ranges; i++) {
			uint64_t page = one_in(60) ? draw() : one_in(40) ? ROM_BASE / HOT_PAGE_SIZE : first;
			uint64_t next = page + 1;
			put_le32(packet + header, one_in(20) ? (uint32_t)below(9000) : length);
			put_le32(packet + header + 4, one_in(60) ? (uint32_t)draw() : start);
			memcpy(packet + header + 8, &page, sizeof(page));
			memcpy(packet + header + 16, &next, sizeof(next));
			header += length + start > HOT_PAGE_SIZE ? 24 : 16;
		}
	}
	uint32_t total = header + 32;
	struct ring_descriptor descriptor = {direct ? 9 : 6, (uint16_t)(header / 8), (uint16_t)(total / 8), 1, draw()};
	memcpy(packet, &descriptor, sizeof(descriptor));
	put_le32(packet + header, one_in(40) ? (uint32_t)below(140) : NVSP_RNDIS);
	put_le32(packet + header + 4, one_in(40));
	put_le32(packet + header + 8, direct && !one_in(8) ? (uint32_t)NVSP_NO_SECTION : section);
	put_le32(packet + header + 12, one_in(30) ? (uint32_t)draw() : length < SEND_SECTION ? length : SEND_SECTION);
	while (one_in(12))
		packet[below(total)] = (uint8_t)draw();
	put_packet(channel, packet, total);
}

// Takes what the host sent, and remembers what is to be completed.
static void look(unsigned channel)
{
	uint8_t *control = world.ram + page_of(channel, true) * HOT_PAGE_SIZE, *data = control + HOT_PAGE_SIZE;
	uint32_t in = get_le32(control), out = get_le32(control + 4);
	// A ring that was spoilt may lead round and round.
	for (unsigned left = RING / 8; left && in < RING && out < RING && in != out && out % 8 == 0; left--) {
		struct ring_descriptor descriptor;
		for (uint32_t i = 0; i < sizeof(descriptor); i++)
			((uint8_t *)&descriptor)[i] = data[(out + i) % RING];
		if (descriptor.type == 7 && held_count[channel] < HELD)
			held[channel][held_count[channel]++] = descriptor.transaction_id;
		if (!descriptor.length8)
			break;
		out = (out + descriptor.length8 * 8U + 8) % RING;
	}
	put_le32(control + 4, in);
}

static void complete(unsigned channel)
{
	uint8_t packet[64] = {0};
	uint64_t id = one_in(20) || !held_count[channel] ? draw() & 0xff000000ff : held[channel][--held_count[channel]];
	struct ring_descriptor descriptor = {0xb, 2, 3, 0, id};
	memcpy(packet, &descriptor, sizeof(descriptor));
	put_le32(packet + 16, one_in(40) ? 1 : NVSP_RNDIS_COMPLETE);
	put_packet(channel, packet, 24);
}

// The host -------------------------------------------------------------------------------------------------

// As after a new start: the ring is empty again.
static void empty(unsigned channel)
{
	put_le32(world.ram + page_of(channel, false) * HOT_PAGE_SIZE, ((RingObject *)incoming[channel])->out);
}

static void serve(unsigned channel)
{
	PyObject *result = PyObject_CallMethod(queues[channel], "serve", NULL);
	unsigned left = result ? (unsigned)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(result, 1)) : 0;
	if (!result) {
		if (!PyErr_ExceptionMatches(RingError))
			fail("a queue raises what is not documented");
		PyErr_Clear();
		empty(channel);
	}
	Py_XDECREF(result);
	if (!left)
		return;
	result = PyObject_CallMethod(incoming[channel], "read", "I", left);
	if (!result) {
		PyErr_Clear();
		empty(channel);
	}
	Py_XDECREF(result);
}

static void check_sections(void)
{
	const NetDeviceObject *nic = (NetDeviceObject *)device;
	uint32_t count = nic->receive.sections, found = 0;
	uint8_t *seen = calloc(count + 1, 1);
	for (uint32_t i = 0; i < nic->free_count; i++, found++)
		seen[nic->free[i]]++;
	for (uint32_t i = 0; i < nic->free_controls_count; i++, found++)
		seen[nic->free_controls[i]]++;
	for (uint32_t i = 0; i < nic->ready_count; i++, found++)
		seen[nic->ready[i]]++;
	for (uint32_t i = 0; i < count; i++) {
		if (!nic->owner[i])
			continue;
		for (uint32_t at = i;; at = nic->next[at]) {
			seen[at]++;
			found++;
			if (nic->next[at] == at)
				break;
		}
	}
	if (found != count)
		fail("sections are lost, or in two places");
	for (uint32_t i = 0; i < count; i++)
		if (seen[i] != 1)
			fail("a section is in two places");
	free(seen);
}

static void save_and_restore(void)
{
	for (unsigned i = 0; i < CHANNELS; i++)
		call(queues[i], "quiesce", PyTuple_New(0));
	PyObject *state = PyObject_CallMethod(device, "save", NULL);
	if (!state)
		fail("a NIC cannot be saved");
	call(device, "restore", Py_BuildValue("(O)", state)); // again: the sections are taken already
	Py_DECREF(state);
	check_sections();
}

static void step(void)
{
	static const char message[6000];
	unsigned channel = (unsigned)below(CHANNELS);
	int room;
	switch (below(26)) {
	case 0:
		set_buffers();
		break;
	case 1:
		set_filter();
		break;
	case 2:
		set_rss();
		break;
	case 3:
		call(device, "set_offloads", Py_BuildValue("(I)", (unsigned)below(one_in(8) ? 512 : 256)));
		break;
	case 4:
		call(device, "set_frame_size", Py_BuildValue("(I)", one_in(4) ? (unsigned)below(70000) : 1514));
		break;
	case 5:
		call(device, "set_link", Py_BuildValue("(O)", one_in(4) ? Py_False : Py_True));
		break;
	case 6:
		call(device, "set_port", Py_BuildValue("(i)", one_in(4) ? -1 : port[0]));
		break;
	case 7:
		room = one_in(2) ? 4096 : 1 << 20;
		if (setsockopt(port[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) < 0)
			fail("a port has no room");
		break;
	case 8:
		call(queues[channel], "send_control", Py_BuildValue("(y#)", message, (Py_ssize_t)below(sizeof(message))));
		break;
	case 9:
		save_and_restore();
		break;
	case 10:
		if (one_in(4))
			open_channel(channel);
		break;
	case 11:
		if (one_in(4))
			put_le32(world.ram + page_of(channel, one_in(2)) * HOT_PAGE_SIZE + 4 * below(5), (uint32_t)some_value());
		break;
	case 12:
		call(queues[channel], "set_target",
		     Py_BuildValue("(OII)", one_in(2) ? Py_None : world.synics[below(VPS)], (unsigned)below(17), 5));
		break;
	default:
		for (uint64_t count = below(6); count--;)
			arrive();
		for (uint64_t count = below(6); count--;)
			send_packet(channel);
		for (uint64_t count = below(6); count--;)
			complete(channel);
		for (unsigned i = 0; i < 4; i++)
			serve(one_in(4) ? 1 - channel : channel);
		check_sent();
		if (!one_in(4)) {
			look(0);
			look(1);
		}
		check_sections();
	}
}

void use_nics(void)
{
	begin();
	for (unsigned i = 0; i < STEPS; i++)
		step();
	end();
}
