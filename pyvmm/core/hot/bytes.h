// Little-endian numbers, as this host's are, at any address.

#ifndef PYVMM_BYTES_H
#define PYVMM_BYTES_H

#include <stdint.h>
#include <string.h>

static inline uint32_t get_le32(const uint8_t *from)
{
	uint32_t value;
	memcpy(&value, from, sizeof(value));
	return value;
}

static inline uint64_t get_le64(const uint8_t *from)
{
	uint64_t value;
	memcpy(&value, from, sizeof(value));
	return value;
}

static inline void put_le32(uint8_t *to, uint32_t value)
{
	memcpy(to, &value, sizeof(value));
}

#endif
