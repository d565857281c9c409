"""The parent side: what manages VMs and what they share, beyond one VM's own process."""
