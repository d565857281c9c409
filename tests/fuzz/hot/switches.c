// A switch whose NICs send frames that are nearly right, take what they are sent or don't, and come and go; and the
// functions that take frames apart, on copies with red zones right behind them. What comes out must be whole, of a VLAN that
// the receiver's port carries, and from where it says.

#include "world.h"

#include "../../../pyvmm/core/hot/switch.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	ENDS = 5,
	STEPS = 40,
	MTU = 1500,
	MOST = SWITCH_MESSAGE + 100,
};

struct end {
	int fd;
	enum switch_kind kind;
	uint16_t vlan;
	bool tagged, spoofing, dhcp_guard;
	unsigned offloads;
	uint8_t rest[STREAM_LENGTH + NET_MAX_FRAME]; // of a stream
	size_t rest_size;
};

static struct end ends[ENDS];
static PyObject *fabric;
static uint64_t now;
static bool limited; // some of this life: what waits may be from before a change

static PyObject *called(PyObject *object, const char *name)
{
	PyObject *result = PyObject_CallMethod(object, name, NULL);
	if (!result)
		fail("a method of a switch raises");
	return result;
}

static void settle(PyObject *result)
{
	if (!result)
		fail("a switch refuses what it should not");
	Py_DECREF(result);
}

// Frames ---------------------------------------------------------------------------------------------------

static size_t put(uint8_t *to, const void *from, size_t size)
{
	memcpy(to, from, size);
	return size;
}

// IP of either version with UDP, TCP or ICMP, maybe behind tags and extension headers, maybe changed anywhere.
static size_t some_frame(unsigned from, uint8_t *frame)
{
	static const uint16_t ports[] = {67, 68, 546, 547, 1000};
	static const uint8_t protocols[] = {PROTOCOL_TCP, PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_ICMPV6, PROTOCOL_ICMPV4};
	uint8_t addresses[12] = {0, 0x15, 0x5d, 0, 0, (uint8_t)below(ENDS), 0, 0x15, 0x5d, 0, 0, (uint8_t)from};
	if (one_in(4))
		memset(addresses, 0xff, 6);
	if (one_in(8))
		addresses[11] = (uint8_t)below(ENDS);
	size_t at = put(frame, addresses, sizeof(addresses));
	for (unsigned tags = one_in(3) ? (unsigned)below(4) : 0; tags; tags--) {
		net_put16(frame + at, one_in(6) ? ETHERTYPE_SERVICE_VLAN : ETHERTYPE_VLAN);
		net_put16(frame + at + 2, one_in(4) ? (unsigned)draw() & 0xffff : (unsigned)below(3) * 10);
		at += 4;
	}
	bool six = one_in(2);
	uint8_t protocol = protocols[below(sizeof(protocols))];
	net_put16(frame + at, six ? ETHERTYPE_IPV6 : one_in(8) ? ETHERTYPE_ARP : ETHERTYPE_IPV4);
	uint8_t *ip = frame + at + 2;
	memset(ip, 0, 400);
	at += 2 + (six ? 40 : 20);
	ip[0] = six ? 0x60 : 0x45;
	ip[six ? 6 : 9] = protocol;
	if (!six && one_in(8))
		net_put16(ip + 6, (unsigned)draw() & 0xffff);
	for (unsigned extensions = six && one_in(3) ? (unsigned)below(5) : 0; extensions; extensions--) {
		static const uint8_t kinds[] = {0, 43, 44, 51, 60, 135};
		frame[at] = ip[6];
		frame[at + 1] = (uint8_t)below(3);
		ip[6] = kinds[below(sizeof(kinds))];
		at += 8 * (frame[at + 1] + 1u);
	}
	uint8_t *transport = frame + at;
	net_put16(transport, ports[below(5)]);
	net_put16(transport + 2, ports[below(5)]);
	if (protocol == PROTOCOL_ICMPV6)
		transport[0] = (uint8_t)(133 + below(6));
	transport[12] = (uint8_t)((5 + (one_in(4) ? below(11) : 0)) << 4);
	transport[13] = (uint8_t)draw();
	at += protocol == PROTOCOL_TCP ? (transport[12] >> 4) * 4u : 8;
	size_t more = one_in(6) ? below(NET_MAX_FRAME - at) : below(1600);
	memset(frame + at, (int)draw(), more);
	at += more;
	while (one_in(6))
		frame[below(one_in(4) ? at : 80)] = (uint8_t)draw();
	return one_in(10) ? below(at) : at;
}

