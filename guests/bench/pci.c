/* PCI configuration space by mechanism 1 (PCI Local Bus Specification 3.0, 3.2.2.3.2), bus 0 only. */
#include "bench.h"

#define ADDRESS 0xcf8
#define DATA 0xcfc
#define ENABLE (1u << 31)
#define COMMAND 0x04
#define BAR0 0x10
#define COMMAND_IO_MEMORY_MASTER 7u
#define IO_BAR 1u

u32 pci_read(u32 device, u32 offset)
{
    outl(ADDRESS, ENABLE | device << 8 | offset);
    return inl(DATA);
}

void pci_write(u32 device, u32 offset, u32 value)
{
    outl(ADDRESS, ENABLE | device << 8 | offset);
    outl(DATA, value);
}

bool pci_find(u32 id, u32 *device)
{
    for (u32 at = 0; at < 256; at++)
        if (pci_read(at, 0) == id) {
            pci_write(at, COMMAND, COMMAND_IO_MEMORY_MASTER);
            *device = at;
            return true;
        }
    return false;
}

u16 pci_ports(u32 device, u32 bar)
{
    u32 value = pci_read(device, BAR0 + 4 * bar);

    return value & IO_BAR ? (u16)(value & ~3u) : 0;
}
