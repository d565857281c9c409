// What is drawn: numbers, and values and addresses that mean something to the interface.

#include "world.h"

static uint64_t state;

void set_seed(uint64_t seed)
{
	state = seed;
}

uint64_t draw(void)
{
	uint64_t z = (state += 0x9e3779b97f4a7c15); // SplitMix64
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

uint64_t below(uint64_t limit)
{
	return draw() % limit;
}

bool one_in(unsigned count)
{
	return below(count) == 0;
}

uint64_t some_gpa(void)
{
	switch (below(8)) {
	case 0:
		return draw();
	case 1:
		return RAM_SIZE - 8 * below(64) - (one_in(4) ? below(8) : 0);
	case 2:
		return ROM_BASE + below(0x1100);
	case 3:
		return below(RAM_SIZE);
	case 4:
		return below(RAM_SIZE / 8) * 8;
	default:
		return below(RAM_SIZE / HOT_PAGE_SIZE) * HOT_PAGE_SIZE;
	}
}

uint64_t some_value(void)
{
	switch (below(9)) {
	case 0:
		return draw();
	case 1:
		return below(256);
	case 2:
		return 1ull << below(64);
	case 3:
		return ~0ull << below(64);
	case 4:
		return below(0x20000); // timer configurations, vectors
	case 5:
		return (below(16) << 16) | (below(2) << 12) | below(0x1000);
	case 6:
		return world.now + below(2000) - 1000;
	default:
		return (some_gpa() & ~0xfffull) | below(4);
	}
}

void fill(void *to, size_t size)
{
	for (uint8_t *at = to; size--; at++)
		*at = (uint8_t)draw();
}