static void some_header(struct net_vnet *vnet, const uint8_t *frame, size_t size)
{
	struct net_frame parsed;
	memset(vnet, 0, sizeof(*vnet));
	if (one_in(3) || !net_frame_parse(&parsed, frame, size, size))
		return;
	vnet->flags = VNET_NEEDS_CSUM;
	vnet->csum_start = parsed.transport;
	vnet->csum_offset = parsed.protocol == PROTOCOL_TCP ? 16 : 6;
	if (one_in(2)) {
		vnet->gso_type = parsed.protocol == PROTOCOL_UDP ? VNET_GSO_UDP_L4
				 : parsed.version == 4		  ? VNET_GSO_TCPV4
								  : VNET_GSO_TCPV6;
		vnet->gso_size = (uint16_t)(one_in(4) ? below(100) : 400 + below(1100));
	}
	while (one_in(8))
		((uint8_t *)vnet)[below(VNET_SIZE)] = (uint8_t)draw();
}

struct cut {
	size_t at, size;
	uint16_t most;
};

static bool check_segment(void *context, const uint8_t *headers, size_t size, size_t offset, size_t length)
{
	struct cut *cut = context;
	struct net_frame parsed;
	uint8_t *copy = malloc(size);
	memcpy(copy, headers, size);
	if (offset != cut->at || !length || length > cut->most || offset + length > cut->size ||
	    !net_frame_parse(&parsed, copy, size, size + length) || parsed.payload != size)
		fail("a segment is not what it was cut from");
	free(copy);
	cut->at += length;
	return !one_in(1000);
}

static void take_apart(void)
{
	static uint8_t room[NET_MAX_FRAME + 600];
	struct net_vnet vnet;
	struct net_frame parsed;
	size_t size = some_frame(1, room);
	if (size > NET_MAX_FRAME)
		size = NET_MAX_FRAME;
	some_header(&vnet, room, size);
	size_t have = one_in(4) ? below(size + 1) : size;
	uint8_t *head = malloc(have ? have : 1);
	memcpy(head, room, have);
	if (net_frame_parse(&parsed, head, have, size)) {
		if (parsed.network > have || parsed.transport > have || parsed.payload > have)
			fail("a header lies outside of what there is");
		if (have == size && net_vnet_valid(&vnet, &parsed)) {
			size_t first = below(size + 1);
			const struct iovec parts[] = {{head, first}, {head + first, size - first}};
			if (vnet.gso_type) {
				struct cut cut = {parsed.payload, size, vnet.gso_size};
				if (net_segment(&vnet, &parsed, head, parts, 2, check_segment, &cut) && cut.at != size)
					fail("segments are missing");
			} else {
				net_complete_checksum(&vnet, parts, 2);
			}
		}
	}
	free(head);
}

// Ends -----------------------------------------------------------------------------------------------------

static bool carries(const struct end *end, uint16_t vlan)
{
	return end->vlan == vlan || (end->tagged && (vlan == 10 || vlan == 20));
}

static bool meet(const struct end *one, const struct end *other)
{
	return carries(one, other->vlan) || carries(other, one->vlan) || (one->tagged && other->tagged);
}

