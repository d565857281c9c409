// The hash by which frames are spread over channels: Toeplitz, as NDIS's receive side scaling has it.
//
// Facts: learn.microsoft.com, "RSS Hashing Types" and "Verifying the RSS Hash Calculation"; Linux 6.1 hyperv_net.h.

#include "net.h"

#include <string.h>

enum {
	HASH_IPV4 = 0x100,
	HASH_TCP_IPV4 = 0x200,
	HASH_IPV6 = 0x400,
	HASH_TCP_IPV6 = 0x1000,
	HASH_UDP_IPV4 = 0x4000,
	HASH_UDP_IPV6 = 0x8000,
};

// By half bytes: what each adds to the hash at each place.
void net_hash_set_key(NetDeviceObject *device, const uint8_t key[NET_KEY])
{
	for (unsigned place = 0; place < 2 * NET_HASHED; place++) {
		// The key's 32 bits from each of four neighbouring bits on.
		uint64_t window = 0;
		for (unsigned i = 0; i < 5; i++)
			window = window << 8 | key[place / 2 + i];
		for (unsigned value = 0; value < 16; value++) {
			uint32_t hash = 0;
			for (unsigned bit = 0; bit < 4; bit++)
				if (value & 8U >> bit)
					hash ^= (uint32_t)(window >> (8 - (place % 2 * 4 + bit)));
			device->toeplitz[place][value] = hash;
		}
	}
}

bool net_hash(const NetDeviceObject *device, const struct net_frame *frame, const uint8_t *head, uint32_t *hash)
{
	uint8_t input[NET_HASHED];
	bool six = frame->version == 6;
	bool ports = frame->payload && !frame->fragment && !frame->obscured;
	uint32_t pair = six ? HASH_IPV6 : HASH_IPV4, four = 0;
	if (ports && frame->protocol == PROTOCOL_TCP)
		four = six ? HASH_TCP_IPV6 : HASH_TCP_IPV4;
	else if (ports && frame->protocol == PROTOCOL_UDP)
		four = six ? HASH_UDP_IPV6 : HASH_UDP_IPV4;
	ports = device->hashes & four;
	if (!frame->version || !(ports || device->hashes & pair))
		return false;
	unsigned size = six ? 32 : 8;
	memcpy(input, head + frame->network + (six ? 8 : 12), size);
	if (ports) {
		memcpy(input + size, head + frame->transport, 4);
		size += 4;
	}
	*hash = 0;
	for (unsigned i = 0; i < size; i++)
		*hash ^= device->toeplitz[2 * i][input[i] >> 4] ^ device->toeplitz[2 * i + 1][input[i] & 15];
	return true;
}
