"""Integration components: services between host and guest, each on a VMBus message pipe of its own."""