static void check_frame(unsigned number, const uint8_t *frame, size_t size, const struct net_vnet *vnet)
{
	const struct end *end = &ends[number];
	uint8_t *copy = malloc(size ? size : 1);
	struct net_frame parsed;
	memcpy(copy, frame, size);
	if (!net_frame_parse(&parsed, copy, size, size) || !net_vnet_valid(vnet, &parsed) || !net_vnet_plain(vnet, &parsed))
		fail("a switch sends what is no frame");
	if (vnet->gso_type == VNET_GSO_UDP_L4 ||
	    (!limited && !(end->offloads & OFFLOAD_CHECKSUM) && (vnet->flags || vnet->gso_type)))
		fail("a NIC is sent what it does not take");
	if ((vnet->gso_type ? parsed.payload + vnet->gso_size : size) - parsed.network > MTU)
		fail("a switch sends more than its MTU");
	uint16_t id = parsed.tci[0] & 0xfff;
	uint8_t from = copy[11];
	world.switched++;
	if (!limited && net_get16(copy + 12) == ETHERTYPE_VLAN && (!end->tagged || (id != 10 && id != 20)))
		fail("a tag names a VLAN that the port does not carry");
	if (limited || from >= ENDS || memcmp(copy + 6, "\0\x15\x5d\0\0", 5) != 0) {
		free(copy); // somebody may have made that up
		return;
	}
	bool sure = true; // that nobody else can have sent it
	for (unsigned i = 0; i < ENDS; i++)
		sure &= i == from || !ends[i].spoofing;
	if (sure && from == number)
		fail("a frame has come back to where it is from");
	if (sure && !meet(&ends[from], end))
		fail("a frame has left its VLAN");
	if (sure && ends[from].dhcp_guard && parsed.protocol == PROTOCOL_UDP && parsed.transport &&
	    net_get16(copy + parsed.transport) == (parsed.version == 4 ? 67 : 547))
		fail("a guard lets a DHCP server through");
	free(copy);
}

static bool take_stream(unsigned number)
{
	struct end *end = &ends[number];
	bool some = false;
	ssize_t size;
	while ((size = recv(end->fd, end->rest + end->rest_size, sizeof(end->rest) - end->rest_size, MSG_DONTWAIT)) > 0) {
		some = true;
		end->rest_size += (size_t)size;
		while (end->rest_size >= STREAM_LENGTH) {
			size_t length = net_get32(end->rest);
			if (length < NET_ETHERNET || length > NET_MAX_FRAME)
				fail("a stream has lost its place");
			if (end->rest_size < STREAM_LENGTH + length)
				break;
			check_frame(number, end->rest + STREAM_LENGTH, length, &(struct net_vnet){0});
			end->rest_size -= STREAM_LENGTH + length;
			memmove(end->rest, end->rest + STREAM_LENGTH + length, end->rest_size);
		}
	}
	return some;
}

// Takes what has arrived; returns whether something had.
static bool take(unsigned number)
{
	static uint8_t message[MOST];
	struct end *end = &ends[number];
	bool some = false;
	ssize_t size;
	if (end->kind == KIND_STREAM)
		return take_stream(number);
	while ((size = recv(end->fd, message, sizeof(message), MSG_DONTWAIT)) > 0) {
		struct net_vnet vnet;
		some = true;
		if (size < VNET_SIZE)
			fail("a switch sends what has no header");
		memcpy(&vnet, message, VNET_SIZE);
		check_frame(number, message + VNET_SIZE, (size_t)size - VNET_SIZE, &vnet);
	}
	return some;
}

static void turn(void)
{
	settle(called(fabric, "stop"));
	for (;;) {
		PyObject *ended = called(fabric, "run");
		if (!PyList_Check(ended))
			fail("run gives no list");
		bool more = PyList_GET_SIZE(ended);
		Py_DECREF(ended);
		if (!more)
			return;
	}
}

static void take_all(void)
{
	for (bool some = true; some;) {
		turn();
		some = false;
		for (unsigned number = 0; number < ENDS; number++)
			some |= take(number);
	}
}

static void set(unsigned number)
{
	struct end *end = &ends[number];
	const uint8_t mac[] = {0, 0x15, 0x5d, 0, 0, (uint8_t)number};
	end->vlan = (uint16_t)(below(3) * 10);
	end->tagged = one_in(3);
	end->spoofing = one_in(3);
	end->dhcp_guard = one_in(2);
	end->offloads = end->kind == KIND_STREAM || one_in(2) ? 0 : OFFLOAD_ALL;
	PyObject *tagged = end->tagged ? Py_BuildValue("(ii)", 10, 20) : PyTuple_New(0);
	PyObject *arguments = Py_BuildValue("(I)", number), *method = PyObject_GetAttrString(fabric, "set_port");
	PyObject *settings = Py_BuildValue("{sI sN sy# sN sN sN sI sN}", "vlan", end->vlan, "tagged", tagged, "mac",
					   (const char *)mac, (Py_ssize_t)sizeof(mac), "mac_spoofing",
					   PyBool_FromLong(end->spoofing), "dhcp_guard", PyBool_FromLong(end->dhcp_guard),
					   "router_guard", PyBool_FromLong(one_in(2)), "bandwidth",
					   limited && one_in(2) ? (unsigned)below(10000000) : 0, "link", PyBool_FromLong(!one_in(10)));
	settle(PyObject_Call(method, arguments, settings));
	Py_DECREF(method);
	Py_DECREF(arguments);
	Py_DECREF(settings);
	settle(PyObject_CallMethod(fabric, "set_offloads", "II", number, end->offloads));
}

