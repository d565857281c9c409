// CRC-32C (Castagnoli), the checksum of VHDX structures: polynomial 0x1edc6f41, reflected, initial value and final
// inversion all ones. Facts: RFC 3720 appendix B.4.

#include "hot.h"

#include <string.h>

enum { POLYNOMIAL = 0x82f63b78 };

// tables[k][b] is the effect of byte b followed by k zero bytes.
static uint32_t tables[8][256];

static void __attribute__((constructor)) make_tables(void)
{
	for (unsigned byte = 0; byte < 256; byte++) {
		uint32_t crc = byte;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? (uint32_t)POLYNOMIAL : 0);
		tables[0][byte] = crc;
	}
	for (unsigned k = 1; k < 8; k++) {
		for (unsigned byte = 0; byte < 256; byte++) {
			uint32_t crc = tables[k - 1][byte];
			tables[k][byte] = crc >> 8 ^ tables[0][crc & 0xff];
		}
	}
}

static uint32_t update_by_tables(uint32_t crc, const uint8_t *data, size_t length)
{
	for (; length >= 8; data += 8, length -= 8) {
		uint64_t word;
		memcpy(&word, data, sizeof(word));
		word ^= crc;
		crc = 0;
		for (unsigned k = 0; k < 8; k++)
			crc ^= tables[7 - k][word >> 8 * k & 0xff];
	}
	for (; length; data++, length--)
		crc = crc >> 8 ^ tables[0][(crc ^ *data) & 0xff];
	return crc;
}

static uint32_t __attribute__((target("sse4.2"))) update_by_cpu(uint32_t crc, const uint8_t *data, size_t length)
{
	uint64_t wide = crc;
	for (; length >= 8; data += 8, length -= 8) {
		uint64_t word;
		memcpy(&word, data, sizeof(word));
		wide = __builtin_ia32_crc32di(wide, word);
	}
	crc = (uint32_t)wide;
	for (; length; data++, length--)
		crc = __builtin_ia32_crc32qi(crc, *data);
	return crc;
}

PyObject *hot_crc32c(PyObject *Py_UNUSED(module), PyObject *args)
{
	Py_buffer data;
	unsigned int before = 0;
	int portable = 0;
	if (!PyArg_ParseTuple(args, "y*|Ip:crc32c", &data, &before, &portable))
		return NULL;
	bool by_cpu = !portable && __builtin_cpu_supports("sse4.2");
	uint32_t crc = ~(uint32_t)before;
	Py_BEGIN_ALLOW_THREADS
	crc = (by_cpu ? update_by_cpu : update_by_tables)(crc, data.buf, (size_t)data.len);
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&data);
	return PyLong_FromUnsignedLong((uint32_t)~crc);
}
