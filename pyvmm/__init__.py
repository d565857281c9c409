"""pyvmm: a Hyper-V-compatible virtual machine monitor on Linux KVM."""

__version__ = "0.1.0"
