// Which port has which address: those that are known for certain, and those that were seen (IEEE 802.1Q, section 8.8).
//
// The table of what was seen has sets of a few entries, chosen by a secret hash. A new address takes the place of an expired
// one, or else of one of its own port; where neither is, it isn't learned. So nobody drives out what others have there.

#include "switch.h"

#include <string.h>

static bool expired(const SwitchObject *self, const struct table_entry *entry)
{
	return !entry->key || entry->seen + TABLE_NS < self->now;
}

static uint64_t key_of(uint16_t vlan, const uint8_t *mac)
{
	return (uint64_t)vlan << 48 | (uint64_t)net_get16(mac) << 32 | net_get32(mac + 2);
}

static struct table_entry *set_of(SwitchObject *self, uint64_t key)
{
	return self->table[key * self->secret >> 54 & (TABLE_SETS - 1)];
}

static unsigned bucket_of(const uint8_t *mac)
{
	return (mac[3] ^ mac[4] ^ mac[5]) % FIXED_BUCKETS;
}

struct switch_port *fixed_find(const SwitchObject *self, uint16_t vlan, const uint8_t *mac)
{
	struct switch_port *port = self->fixed[bucket_of(mac)];
	while (port && (memcmp(port->mac, mac, SWITCH_MAC) != 0 || !switch_carries(port, vlan)))
		port = port->next_fixed;
	return port;
}

void fixed_add(SwitchObject *self, struct switch_port *port)
{
	struct switch_port **bucket = &self->fixed[bucket_of(port->mac)];
	port->next_fixed = *bucket;
	*bucket = port;
}

void fixed_remove(SwitchObject *self, struct switch_port *port)
{
	struct switch_port **at = &self->fixed[bucket_of(port->mac)];
	while (*at != port)
		at = &(*at)->next_fixed;
	*at = port->next_fixed;
}

static void release(struct table_entry *entry)
{
	if (entry->key)
		entry->port->learned--;
	entry->key = 0;
}

struct switch_port *table_find(SwitchObject *self, uint16_t vlan, const uint8_t *mac)
{
	uint64_t key = key_of(vlan, mac);
	struct table_entry *set = set_of(self, key);
	for (unsigned i = 0; i < TABLE_WAYS; i++) {
		if (set[i].key == key)
			return expired(self, &set[i]) ? NULL : set[i].port;
	}
	return NULL;
}

void table_learn(SwitchObject *self, struct switch_port *port, uint16_t vlan, const uint8_t *mac)
{
	uint64_t key = key_of(vlan, mac);
	struct table_entry *set = set_of(self, key), *place = NULL, *own = NULL;
	bool moves = false;
	for (unsigned i = 0; i < TABLE_WAYS; i++) {
		if (set[i].key == key) {
			place = &set[i];
			if (place->port == port) {
				place->seen = self->now;
				return;
			}
			moves = true;
			break;
		}
		if (expired(self, &set[i]))
			place = &set[i];
		else if (set[i].port == port && (!own || set[i].seen < own->seen))
			own = &set[i];
	}
	const struct switch_port *fixed = fixed_find(self, vlan, mac);
	if (!key || (fixed && fixed != port))
		return;
	if (!place || (!moves && port->kind == KIND_SOCKET && port->learned >= TABLE_OF_NIC))
		place = own;
	if (!place)
		return;
	release(place);
	*place = (struct table_entry){key, self->now, port};
	port->learned++;
}

static void sweep(SwitchObject *self, const struct switch_port *port)
{
	for (unsigned i = 0; i < TABLE_SETS; i++) {
		for (unsigned j = 0; j < TABLE_WAYS; j++) {
			struct table_entry *entry = &self->table[i][j];
			if (port ? entry->port == port : expired(self, entry))
				release(entry);
		}
	}
}

void table_forget(SwitchObject *self, const struct switch_port *port)
{
	sweep(self, port);
}

void table_sweep(SwitchObject *self)
{
	sweep(self, NULL);
}
