"""The network VSP: synthetic NICs on VMBus."""