static void plug(unsigned number)
{
	static const char *const kinds[] = {"socket", "tap", "packet", "stream"};
	struct end *end = &ends[number];
	int pair[2];
	end->kind = (enum switch_kind)below(4);
	end->rest_size = 0;
	if (socketpair(AF_UNIX, end->kind == KIND_STREAM ? SOCK_STREAM : SOCK_SEQPACKET, 0, pair) < 0)
		fail("no socket pair");
	end->fd = pair[0];
	settle(PyObject_CallMethod(fabric, "add_port", "Isi", number, kinds[end->kind], pair[1]));
	set(number);
}

static void unplug(unsigned number)
{
	close(ends[number].fd);
	if (one_in(2))
		turn();
	settle(PyObject_CallMethod(fabric, "remove_port", "I", number));
}

static void send_something(unsigned number)
{
	static uint8_t message[MOST];
	const struct end *end = &ends[number];
	size_t head = end->kind == KIND_STREAM ? STREAM_LENGTH : VNET_SIZE;
	size_t size = some_frame(number, message + head);
	if (size > NET_MAX_FRAME)
		size = NET_MAX_FRAME;
	if (end->kind == KIND_STREAM)
		net_put32(message, one_in(200) ? (uint32_t)draw() : (uint32_t)size);
	else
		some_header((struct net_vnet *)message, message + head, size);
	size += head;
	// A stream's end may take a part only, and is out of step then: one way more for it to lie.
	ssize_t done = send(end->fd, message, one_in(100) ? below(size + 1) : size, MSG_DONTWAIT | MSG_NOSIGNAL);
	(void)done;
}

static void mirror(unsigned number)
{
	int file = one_in(4) ? -1 : open(one_in(4) ? "/dev/full" : "/dev/null", O_WRONLY | O_CLOEXEC);
	settle(PyObject_CallMethod(fabric, "mirror", "IiK", number, file, (unsigned long long)below(1 << 20)));
}

void use_switches(void)
{
	PyObject *how = Py_BuildValue("{sO}", "manual_time", Py_True), *with = Py_BuildValue("(I)", MTU);
	fabric = PyObject_Call((PyObject *)&Switch_Type, with, how);
	Py_DECREF(with);
	Py_DECREF(how);
	if (!fabric)
		fail("no switch");
	now = 0;
	limited = one_in(2);
	for (unsigned i = 0; i < ENDS; i++)
		plug(i);
	for (unsigned i = 0; i < STEPS; i++) {
		unsigned number = (unsigned)below(ENDS);
		switch (below(12)) {
		case 0:
			take_all(); // what was sent by the rules before
			set(number);
			take_all();
			break;
		case 1:
			take_all();
			unplug(number);
			plug(number);
			break;
		case 2:
			now += one_in(4) ? draw() >> 24 : below(100000000);
			settle(PyObject_CallMethod(fabric, "set_time", "K", (unsigned long long)now));
			break;
		case 3:
			mirror(number);
			break;
		case 4:
			settle(PyObject_CallMethod(fabric, "statistics", "I", number));
			settle(called(fabric, "learned"));
			break;
		case 5:
			take(number);
			break;
		default:
			for (uint64_t count = below(40); count--;)
				send_something(number);
			turn();
			if (one_in(2))
				take_all();
		}
		take_apart();
	}
	take_all();
	for (unsigned i = 0; i < ENDS; i++)
		close(ends[i].fd);
	Py_CLEAR(fabric);
}
