"""A bare-metal guest that measures disks: the same requests by several drivers."""
